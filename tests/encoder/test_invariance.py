"""`invariant=True`: an image's bits do not depend on what shares its pack.

The needle: one image alone, then in random packs at random places, every result bit for bit the
same, the first time. The inverse test shows that this harness sees a kernel that varies.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import reference
import torch
from torch import Tensor

from packvit.config import Activation
from packvit.encoder import Encoder
from packvit.families import FAMILIES
from packvit.model.activations import ACTIVATIONS, activate
from packvit.model.linear import Linear, affine

Grid = list[tuple[int, int, int]]
SIDES = (5, 5)  # what fixed tables are made for; packs of any grid hold it too


def invariant(
    kind: str, device: str, dtype: torch.dtype, attention: str, *, fp8: bool = False, **changes
) -> Encoder:
    model = reference.build(kind, **changes).to(device, dtype)
    [family] = [f for f in FAMILIES if model.config.model_type in f.family.model_types]
    return family.from_transformers(
        model, attention=attention, positions="interpolate", invariant=True, fp8=fp8
    )


def noise(kind: str, draw: random.Random) -> Callable[[Tensor], Tensor]:
    value = {"nan": float("nan"), "inf": float("inf"), "large": 1e4, "plain": 1.0}[kind]
    return lambda patches: patches * value


def haystacks(encoder: Encoder, packs: int, most: int, seed: int, neighbours: str) -> list[int]:
    """Put one image in random packs, and return in which of them its bits are other than alone."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    side = encoder.config.patch_dim
    needle = torch.randn(SIDES[0] * SIDES[1], side, generator=generator).to(encoder.device)

    def run(patches: list[Tensor], grid: Grid, at: int) -> list[Tensor]:
        with torch.inference_mode():
            out = encoder.encode(torch.cat(patches), torch.tensor(grid), taps=[0])
        starts = [rows * columns for _, rows, columns in grid]
        first = sum(starts[:at])
        rows = slice(first, first + len(needle))
        pooled = [] if out.pooled is None else [out.pooled[at]]
        return [out.tokens[rows], out.taps[0][rows], out.prefix[at], *pooled]

    alone = run([needle], [(1, *SIDES)], 0)
    different = []
    for pack in range(packs):
        count = draw.randrange(1, 12)
        grid: Grid = [(1, draw.randint(1, most), draw.randint(1, most)) for _ in range(count)]
        change = noise(neighbours, draw)
        patches = [
            change(torch.randn(rows * columns, side, generator=generator)).to(encoder.device)
            for _, rows, columns in grid
        ]
        at = draw.randrange(count + 1)
        grid.insert(at, (1, *SIDES))
        patches.insert(at, needle)
        found = run(patches, grid, at)
        if not all(torch.equal(a, b) for a, b in zip(alone, found, strict=True)):
            different.append(pack)
    return different


