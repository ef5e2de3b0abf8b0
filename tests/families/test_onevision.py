"""OneVision-Encoder against its arithmetic in float64, and its places in time and space."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onevision
import pytest
import reference
import torch
from click.testing import CliRunner
from onevision import KINDS
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPImageProcessorPil
from written import check_gradients

import packvit
from packvit.checkpoints.errors import CheckpointError
from packvit.cli.verify import verify
from packvit.encoder import Encoder
from packvit.verification.rule import judge

GRID: onevision.Grid = [(1, 3, 5), (7, 2, 4), (16, 1, 3), (1, 6, 1), (3, 4, 2)]
LENGTHS = [frames * rows * columns for frames, rows, columns in GRID]
HEADED = "layer norm"


def load(folder: Path, kind: str, tensors: dict[str, Tensor] | None = None, **options: Any):
    made = onevision.draw(kind) if tensors is None else tensors
    return packvit.load(onevision.write(folder / "theirs", kind, made), **options)


def named(outputs: Any) -> dict[str, Tensor]:
    taps = outputs.taps.values() if isinstance(outputs.taps, dict) else outputs.taps
    found = {f"tap {layer}": tap for layer, tap in enumerate(taps)} | {"tokens": outputs.tokens}
    return found if outputs.pooled is None else found | {"pooled": outputs.pooled}


def encode(encoder: Encoder, patches: Tensor, grid: onevision.Grid = GRID, **places: Any) -> Any:
    return encoder.encode(patches, grid, taps=range(encoder.config.layers), **places)


def misses(found: Any, theirs: Any, truth: Any, dtype: torch.dtype) -> Iterator[str]:
    """What is further from float64 than it may be, beside the formula in the same precision."""
    ours, own, exact = named(found), named(theirs), named(truth)
    assert ours.keys() == exact.keys()
    for name, output in ours.items():
        for judged in judge([output], [own[name]], [exact[name]], dtype=dtype, blocks=3):
            if not judged.passed:
                yield f"{name}: {judged}"


def choose(encoder: Encoder, patches: Tensor) -> tuple[Tensor, Tensor, onevision.Grid]:
    """A third of each clip's patches, in any order, with their places and their grid."""
    generator = torch.Generator().manual_seed(3)
    parts = zip(patches.split(LENGTHS), encoder.patch_positions(GRID).split(LENGTHS), strict=True)
    rows, places, grid = [], [], []
    for own, at in parts:
        kept = torch.randperm(len(own), generator=generator)[: len(own) // 3 + 1]
        rows.append(own[kept])
        places.append(at[kept])
        grid.append((1, 1, len(kept)))
    return torch.cat(rows), torch.cat(places), grid


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_whole_clips_equal_the_formula(tmp_path: Path, kind: str, dtype: torch.dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in onevision.draw(kind).items()}
    encoder = load(tmp_path, kind, tensors, dtype=dtype)
    patches = reference.draw_patches(GRID, 588).to(dtype)
    given = (tensors, kind, patches, onevision.places(kind, GRID), LENGTHS)
    theirs, truth = onevision.formula(*given, dtype), onevision.formula(*given)
    # Angles are of float32 in any dtype, so float64 is judged as that is.
    rule = torch.float32 if dtype == torch.float64 else dtype
    found = encode(encoder, patches)
    assert [*misses(found, theirs, truth, rule)] == []
    assert found.segment_image.tolist() == [0, 1, 2, 3, 4]
    given = encode(encoder, patches, patch_positions=encoder.patch_positions(GRID))
    assert all(torch.equal(output, named(given)[name]) for name, output in named(found).items())


@pytest.mark.parametrize("kind", KINDS)
def test_chosen_patches_equal_the_formula_of_those_alone(tmp_path: Path, kind: str):
    encoder = load(tmp_path, kind)
    assert torch.equal(encoder.patch_positions(GRID), onevision.places(kind, GRID))
    rows, places, grid = choose(encoder, reference.draw_patches(GRID, 588))
    lengths = [count for _, _, count in grid]
    truth = onevision.formula(onevision.draw(kind), kind, rows, places, lengths)
    for given in (places, places.numpy(), places.tolist(), places.to(torch.uint8)):
        found = encode(encoder, rows, grid, patch_positions=given)
        assert [*misses(found, truth, truth, torch.float32)] == []


def test_frames_may_be_numbered_as_the_authors_model_does_unasked(tmp_path: Path):
    encoder = load(tmp_path, HEADED)
    grid = [(5, 2, 3)]
    patches = reference.draw_patches(grid, 588)
    places = encoder.patch_positions(grid)
    assert places[::6, 0].tolist() == [0, 15, 31, 47, 63]
    places[:, 0] = torch.arange(5).repeat_interleave(6)
    found = encode(encoder, patches, grid, patch_positions=places)
    truth = onevision.formula(onevision.draw(HEADED), HEADED, patches, places, [30])
    assert [*misses(found, truth, truth, torch.float32)] == []


def test_a_photograph_is_a_clip_of_one_frame_and_frames_are_smaller(tmp_path: Path):
    encoder = load(tmp_path, HEADED)
    draw = np.random.default_rng(0)
    photograph = draw.integers(0, 256, (470, 530, 3), np.uint8)
    clip = draw.integers(0, 256, (4, 240, 250, 3), np.uint8)
    pack = encoder.pack([clip, photograph, list(clip[:1])])
    assert pack.grid_thw.tolist() == [[4, 16, 16], [1, 32, 32], [1, 16, 16]]
    assert encoder.patch_positions(pack.grid_thw)[: 4 * 256 : 256, 0].tolist() == [0, 21, 42, 63]
    parts = encoder.to_values(pack.hidden_states).split([256] * 4 + [1024, 256])
    for part, pixels in zip(parts, [*clip, photograph, clip[0]], strict=True):
        rows = int(len(part) ** 0.5)
        size = {"shortest_edge": rows * 14}
        processor = CLIPImageProcessorPil(size=size, crop_size=rows * 14)
        theirs = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
        assert torch.equal(reference.image(part, rows, rows, 14), theirs)


@pytest.mark.parametrize(
    ("places", "kind", "message"),
    [
        (torch.zeros(5, 2, dtype=torch.long), ValueError, r"is \[5, 2\], but must be \[6, 3\]"),
        (torch.zeros(1, 6, 3, dtype=torch.long), ValueError, r"is \[1, 6, 3\], .* \[6, 3\]"),
        (torch.zeros(6, 3), ValueError, r"holds torch.float32, but must hold integers"),
        (torch.zeros(6, 3, dtype=torch.bool), ValueError, r"holds torch.bool, .* integers"),
        ([[0, 0, 0]] * 5 + [[0, 0]], TypeError, r"must be a tensor, an array or a list"),
        (torch.tensor([[0, 0, 0]] * 5 + [[0, -1, 0]]), ValueError, r"\[5\] is \(0, -1, 0\), .* 0"),
        (torch.tensor([[63, 0, 0]] * 4 + [[64, 9, 9]] * 2), ValueError, r"\[4\].*end at 63"),
    ],
)
def test_places_that_there_are_not_are_refused_in_a_sentence(
    tmp_path: Path, places: Any, kind: type[Exception], message: str
):
    encoder = load(tmp_path, HEADED)
    with pytest.raises(kind, match=rf"^patch_positions.*{message}"):
        encoder.encode(torch.zeros(6, 588), [(1, 2, 3)], patch_positions=places)


def test_an_encoder_without_times_refuses_places():
    encoder = packvit.load("tiny", device="cpu")
    message = r"patch_positions .* this AIMv2 checkpoint takes from grid_thw alone\. Leave it out"
    places = torch.zeros(6, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        encoder.encode(torch.zeros(6, 588), [(1, 2, 3)], patch_positions=places)
    with pytest.raises(ValueError, match=message):
        encoder.patch_positions([(1, 2, 3)])


@pytest.mark.parametrize("kind", KINDS)
def test_another_first_clip_changes_no_bit_of_the_rest(tmp_path: Path, kind: str):
    encoder = load(tmp_path, kind)
    rows, places, grid = choose(encoder, reference.draw_patches(GRID, 588))
    first = grid[0][2]
    before = named(encode(encoder, rows, grid, patch_positions=places))
    rows[:first], places[:first] = torch.nan, 1
    after = named(encode(encoder, rows, grid, patch_positions=places))
    for name, output in before.items():
        kept = 1 if name == "pooled" else first
        assert torch.equal(after[name][kept:], output[kept:]), name
        assert after[name][:kept].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_is_written_back_bit_for_bit(tmp_path: Path, kind: str, dtype: torch.dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in onevision.draw(kind).items()}
    encoder = load(tmp_path, kind, tensors, dtype=dtype)
    encoder.save_pretrained(tmp_path / "ours")
    after = load_file(tmp_path / "ours" / "model.safetensors")
    assert after.keys() == tensors.keys()
    assert all(torch.equal(after[name], tensors[name]) for name in tensors)
    again = packvit.load(tmp_path / "ours")
    assert (again.config, again.images) == (encoder.config, encoder.images)
    encoder.origin = None  # as one that was not loaded is written
    encoder.save_pretrained(tmp_path / "anew")
    written = json.loads((tmp_path / "anew" / "config.json").read_text())
    assert onevision.SIZES | KINDS[kind] == {name: written[name] for name in onevision.SIZES}


@pytest.mark.parametrize(
    "changes",
    [{"num_attention_heads": 8}, {"layer_norm_type": "batch_norm"}, {"rope_temporal_size": 0}],
)
def test_configurations_that_we_do_not_know_are_refused(tmp_path: Path, changes: dict[str, Any]):
    folder = onevision.write(tmp_path / "theirs", HEADED, onevision.draw(HEADED), **changes)
    with pytest.raises(CheckpointError, match=r"config\.json says"):
        packvit.load(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_every_gradient_equals_the_formulas(tmp_path: Path, kind: str):
    plain = {name: tensor.double() for name, tensor in onevision.draw(kind).items()}
    tensors = {name: tensor.clone().requires_grad_() for name, tensor in plain.items()}
    encoder = load(tmp_path, kind, plain, dtype=torch.float64)
    rows, places, grid = choose(encoder, reference.draw_patches(GRID, 588).double())
    ours = named(encode(encoder, rows, grid, patch_positions=places))
    lengths = [count for _, _, count in grid]
    theirs = named(onevision.formula(tensors, kind, rows, places, lengths))
    check_gradients(encoder, ours, theirs, tensors, tmp_path / "gradients")


def test_verify_says_where_it_is_verified(tmp_path: Path):
    found = CliRunner().invoke(verify, ["--family", "onevision"])
    assert found.exit_code == 2
    assert "verified beside its arithmetic in float64, in our tests" in found.stderr
    folder = onevision.write(tmp_path / "theirs", HEADED, onevision.draw(HEADED))
    found = CliRunner().invoke(verify, ["--model", str(folder), "--quick"])
    assert found.exit_code == 1
    assert "verified beside its arithmetic in float64, in our tests" in found.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", "torch"])
def test_a_graph_is_replayed_by_the_places_of_each_pack(tmp_path: Path, attention: str):
    tensors = {name: tensor.bfloat16() for name, tensor in onevision.draw(HEADED).items()}
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16, "attention": attention}
    encoder = load(tmp_path, HEADED, tensors, **options)
    patches = reference.draw_patches(GRID, 588).bfloat16()
    places = encoder.patch_positions(GRID)
    orders = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for round_ in range(4):  # the third and the fourth are replayed, where there are graphs
            at = places[torch.randperm(len(places), generator=orders)] if round_ else places
            given = None if round_ == 3 else at
            at = places if round_ == 3 else at
            found = encode(encoder, patches.cuda(), patch_positions=given)
            both = (tensors, HEADED, patches, at, LENGTHS)
            theirs, truth = onevision.formula(*both, torch.bfloat16), onevision.formula(*both)
            assert [*misses(found, theirs, truth, torch.bfloat16)] == []


@pytest.mark.gpu
def test_fused_blocks_train_as_the_plain_ones_with_chosen_patches(tmp_path: Path):
    grads = []
    for fused in (True, False):
        encoder = load(tmp_path, HEADED, device="cuda", dtype=torch.bfloat16).train()
        if not fused:
            encoder.fast = None
        rows, places, grid = choose(encoder, reference.draw_patches(GRID, 588))
        found = encode(encoder, rows.cuda().bfloat16(), grid, patch_positions=places)
        (found.tokens.float().square().mean() + found.pooled.float().square().mean()).backward()
        grads.append({name: p.grad for name, p in encoder.named_parameters()})
    for name, grad in grads[1].items():
        assert (grads[0][name].float() - grad.float()).norm() <= 0.05 * grad.float().norm(), name


@pytest.mark.gpu
def test_places_on_the_host_wait_for_no_device(tmp_path: Path):
    encoder = load(tmp_path, HEADED, device="cuda", dtype=torch.bfloat16)
    rows, places, grid = choose(encoder, reference.draw_patches(GRID, 588))
    rows = rows.cuda()
    encode(encoder, rows, grid, patch_positions=places)  # kernels are loaded on first use
    torch.cuda.set_sync_debug_mode("error")
    try:
        encode(encoder, rows, grid, patch_positions=places)
    finally:
        torch.cuda.set_sync_debug_mode("default")
