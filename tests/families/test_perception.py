"""Perception Encoder against its formula in float64, and against timm where it is installed."""

import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import perception
import pytest
import reference
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from written import check_gradients

import packvit
from packvit.checkpoints.errors import CheckpointError
from packvit.cli.verify import verify
from packvit.config import AxialRotary, Table
from packvit.encoder import Encoder
from packvit.packs.features import Features
from packvit.verification import VerifyOptions
from packvit.verification.rule import judge
from packvit.verification.verify import verify as verify_encoder

KINDS = tuple(perception.KINDS)
OWN: perception.Grid = [(1, 5, 5), (3, 5, 5), (1, 5, 5)]
ODD: perception.Grid = [(1, 1, 23), (1, 19, 1), (1, 3, 17), (2, 4, 6), (1, 5, 5), (1, 1, 1)]
needs_timm = pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")


def encode(encoder: Encoder, patches: Tensor, grid: perception.Grid) -> Features:
    projected = encoder.projection is not None
    return encoder.encode(patches, grid, taps=range(encoder.config.layers), projected=projected)


def stacked(rows: list[Tensor | None]) -> Tensor | None:
    kept = [row for row in rows if row is not None]
    return torch.stack(kept) if kept else None


def named(outputs: Any) -> dict[str, Tensor]:
    taps = outputs.taps.values() if isinstance(outputs.taps, dict) else outputs.taps
    found = {f"tap {layer}": tap for layer, tap in enumerate(taps)}
    for kind in ("tokens", "prefix", "pooled", "projected"):
        if getattr(outputs, kind) is not None:
            found[kind] = getattr(outputs, kind)
    return found


def misses(found: Features, theirs: Any, truth: Any, dtype: torch.dtype) -> Iterator[str]:
    """What is further from float64 than it may be, beside a reference in the same precision."""
    ours, exact = named(found), named(truth)
    own = exact if theirs is None else named(theirs)
    assert ours.keys() == exact.keys() == own.keys()
    for name, output in ours.items():
        for judged in judge([output], [own[name]], [exact[name]], dtype=dtype, blocks=3):
            if not judged.passed:
                yield f"{name}: {judged}"


@pytest.mark.parametrize("kind", KINDS)
def test_every_output_equals_the_formula(tmp_path: Path, kind: str):
    tensors = perception.draw(kind)
    encoder = packvit.load(perception.write(tmp_path / "timm", kind, tensors))
    patches = reference.draw_patches(OWN, 588)
    truth = perception.formula(tensors, kind, patches, OWN)
    assert [*misses(encode(encoder, patches, OWN), None, truth, torch.float32)] == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_grids_are_refused_or_resized_as_the_authors_do(
    tmp_path: Path, kind: str, dtype: torch.dtype
):
    tensors = perception.draw(kind, seed=1)
    folder = perception.write(tmp_path / "timm", kind, tensors)
    patches = reference.draw_patches(ODD, 588)
    with pytest.raises(ValueError, match=r"Image 0 is 1 x 23 patches.*5 x 5 alone"):
        packvit.load(folder)(patches, ODD)
    encoder = packvit.load(folder, positions="interpolate", dtype=dtype)
    truth = perception.formula(tensors, kind, patches, ODD)
    # Angles are of float32 in any dtype, so float64 is judged as that is.
    assert [*misses(encode(encoder, patches, ODD), None, truth, torch.float32)] == []


@needs_timm
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_output_equals_timms(tmp_path: Path, kind: str, dtype: torch.dtype):
    tensors = {name: x.to(dtype) for name, x in perception.draw(kind, seed=2).items()}
    folder = perception.write(tmp_path / "timm", kind, tensors)
    model = perception.timm_model(kind, folder).to(dtype)
    encoder = packvit.load(folder, dtype=dtype)
    grid: perception.Grid = [(1, 5, 5)] * 12
    patches = reference.draw_patches(grid, 588).to(dtype)
    each = [perception.run_timm(model, part, 5, 5, 14) for part in patches.split(25)]
    theirs = perception.Outputs(
        torch.cat([one.tokens for one in each]),
        [torch.cat(layer) for layer in zip(*(one.taps for one in each), strict=True)],
        torch.stack([one.prefix for one in each]),
        stacked([one.pooled for one in each]),
        stacked([one.projected for one in each]),
    )
    truth = perception.formula(tensors, kind, patches, grid)
    assert [*misses(encode(encoder, patches, grid), theirs, truth, dtype)] == []


