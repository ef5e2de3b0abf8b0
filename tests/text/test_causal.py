"""Attention in which no token looks ahead, beside the masked formula in float64."""

import pytest
import torch
from torch import Tensor

from packvit.fast.attention import attend as attend_fast
from packvit.fast.attention import is_batch
from packvit.model.attention import AttentionInputs, resolve
from packvit.packs.segments import Segments

HEADS, WIDTH = 2, 64
WAYS = [
    ("cpu", "sdpa"),
    *(pytest.param("cuda", n, marks=pytest.mark.gpu) for n in ("sdpa", "torch", "fa4")),
]


def masked(qkv: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """What every head finds, one sequence after another. Shapes: [T, 3 D] -> [T, D]."""
    found = []
    for part in qkv.split(list(lengths)):
        query, key, value = part.unflatten(-1, (3, HEADS, -1)).movedim(-2, 0).unbind(-2)
        scores = query @ key.transpose(-1, -2) / (query.shape[-1] ** 0.5)
        ahead = torch.ones_like(scores, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(ahead, float("-inf")).softmax(-1)
        found.append((weights @ value).movedim(0, -2).flatten(-2))
    return torch.cat(found)


@pytest.mark.parametrize(("device", "backend"), WAYS)
@pytest.mark.parametrize("lengths", [(5, 1, 77, 16), (64, 64, 64)])
@pytest.mark.parametrize("needs_grad", [True, False])
def test_no_token_looks_ahead_nor_into_another_text(
    device: str, backend: str, lengths: tuple[int, ...], needs_grad: bool
):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    chosen = AttentionInputs(torch.device(device), dtype, WIDTH)
    try:
        way = resolve(backend, chosen)
    except ValueError as error:
        pytest.skip(str(error))
    draw = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(lengths), 3 * HEADS * WIDTH, generator=draw).to(device, dtype)
    back = torch.randn(sum(lengths), HEADS * WIDTH, generator=draw).to(device, dtype)
    exact = qkv.double().requires_grad_()
    wanted = masked(exact, lengths)
    [slope] = torch.autograd.grad(wanted, exact, back.double())
    segments = Segments.from_lengths(lengths, device=device, causal=True)
    given = qkv.clone().requires_grad_(needs_grad)
    with torch.set_grad_enabled(needs_grad):
        found = attend_fast(
            given, HEADS, segments, None, way, needs_grad, is_batch(lengths) and not needs_grad
        )
    limit = 1e-5 if device == "cpu" else 2e-2
    assert (found - wanted).abs().max() <= limit * wanted.abs().max()
    if needs_grad:
        [ours] = torch.autograd.grad(found, given, back)
        assert (ours - slope).abs().max() <= limit * slope.abs().max()
