"""Norms that add what comes before them, beside the plain model's."""

import pytest
import torch
from plain_steps import add_norm, norms, rows_stand_for
from torch import nn

from packvit.fast.int8 import LinearInt8
from packvit.fast.steps import Delta


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "width"), [(1, 8), (77, 1024), (33, 1025), (4096, 1152)])
@pytest.mark.parametrize("adds", [True, False])
def test_add_norm_is_nearer_to_exact_than_the_plain_model(dtype, tokens: int, width: int, adds):
    torch.manual_seed(tokens)
    stream, delta = (3 * torch.randn(2, tokens, width, device="cuda")).to(dtype)
    given = Delta(delta, None) if adds else None
    for norm in norms(width, "cuda", dtype):
        with torch.inference_mode():
            summed, fused = add_norm(stream, given, norm, norm, False)
            same = stream if given is None else stream + delta
            plain = norm(same)
            exact = norm.double()(same.double())
            norm.to(dtype)
        assert torch.equal(summed, same)
        assert fused.dtype == dtype
        error = (fused.double() - exact).norm()
        assert error <= 1.001 * (plain.double() - exact).norm()


@pytest.mark.gpu
def test_nan_stays_in_its_row_of_add_norm():
    stream, delta = torch.randn(2, 5, 1500, device="cuda").bfloat16()
    [norm, _] = norms(1500, "cuda", torch.bfloat16)
    reader = LinearInt8(nn.Linear(1500, 16, device="cuda"), norm)
    with torch.inference_mode():
        _, before = add_norm(stream, Delta(delta, None), norm, norm, False)
        _, eight = add_norm(stream, Delta(delta, None), norm, reader, False)
        stream[2, 7] = float("nan")
        summed, after = add_norm(stream, Delta(delta, None), norm, norm, False)
        _, eight_after = add_norm(stream, Delta(delta, None), norm, reader, False)
    rest = [0, 1, 3, 4]
    assert torch.equal(before[rest], after[rest])
    assert after[2].isnan().all()
    assert summed[2].isnan().sum() == 1
    rows, rows_after = (rows_stand_for(x, reader) for x in (eight, eight_after))
    assert torch.equal(rows[rest], rows_after[rest])
    assert rows_after[2].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_scale_within_the_norm_is_nearer_to_exact_than_a_pass_of_its_own(dtype):
    torch.manual_seed(0)
    x, delta = torch.randn(2, 300, 1024, device="cuda").to(dtype)
    factor = torch.randn(1024, device="cuda").to(dtype)
    for norm in norms(1024, "cuda", dtype):
        with torch.inference_mode():
            summed, _ = add_norm(x, Delta(delta, factor), norm, norm, False)
            exact = x.double() + delta.double() * factor.double()
            plain = x + delta * factor
        assert (summed.double() - exact).norm() <= (plain.double() - exact).norm()