@needs_timm
@pytest.mark.parametrize("kind", KINDS)
def test_timm_reads_what_we_write(tmp_path: Path, kind: str):
    folder = perception.write(tmp_path / "timm", kind, perception.draw(kind))
    packvit.load(folder).save_pretrained(tmp_path / "ours")
    ours, theirs = (perception.timm_model(kind, tmp_path / name) for name in ("ours", "timm"))
    patches = reference.draw_patches([(1, 5, 5)], 588)
    found, expected = (perception.run_timm(model, patches, 5, 5, 14) for model in (ours, theirs))
    assert torch.equal(found.tokens, expected.tokens)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_is_written_back_bit_for_bit(tmp_path: Path, kind: str, dtype: torch.dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in perception.draw(kind).items()}
    folder = perception.write(tmp_path / "timm", kind, tensors)
    packvit.load(folder, dtype=dtype).save_pretrained(tmp_path / "ours")
    after = load_file(tmp_path / "ours" / "model.safetensors")
    assert after.keys() == tensors.keys()
    assert all(torch.equal(after[name], tensors[name]) for name in tensors)
    before, written = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("timm", "ours")
    )
    written.pop("dtype")
    assert written.pop("global_pool") == ("map" if kind.startswith("core") else "avg")
    assert written["pretrained_cfg"] == before["pretrained_cfg"]
    assert packvit.load(tmp_path / "ours").config == packvit.load(folder).config


@pytest.mark.parametrize("name", packvit.PerceptionPacking.family.model_types)
def test_every_published_architecture_survives_by_its_name(name: str):
    [layout] = packvit.PerceptionPacking.family.layouts
    config = layout.read({"architecture": name, "num_classes": 0}, ())
    written = layout.write(config)
    assert written["architecture"] == name
    assert "model_args" not in written
    assert layout.read(written, ()) == config


@needs_timm
@pytest.mark.parametrize("name", packvit.PerceptionPacking.family.model_types)
def test_every_published_architecture_is_timms(name: str):
    import timm  # pyright: ignore[reportMissingImports]

    with torch.device("meta"):
        model = timm.create_model(name)
        [layout] = packvit.PerceptionPacking.family.layouts
        config = layout.read(
            {"architecture": name, "num_classes": model.pretrained_cfg["num_classes"]}, ()
        )
        encoder = packvit.PerceptionPacking(config, packvit.PerceptionPacking.family.images(config))
    counted = sum(parameter.numel() for parameter in encoder.parameters())
    assert counted == sum(parameter.numel() for parameter in model.parameters())
    assert isinstance(config.rotary, AxialRotary)
    assert isinstance(config.positions, Table)
    assert model.rope.grid_offset == config.rotary.offset
    assert [*model.patch_embed.grid_size] == [config.positions.rows] * 2
    assert config.heads == model.blocks[0].attn.num_heads


