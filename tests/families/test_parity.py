"""Every family against transformers, image by image, on weights and grids drawn at random."""

import copy
import pickle
from pathlib import Path
from typing import Any

import judged
import pytest
import reference
import torch
from safetensors.torch import load_file, save_file
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

import packvit
from packvit.checkpoints.errors import CheckpointError
from packvit.checkpoints.image_settings import image_config_from
from packvit.config import Exact, GridPolicy, ImageConfig, Table
from packvit.encoder import Encoder
from packvit.families import FAMILIES

ODD = [(1, 1, 1), (1, 1, 23), (1, 19, 1), (1, 3, 17), (2, 4, 6), (1, 5, 5), (1, 17, 3)]
OWN = [(1, 5, 5), (3, 5, 5), (1, 5, 5)]
DINOV3 = ("dinov3", "dinov3, no registers", "dinov3, gated")
RADIO = ("radio", "radio, swiglu")
TIPS = ("tipsv2", "tipsv2, swiglu")
ANY_GRID = ("siglip2", "dinov2", "dinov2, swiglu", "dinov2, registers", *DINOV3, *RADIO, *TIPS)
ONE_GRID = ("siglip", "clip", "clip, projected")  # their references refuse others, unless asked
KINDS = (*ANY_GRID, *ONE_GRID)


def loaded(tmp_path: Path, model: Any, positions: GridPolicy = "checkpoint") -> Encoder:
    model.save_pretrained(tmp_path / "model")
    return packvit.load(tmp_path / "model", positions=positions)


def compare(encoder: Encoder, model: Any, grid: list[tuple[int, int, int]], **options: Any) -> None:
    patches = reference.draw_patches(grid, encoder.config.patch_dim)
    layers, projected = range(encoder.config.layers), encoder.projection is not None
    found = encoder.encode(patches, torch.tensor(grid), taps=layers, projected=projected)
    assert judged.misses(found, model, patches, grid, **options) == []


@pytest.mark.parametrize("kind", ANY_GRID)
def test_any_grid_equals_the_reference(tmp_path: Path, kind: str):
    model = reference.build(kind)
    compare(loaded(tmp_path, model), model, ODD)


@pytest.mark.parametrize("kind", ONE_GRID)
def test_the_own_grid_equals_the_reference(tmp_path: Path, kind: str):
    model = reference.build(kind)
    compare(loaded(tmp_path, model), model, OWN)


@pytest.mark.parametrize("kind", ONE_GRID)
def test_another_grid_is_refused_or_interpolated_as_the_reference_does(tmp_path: Path, kind: str):
    model = reference.build(kind)
    encoder = loaded(tmp_path, model)
    patches = reference.draw_patches(ODD, encoder.config.patch_dim)
    with pytest.raises(ValueError, match=r"Image 0 is 1 x 1 patches, .* 5 x 5 alone"):
        encoder(patches, torch.tensor(ODD))
    bent = packvit.load(tmp_path / "model", positions="interpolate")
    compare(bent, model, ODD, interpolate_pos_encoding=True)


@pytest.mark.parametrize("images", [1, 64])
@pytest.mark.parametrize("kind", ["siglip2", "dinov3", "dinov2, registers"])
def test_any_number_of_images_equals_the_reference(tmp_path: Path, kind: str, images: int):
    model = reference.build(kind, seed=images)
    generator = torch.Generator().manual_seed(images)
    sides = torch.randint(1, 9, (images, 2), generator=generator).tolist()
    compare(loaded(tmp_path, model), model, [(1, *pair) for pair in sides])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", [*RADIO, *TIPS])
