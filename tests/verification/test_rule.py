"""The rule: two right implementations pass it beside each other, and a mistake never does."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mutations
import pytest
import torch
from torch import Tensor, nn

import packvit
from packvit.config import Table
from packvit.encoder import Encoder
from packvit.packs.grid import Grid
from packvit.verification import VerifyOptions
from packvit.verification.answers import Answers
from packvit.verification.comparison import Round, ask_reference, judge_pack
from packvit.verification.drawing import draw, in_squares, repeated
from packvit.verification.references import ReferenceModel, write_random
from packvit.verification.rule import Judgement, floor_of, judge, judge_layers
from packvit.verification.running import run
from packvit.verification.verify import family_names

FAST = VerifyOptions(quick=True, lower=())
VARIANTS = {
    f"{name} {variant.name}": (encoder, variant)
    for name, encoder in family_names().items()
    for variant in encoder.family.reference.variants
    if encoder.family.reference.library == "transformers"
}
# Of these every mistake is made in seconds; of the others in the soak.
FEW = {"aimv2 native", "siglip2 NaFlex", "dinov3 plain", "dinov2 registers", "clip gelu"}
FEW |= {"qwen3_vl deepstack", "kimi_k25 clips"}
MISTAKEN = [
    name if name in FEW else pytest.param(name, marks=pytest.mark.soak) for name in VARIANTS
]
SHOWN_BY = {
    "first register for class token": {"pooled"},
    "squares laid together column by column": {"merged"},
}
DRAWINGS = {torch.float32: 3000, torch.bfloat16: 1000, torch.float16: 1000}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[Round]]]:
    """Checkpoints of small random models, and what the reference says of each, asked once."""
    known: dict[str, tuple[Path, list[Round]]] = {}

    def ask(name: str) -> tuple[Path, list[Round]]:
        if name not in known:
            kind, variant = VARIANTS[name]
            folder = tmp_path_factory.mktemp("checkpoint")
            write_random(variant, kind.family, folder, seed=0)
            encoder = packvit.load(folder, device="cpu")
            known[name] = folder, ask_reference(encoder, ReferenceModel(kind.family, folder), FAST)
        return known[name]

    return ask


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_an_error_is_judged_by_the_references_own_beyond_the_floor():
    truth, off = noise(100, 64), 1e-4 * noise(100, 64, seed=1)
    for times, passed in ((1.15, True), (1.25, False), (-1.15, True)):
        rms, largest = judge(
            [truth + times * off], [truth + off], [truth], dtype=torch.float32, blocks=2
        )
        assert (rms.passed, largest.passed) == (passed, True)
        assert rms.worst == pytest.approx(abs(times) * rms.own)
        assert rms.own == pytest.approx(1e-4, rel=0.05)


def test_one_number_that_is_far_off_is_a_miss_where_the_whole_is_not():
    truth, off = noise(100, 64), 1e-4 * noise(100, 64, seed=1)
    ours = truth + off
    ours[7, 3] += 4 * off.abs().max()
    rms, largest = judge([ours], [truth + off], [truth], dtype=torch.float32, blocks=2)
    assert (rms.passed, largest.passed) == (True, False)


def test_the_floor_grows_with_blocks_and_roundoff_and_lets_a_reference_be_exact():
    assert floor_of(torch.float32, 3) == 10 * 2**-24 * 2
    assert floor_of(torch.bfloat16, 3) == 2**-8 * 2
    truth = noise(100, 64)
    for factor, passed in ((0.9, True), (1.1, False)):
        off = (
            factor * floor_of(torch.float32, 3) * torch.ones(100, 64) * truth.square().mean().sqrt()
        )
        rms, _ = judge([truth + off], [truth], [truth], dtype=torch.float32, blocks=3)
        assert (rms.passed, rms.own) == (passed, 0.0)


def test_what_is_missing_of_another_shape_or_no_number_is_a_miss():
    truth = noise(5, 64)
    for ours in (None, [truth[:4]], [truth * torch.nan], []):
        judged = judge(ours, [truth], [truth], dtype=torch.float32, blocks=1)
        assert [one.passed for one in judged] == [False, False]
    judged = judge([truth], None, None, dtype=torch.float32, blocks=1)
    assert [one.passed for one in judged] == [False, False]


def test_a_layer_that_is_off_is_not_hidden_by_larger_ones():
    truth = torch.stack([noise(300, 64), 1000 * noise(300, 64, seed=1)])
    ours = truth.clone()
    ours[0] += 1e-4
    judged = list(judge_layers([ours], [truth], [truth], dtype=torch.float32))
    assert {layer for layer, one in judged if not one.passed} == {0}


def missed(encoder: Encoder, rounds: list[Round]) -> set[str]:
    """The kinds of output that do not pass, of all images in one pack."""
    rows = judge_pack(encoder, "sdpa", "among others", rounds)
    return {row.what for row in rows if not row.passed}


@pytest.mark.parametrize("name", VARIANTS)
def test_without_a_mistake_every_output_passes(
    asked: Callable[[str], tuple[Path, list[Round]]], name: str
):
    folder, rounds = asked(name)
    assert missed(packvit.load(folder, device="cpu"), rounds) == set()


@pytest.mark.parametrize("mistake", mutations.MISTAKES)
@pytest.mark.parametrize("name", MISTAKEN)
def test_every_mistake_is_caught_in_float32_on_random_weights(
    asked: Callable[[str], tuple[Path, list[Round]]],
    name: str,
    mistake: str,
    monkeypatch: pytest.MonkeyPatch,
):
    folder, rounds = asked(name)
    encoder = packvit.load(folder, device="cpu")
    if not mutations.applies(encoder, mistake):
        pytest.skip("nothing to mistake")
    mutations.MISTAKES[mistake](encoder, monkeypatch)
    wanted = SHOWN_BY.get(mistake, {"tokens", "taps"})
    assert missed(encoder, rounds) >= wanted


def drawings(dtype: torch.dtype, seed: int) -> Iterator[tuple[nn.Module, Encoder, Grid, bool]]:
    """Yield a random model of every variant, and each set of images it is asked about."""
    for kind, variant in VARIANTS.values():
        with TemporaryDirectory() as folder:
            write_random(variant, kind.family, Path(folder), seed)
            encoder = packvit.load(folder, device="cpu")
            model = ReferenceModel(kind.family, Path(folder)).load(dtype, "cpu")
        table = encoder.config.positions
        fixed = isinstance(table, Table) and not table.any_grid
        grids = [((1, 1, 1),), ((1, 1, 23),), ((1, 3, 17),), ((2, 4, 6),), ((1, 14, 14),)]
        grids = [(in_squares(grid[0], encoder.images.multiple),) for grid in grids]
        for grid in grids[-1:] if fixed and not kind.family.reference.interpolates else grids:
            yield model, encoder, repeated(grid), fixed and grid != grids[-1]


def eager(model: Any) -> Any:
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    return other


def judge_all(
    ours: Answers, theirs: Answers, truth: Answers, encoder: Encoder, dtype: torch.dtype
) -> Iterator[tuple[str, Judgement]]:
    for kind in truth:
        given = ours[kind], theirs[kind], truth[kind]
        if kind == "taps":
            yield from ((f"tap {i}", one) for i, one in judge_layers(*given, dtype=dtype))
        else:
            judged = judge(*given, dtype=dtype, blocks=encoder.config.layers)
            yield from ((kind, one) for one in judged)


@pytest.mark.soak
@pytest.mark.parametrize("dtype", DRAWINGS)
def test_two_right_implementations_never_miss_beside_each_other(dtype: torch.dtype):
    """W4: transformers' eager attention and torch's, each in turn ours and the reference."""
    done, seed, missed, most = 0, 0, [], 0.0
    while done < DRAWINGS[dtype]:
        for model, encoder, grid, interpolate in drawings(dtype, seed):
            patches = [x.to(dtype) for x in draw(grid, encoder, seed)]
            models = model, eager(model), copy.deepcopy(model).double()
            one, other, truth = (run(m, patches, grid, interpolate=interpolate) for m in models)
            for pair in ((one, other), (other, one)):
                for kind, judged in judge_all(*pair, truth, encoder, dtype):
                    most = max(most, judged.used)
                    if not judged.passed:
                        missed.append((encoder.family.name, grid[0], kind, judged))
            done += 1
        seed += 1
    print(f"{dtype}: {len(missed)} misses in {done} drawings, {most:.2f} of a limit used at most")
    assert missed == []