@pytest.mark.parametrize("kind", reference.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_image_has_the_same_bits_alone_and_in_any_pack(kind: str, dtype: torch.dtype):
    assert haystacks(invariant(kind, "cpu", dtype, "sdpa"), 6, 12, 1, "plain") == []


@pytest.mark.parametrize("neighbours", ["plain", "nan", "inf", "large"])
def test_200_packs_change_no_bit_of_an_image(neighbours: str):
    packs = 200 if neighbours == "plain" else 20
    encoder = invariant("aimv2", "cpu", torch.float32, "sdpa", num_hidden_layers=2)
    assert haystacks(encoder, packs, 8, 2, neighbours) == []


LARGE: dict[str, Any] = {  # AIMv2-large's widths, at which libraries choose between many kernels
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "is_native": True,
}


@pytest.mark.gpu
@pytest.mark.parametrize("neighbours", ["plain", "nan", "inf", "large"])
@pytest.mark.parametrize(
    ("dtype", "attention"),
    [
        (torch.bfloat16, "torch"),
        (torch.bfloat16, "fa4"),
        (torch.bfloat16, "sdpa"),
        (torch.float32, "sdpa"),
    ],
)
def test_200_packs_change_no_bit_of_an_image_on_a_gpu(dtype, attention, neighbours: str):
    if attention == "fa4":
        pytest.importorskip("flash_attn.cute", reason="flash-attn-4 is not installed")
    packs = 200 if neighbours == "plain" else 20
    encoder = invariant("aimv2", "cuda", dtype, attention, **LARGE)
    assert haystacks(encoder, packs, 40, 3, neighbours) == []


@pytest.mark.gpu
@pytest.mark.parametrize("neighbours", ["plain", "nan", "inf", "large"])
def test_packs_change_no_bit_of_an_image_in_int8(neighbours: str):
    encoder = invariant("aimv2", "cuda", torch.bfloat16, "torch", fp8=True, **LARGE)
    assert haystacks(encoder, 20, 40, 3, neighbours) == []


@pytest.mark.gpu
@pytest.mark.parametrize("kind", reference.KINDS)
def test_every_family_keeps_the_bits_on_a_gpu(kind: str):
    assert haystacks(invariant(kind, "cuda", torch.bfloat16, "torch"), 10, 30, 1, "plain") == []


def test_the_harness_notices_a_matmul_that_varies_with_its_rows(monkeypatch: pytest.MonkeyPatch):
    encoder = invariant("aimv2", "cpu", torch.float32, "sdpa")
    encoder.fast = None  # which on a CPU multiplies by no `Linear.forward`
    assert haystacks(encoder, 3, 8, 4, "plain") == []

    def split(self: Linear, input: Tensor) -> Tensor:  # split-K, as libraries do for few rows
        halves = 1 + (len(input) < 100)
        parts = zip(input.chunk(halves, 1), self.weight.chunk(halves, 1), strict=True)
        out = torch.stack([part @ weight.T for part, weight in parts]).sum(0)
        return out if self.bias is None else out + self.bias

    monkeypatch.setattr(Linear, "forward", split)
    assert haystacks(encoder, 20, 8, 4, "plain") != []


@pytest.mark.parametrize("tokens", [1, 255, 256, 257, 700])
def test_rows_in_fixed_numbers_compute_the_same_layer(tokens: int):
    torch.manual_seed(tokens)
    layer, x = Linear(24, 40).double(), torch.randn(tokens, 24, dtype=torch.float64)
    plain = layer(x)
    fixed = affine(x, layer.weight, layer.bias, True)
    torch.testing.assert_close(fixed, plain, atol=1e-14, rtol=0)


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


on_threads = pytest.mark.parametrize("threads", [1, 2, 3, 7], indirect=True)
WIDTHS = (36, 37, 2816, 4304)  # of SigLIP's so400m the last: no multiple of a vector


@on_threads
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_n6_an_activation_gives_a_row_the_same_bits_anywhere(
    threads: int, dtype: torch.dtype, name: Activation
):
    """Row N6 of the cases: the formulas of a vector's tail, and where threads part the work."""
    generator = torch.Generator().manual_seed(threads)
    for width in WIDTHS:
        rows = torch.randn(700, width, generator=generator).to(dtype) * 2
        alone = activate(rows[:25], name, True)
        for tokens in (25, 26, 31, 60, 700):
            for at in {0, (tokens - 25) // 3, tokens - 25}:
                pack = rows[:tokens].roll(at, 0)
                found = activate(pack, name, True)
                assert torch.equal(found[at : at + 25], alone), (width, tokens, at)
        torch.set_num_threads(1)
        assert torch.equal(activate(rows, name, True)[:25], alone)
        torch.set_num_threads(threads)
        plain = activate(rows.double(), name, False)
        torch.testing.assert_close(alone.double(), plain[:25], atol=1e-2, rtol=1e-2)


@on_threads
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("aimv2", torch.float32),  # SiLU
        ("clip", torch.float32),  # quick-GELU
        ("siglip2", torch.float32),  # GELU by tanh
        ("siglip2", torch.bfloat16),  # which alone varied in 16 bits
    ],
)
def test_n6_the_needle_has_its_bits_on_any_number_of_threads_and_any_width(
    threads: int, dtype: torch.dtype, kind: str
):
    for width in WIDTHS:
        changes: dict[str, Any] = {"intermediate_size": width, "num_hidden_layers": 1}
        encoder = invariant(kind, "cpu", dtype, "sdpa", **changes)
        assert haystacks(encoder, 2, 9, width, "plain") == [], width


def test_n6_gradients_pass_through_the_pieces():
    x = torch.randn(3, 9000, dtype=torch.float64, requires_grad=True)
    for name in ACTIVATIONS:
        [found] = torch.autograd.grad(activate(x, name, True).square().sum(), x)
        [expected] = torch.autograd.grad(activate(x, name, False).square().sum(), x)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert activate(x[:0], "silu", True).shape == (0, 9000)