def test_other_dtypes_are_as_exact_as_the_reference(tmp_path: Path, kind: str, dtype: torch.dtype):
    model = reference.build(kind, hidden_size=128).to(dtype)
    model.save_pretrained(tmp_path)
    encoder = packvit.load(tmp_path, dtype=dtype)
    compare(encoder, model, [(1, rows, columns) for rows in range(1, 7) for columns in (2, 5, 9)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_in_memory_is_taken_over(kind: str):
    model = reference.build(kind)
    for encoder in FAMILIES:
        if encoder.family.claims(model.config.to_dict()):
            compare(encoder.from_transformers(model), model, OWN)
            return
    pytest.fail(f"no family claims {kind}")


def build_with_our_names(kind: str) -> Any:
    """A model whose tensors this version of transformers names as we write them, or skip."""
    model = reference.build(kind)
    if kind == "radio, swiglu" and not any("gate_proj" in name for name in model.state_dict()):
        pytest.skip("we write the names of a later transformers than this one, which it lacks")
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_what_we_write_bit_for_bit(tmp_path: Path, kind: str):
    model = build_with_our_names(kind)
    loaded(tmp_path, model).save_pretrained(tmp_path / "ours")
    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("model", "ours"))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    again, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    ours, theirs = again.config.to_dict(), model.config.to_dict()
    same = {"hidden_size", "patch_size", "num_hidden_layers", "layer_norm_eps"}
    if isinstance(packvit.load(tmp_path / "ours").config.positions, Table):
        same.add("image_size")  # rotary positions know no size of their own
    same |= {"mlp_ratio", "use_swiglu_ffn", "qkv_bias", "num_register_tokens", "max_img_size"}
    same |= {"num_cls_tokens", "num_registers", "summary_idxs", "norm_mean", "norm_std"}
    assert all(ours[name] == theirs[name] for name in same & theirs.keys())
    compare(packvit.load(tmp_path / "ours"), again.eval(), OWN)


@pytest.mark.parametrize("kind", ["siglip2", "siglip", "clip"])
def test_a_tower_beside_a_text_tower_is_read_and_the_rest_skipped(tmp_path: Path, kind: str):
    model = reference.build(kind)
    encoder = loaded(tmp_path, model)
    path = tmp_path / "model" / "model.safetensors"
    tensors = {f"vision_model.{name}": tensor for name, tensor in load_file(path).items()}
    save_file(tensors | {"text_model.x": torch.ones(2), "logit_scale": torch.ones(1)}, path)
    both = packvit.load(tmp_path / "model")
    patches = reference.draw_patches(OWN, encoder.config.patch_dim)
    assert torch.equal(both(patches, torch.tensor(OWN)), encoder(patches, torch.tensor(OWN)))
    save_file(tensors | {"audio_model.x": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"unexpected: audio_model\.x"):
        packvit.load(tmp_path / "model")


@pytest.mark.parametrize("kind", DINOV3)
def test_dinov3_is_read_under_both_names_of_its_blocks(tmp_path: Path, kind: str):
    model = reference.build(kind)
    encoder = loaded(tmp_path, model)
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    assert "layer.0.norm1.weight" in tensors
    renamed = {
        n.replace("layer.", "model.layer.", n.startswith("layer.")): t for n, t in tensors.items()
    }
    save_file(renamed, path)
    other = packvit.load(tmp_path / "model")
    assert all(
        torch.equal(a, b) for a, b in zip(encoder.parameters(), other.parameters(), strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_prefix_and_neighbours_keep_apart(tmp_path: Path, kind: str):
    encoder = loaded(tmp_path, reference.build(kind))
    grid = OWN if kind in ONE_GRID else ODD
    frames = [rows * columns for count, rows, columns in grid for _ in range(count)]
    patches = reference.draw_patches(grid, encoder.config.patch_dim)
    before = encoder.encode(patches, torch.tensor(grid), taps=(1,))
    patches[: frames[0]] = float("nan")
    after = encoder.encode(patches, torch.tensor(grid), taps=(1,))
    rest = slice(frames[0], None)
    assert torch.equal(before.tokens[rest], after.tokens[rest])
    assert torch.equal(before.taps[1][rest], after.taps[1][rest])
    assert torch.equal(before.prefix[1:], after.prefix[1:])
    assert before.pooled is not None
    assert after.pooled is not None
    assert torch.equal(before.pooled[1:], after.pooled[1:])
    assert after.pooled[0].isnan().any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("device", "attention"),
    [
        ("cpu", "sdpa"),
        pytest.param("cuda", "sdpa", marks=pytest.mark.gpu),
        pytest.param("cuda", "torch", marks=pytest.mark.gpu),
    ],
)
def test_bf16_is_as_close_to_the_fp32_reference_as_the_bf16_reference(
    tmp_path: Path, kind: str, device: str, attention: str
):
    model = reference.build(kind, hidden_size=256, num_attention_heads=4).to(device)
    patches = reference.draw_patches(OWN, model.config.patch_size**2 * 3).to(device)
    folder = loaded_folder(tmp_path, model)
    encoder = packvit.load(folder, device=device, dtype=torch.bfloat16, attention=attention)
    layers = range(encoder.config.layers)
    projected = encoder.projection is not None
    found = encoder.encode(patches.bfloat16(), torch.tensor(OWN), taps=layers, projected=projected)
    assert judged.misses(found, model.bfloat16(), patches, OWN) == []


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_fp32_on_the_gpu_equals_the_reference(tmp_path: Path, kind: str):
    model = reference.build(kind).to("cuda")
    grid = OWN if kind in ONE_GRID else ODD
    encoder = packvit.load(loaded_folder(tmp_path, model), device="cuda", dtype=torch.float32)
    patches = reference.draw_patches(grid, encoder.config.patch_dim).to("cuda")
    projected = encoder.projection is not None
    found = encoder.encode(patches, torch.tensor(grid), projected=projected)
    assert judged.misses(found, model, patches, grid) == []


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_no_family_waits_for_the_device(tmp_path: Path, kind: str):
    folder = loaded_folder(tmp_path, reference.build(kind))
    encoder = packvit.load(folder, device="cuda", dtype=torch.bfloat16)
    grid = torch.tensor(OWN if kind in ONE_GRID else ODD)
    tokens = int(grid.prod(1).sum())
    patches = torch.zeros(tokens, encoder.config.patch_dim, dtype=torch.uint8, device="cuda")
    encoder.encode(patches, grid, taps=(0,))  # kernels are loaded on first use
    torch.cuda.set_sync_debug_mode("error")
    try:
        encoder.encode(patches, grid, taps=(0,))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def loaded_folder(tmp_path: Path, model: Any) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_carried_unused_survives_a_round_trip(tmp_path: Path, kind: str):
    model = build_with_our_names(kind)
    encoder = loaded(tmp_path, model)
    masked = kind.split(",")[0] in ("dinov2", "dinov3", "tipsv2")
    labels = ({"mask_token"} if masked else set()) | (
        {"registers"} if kind == "dinov3, no registers" else set()
    )
    labels |= {"summary_idxs", "norm_mean", "norm_std"} if kind in RADIO else set()
    if not isinstance(encoder.config.positions, Table) or kind in ONE_GRID:
        path = tmp_path / "model" / "model.safetensors"
        tensors = load_file(path)
        if kind in ONE_GRID:
            prefix = "vision_model." if kind.endswith("projected") else ""
            tensors[f"{prefix}embeddings.position_ids"] = torch.arange(25)[None]
            save_file(tensors, path)
            labels = {"position_ids"}
    again = packvit.load(tmp_path / "model")
    assert set(again.carried) == labels
    again.save_pretrained(tmp_path / "ours")
    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("model", "ours"))
    assert all(torch.equal(before[name], after[name]) for name in before | after)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_one_family_is_refused_by_all_others(tmp_path: Path, kind: str):
    folder = loaded_folder(tmp_path, reference.build(kind))
    own = type(packvit.load(folder))
    for encoder in FAMILIES:
        if encoder is not own:
            with pytest.raises(
                CheckpointError, match=f"but {encoder.family.name} is .*packvit.load"
            ):
                encoder.from_pretrained(folder)


def test_every_published_checkpoint_belongs_to_one_family():
    names = [name for encoder in FAMILIES for name in encoder.family.checkpoints]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_config_leaves_out_is_its_class_default(kind: str):
    config = reference.KINDS[kind][1]()
    whole = config.to_dict()
    [family] = [e.family for e in FAMILIES if e.family.claims(whole)]
    # Names tell of heads alone here; every layout of a family reads config.json alike.
    read = family.layouts[0].read
    least = {"model_type": whole["model_type"]}
    assert read(least, {"head.probe"}) == read(whole, {"head.probe"})


@pytest.mark.parametrize(
    ("kind", "processor"),
    [
        ("clip", CLIPImageProcessorPil),
        ("siglip", SiglipImageProcessorPil),
        ("siglip2", Siglip2ImageProcessorPil),
    ],
)
def test_preprocessing_left_out_is_the_processors_default(kind: str, processor: Any):
    whole = reference.KINDS[kind][1]().to_dict()
    [family] = [e.family for e in FAMILIES if e.family.claims(whole)]
    images = family.images(family.layouts[0].read(whole, {"head.probe"}))
    # Every entry must be read, so none may be right before.
    nonsense = ImageConfig(images.patch, (9.0, 9.0, 9.0), (9.0, 9.0, 9.0), "box", Exact(9, 9))
    assert image_config_from(processor().to_dict(), nonsense) == images


@pytest.mark.parametrize("kind", ["siglip2", "dinov2"])
def test_a_resized_table_follows_the_encoder_wherever_it_goes(tmp_path: Path, kind: str):
    encoder = loaded(tmp_path, reference.build(kind))
    patches, grid = reference.draw_patches(ODD, encoder.config.patch_dim), torch.tensor(ODD)
    fresh = copy.deepcopy(encoder)
    with torch.inference_mode():
        before = encoder(patches, grid)
        assert encoder.bfloat16()(patches, grid).dtype == torch.bfloat16
        encoder.float()
    encoder.load_state_dict(fresh.state_dict(), assign=True)
    with torch.no_grad():
        assert torch.equal(encoder(patches, grid), before)
        encoder.embeddings.positions.data = encoder.embeddings.positions.data * 2
        moved = encoder(patches, grid)
        assert not torch.equal(moved, before)
        encoder.embeddings.positions.data.div_(2)  # leaves no trace, until the mode is set
        assert torch.equal(encoder.eval()(patches, grid), before)
    again = pickle.loads(pickle.dumps(fresh))
    assert torch.equal(again(patches, grid), fresh(patches, grid))


@pytest.mark.parametrize("kind", ["siglip2", "dinov2, registers"])
def test_what_is_validated_between_steps_has_the_positions_of_now(tmp_path: Path, kind: str):
    encoder = loaded(tmp_path, reference.build(kind))
    patches, grid = reference.draw_patches(ODD, encoder.config.patch_dim), torch.tensor(ODD)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.1, fused=True)  # raises no version
    for _ in range(2):
        with torch.no_grad():
            encoder(patches, grid)
        encoder(patches, grid).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            found = encoder(patches, grid)
            assert torch.equal(found, copy.deepcopy(encoder)(patches, grid))


def test_a_gated_mlp_of_another_ratio_survives_a_round_trip(tmp_path: Path):
    model = reference.build("dinov2, swiglu", mlp_ratio=2)
    loaded(tmp_path, model).save_pretrained(tmp_path / "ours")
    compare(packvit.load(tmp_path / "ours"), model, OWN)