@pytest.mark.parametrize(
    "changes",
    [{"ref_feat_shape": [24, 24]}, {"rope_type": "dinov3"}, {"global_pool": "token"}],
)
def test_arguments_of_no_published_checkpoint_are_refused(tmp_path: Path, changes: dict[str, Any]):
    folder = perception.write(tmp_path / "timm", "core", perception.draw("core"), **changes)
    with pytest.raises(CheckpointError, match="packvit knows"):
        packvit.load(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_of_nan_keep_every_bit(tmp_path: Path, kind: str):
    encoder = packvit.load(perception.write(tmp_path / "timm", kind, perception.draw(kind)))
    patches = reference.draw_patches(OWN, 588)
    before = named(encode(encoder, patches, OWN))
    patches[:25] = torch.nan
    after = named(encode(encoder, patches, OWN))
    for name, output in before.items():
        first = 25 if len(output) == len(patches) else 1
        assert torch.equal(after[name][first:], output[first:]), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_gradient_equals_the_formulas(tmp_path: Path, kind: str):
    tensors = {name: x.double().requires_grad_() for name, x in perception.draw(kind).items()}
    plain = {name: tensor.detach() for name, tensor in tensors.items()}
    folder = perception.write(tmp_path / "timm", kind, plain)
    encoder = packvit.load(folder, dtype=torch.float64)
    patches = reference.draw_patches(OWN, 588).double()
    ours = named(encode(encoder, patches, OWN))
    theirs = named(perception.formula(tensors, kind, patches, OWN))
    check_gradients(encoder, ours, theirs, tensors, tmp_path / "gradients")


@needs_timm
@pytest.mark.parametrize("size", [(61, 87), (96, 70), (300, 77), (70, 70), (70, 73), (77, 70)])
def test_pixels_are_timms(tmp_path: Path, size: tuple[int, int]):
    import timm.data  # pyright: ignore[reportMissingImports]

    folder = perception.write(tmp_path / "timm", "core", perception.draw("core"))
    encoder = packvit.load(folder)
    settings = timm.data.resolve_data_config(model=perception.timm_model("core", folder))
    transform: Any = timm.data.create_transform(**settings)
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    pack = encoder.pack([noise])
    ours = reference.image(encoder.to_values(pack.hidden_states), 5, 5, 14)
    assert torch.equal(ours[0], transform(Image.fromarray(noise)))


def test_verify_says_what_to_install_where_timm_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "timm", None)
    folder = perception.write(tmp_path / "timm", "lang", perception.draw("lang"))
    for words in (["--family", "perception"], ["--model", str(folder)]):
        found = CliRunner().invoke(verify, [*words, "--quick"])
        assert found.exit_code == 1
        assert found.stderr == (
            "Error: Verification of this family compares with timm, which is not installed: "
            "pip install 'packvit[bench]'\n"
        )


@needs_timm
@pytest.mark.parametrize("kind", ["core", "spatial, no class token"])
def test_a_mistake_is_caught_beside_timm(tmp_path: Path, kind: str):
    folder = perception.write(tmp_path / "timm", kind, perception.draw(kind))
    encoder = packvit.load(folder, device="cpu")
    right = verify_encoder(encoder, VerifyOptions(quick=True, lower=()))
    assert right.missed == ()
    assert right.reference.startswith("timm ")
    encoder.embeddings.positions.data.mul_(1.001)
    wrong = verify_encoder(encoder, VerifyOptions(quick=True, lower=()))
    assert {"tokens", "taps"} <= {row.what for row in wrong.missed}


@needs_timm
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_timms_in_memory_is_taken_over(tmp_path: Path, kind: str):
    folder = perception.write(tmp_path / "timm", kind, perception.draw(kind))
    taken = packvit.PerceptionPacking.from_transformers(perception.timm_model(kind, folder))
    loaded = packvit.load(folder, device="cpu")
    assert taken.config == loaded.config
    for ours, theirs in zip(taken.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@needs_timm
@pytest.mark.parametrize("kind", KINDS)
def test_what_timm_saves_is_read_and_written_so_that_timm_reads_it(tmp_path: Path, kind: str):
    from timm.models import save_for_hf  # pyright: ignore[reportMissingImports]

    folder = perception.write(tmp_path / "timm", kind, perception.draw(kind))
    model = perception.timm_model(kind, folder)
    save_for_hf(model, str(tmp_path / "theirs"), safe_serialization=True)
    packvit.load(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    again = perception.timm_model(kind, tmp_path / "ours")
    assert str(again) == str(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_photographs_are_embedded_by_either_vector(tmp_path: Path):
    images = [Image.effect_noise((side, 96), 90).convert("RGB") for side in (64, 160)]
    core = packvit.load(perception.write(tmp_path / "core", "core", perception.draw("core")))
    lang = packvit.load(perception.write(tmp_path / "lang", "lang", perception.draw("lang")))
    assert core.text_space == "projected"
    found = core.encode(core.pack(images), projected=True)
    assert found.projected is not None
    expected = found.projected.detach().numpy()
    np.testing.assert_allclose(core.embed(images, projected=True), expected, atol=1e-5)
    tokens = lang(*lang.pack(images)).detach().unflatten(0, (2, -1)).mean(1)
    np.testing.assert_allclose(lang.embed(images), tokens.numpy(), atol=1e-5)
