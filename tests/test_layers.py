"""Fused steps beside their plain twins."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from packvit.layers import gelu_in_epilogue, gelu_tanh, may_fuse


def test_fused_steps_are_for_cuda_inference_alone():
    linear, x = nn.Linear(8, 16), torch.randn(3, 8)
    assert not may_fuse(x, linear)
    with torch.inference_mode():
        assert not may_fuse(x, linear)


@pytest.mark.gpu
def test_fused_steps_leave_training_to_their_plain_twins():
    linear, x = nn.Linear(8, 16, device="cuda"), torch.randn(3, 8, device="cuda")
    with torch.no_grad():
        assert not may_fuse(x, linear)  # fp32 is for being exact
    linear, x = linear.bfloat16(), x.bfloat16()
    assert not may_fuse(x, linear)
    with torch.no_grad():
        assert may_fuse(x, linear)
    linear.requires_grad_(False)
    assert may_fuse(x, linear)  # frozen, and nothing before it is taught
    assert not may_fuse(x.requires_grad_(), linear)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 77, 4096])
def test_gelu_in_the_epilogue_is_nearer_to_fp32_than_its_plain_twin(tokens: int):
    torch.manual_seed(tokens)
    linear = nn.Linear(1152, 4304, device="cuda").bfloat16()
    x = torch.randn(tokens, 1152, device="cuda").bfloat16()
    with torch.inference_mode():
        weight, bias = linear.weight.double(), linear.bias.double()
        exact = gelu_tanh(F.linear(x.double(), weight, bias))
        fused, plain = gelu_in_epilogue(x, linear), gelu_tanh(linear(x))
        assert (fused.double() - exact).norm() <= (plain.double() - exact).norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "width"), [(1, 8), (77, 2816), (33, 1025), (4096, 171)])
def test_silu_times_is_nearer_to_exact_than_its_plain_twin(dtype, tokens: int, width: int):
    from packvit.kernels import silu_times

    torch.manual_seed(tokens)
    x = (3 * torch.randn(tokens, 2 * width, device="cuda")).to(dtype)
    gate, up = x.double().chunk(2, dim=-1)
    exact = F.silu(gate) * up
    fused, plain = silu_times(x), F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]
    assert fused.dtype == dtype
    if dtype == torch.float32:  # the last bits are luck there; the encoder fuses in 16 bits alone
        torch.testing.assert_close(fused.double(), exact, atol=1e-6, rtol=1e-6)
    else:
        assert (fused.double() - exact).norm() <= (plain.double() - exact).norm()


@pytest.mark.gpu
def test_silu_times_writes_every_element_and_nan_stays_in_its_row():
    from packvit.kernels import silu_times

    x = torch.randn(5, 2 * 1500, device="cuda")
    before = silu_times(x)
    assert before.isfinite().all()
    x[2, 7] = float("nan")
    after = silu_times(x)
    rest = [0, 1, 3, 4]
    assert torch.equal(before[rest], after[rest])
    assert after[2].isnan().sum() == 1
