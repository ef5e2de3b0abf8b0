"""The towers of multimodal models against transformers, on weights and grids drawn at random."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
import towers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLForConditionalGeneration
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLForConditionalGeneration

import packvit
from packvit import hub
from packvit.checkpoints.errors import CheckpointError
from packvit.corpus.folder.checking import check_folder
from packvit.encoder import Encoder
from packvit.families import FAMILIES
from packvit.packs.features import Features, image_means
from packvit.pictures.draw import draw as draw_pictures
from packvit.training.blocks import checkpoint_activations
from packvit.verification import VerifyOptions
from packvit.verification.verify import verify_checkpoint

KINDS = tuple(towers.KINDS)
GRID: towers.Grid = [(1, 2, 46), (1, 38, 2), (3, 4, 6), (1, 2, 2), (1, 6, 34), (1, 14, 14)]


def saved(tmp_path: Path, model: Any) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def encode(encoder: Encoder, patches: Tensor, grid: towers.Grid = GRID) -> Features:
    layers = range(encoder.config.layers)
    return encoder.encode(patches, torch.tensor(grid), taps=layers, merged=True)


def draw(encoder: Encoder, grid: towers.Grid = GRID) -> Tensor:
    return reference.draw_patches(grid, encoder.config.patch_dim)


@pytest.mark.parametrize("kind", KINDS)
def test_every_output_equals_the_towers(tmp_path: Path, kind: str):
    model = towers.build(kind)
    encoder = packvit.load(saved(tmp_path, model))
    patches = draw(encoder)
    assert towers.misses(encode(encoder, patches), model, patches, GRID) == []


UNUSUAL: list[tuple[str, dict[str, Any]]] = [
    ("qwen3_vl", {"deepstack_visual_indexes": [2, 0]}),  # mergers stand in the order of the list
    ("qwen3_vl", {"deepstack_visual_indexes": []}),
    ("qwen3_vl", {"num_position_embeddings": 1}),
    ("qwen2_5_vl", {"window_size": 100}),  # of no whole squares
    ("qwen2_5_vl", {"window_size": 28, "fullatt_block_indexes": []}),
]


@pytest.mark.parametrize(("kind", "changes"), UNUSUAL)
def test_unusual_configurations_equal_the_tower(tmp_path: Path, kind: str, changes: dict[str, Any]):
    model = towers.build(kind, **changes)
    encoder = packvit.load(saved(tmp_path, model))
    patches = draw(encoder)
    found = encode(encoder, patches)
    assert towers.misses(found, model, patches, GRID) == []
    assert list(found.deepstack) == sorted(changes.get("deepstack_visual_indexes", found.deepstack))


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("qwen3_vl", {"deepstack_visual_indexes": [0, 0]}, "must name layers below 3, each once"),
    ("qwen3_vl", {"deepstack_visual_indexes": [0, 3]}, "must name layers below 3, each once"),
    ("qwen3_vl", {"rope_parameters": {"rope_theta": 0}}, "rope_theta.*must be above 0"),
    ("qwen2_5_vl", {"window_size": 27}, '"window_size": 27, but a window holds.*28 pixels'),
]


@pytest.mark.parametrize(("kind", "changes", "message"), WRONG)
def test_configurations_that_no_tower_can_have_are_refused(
    tmp_path: Path, kind: str, changes: dict[str, Any], message: str
):
    folder = saved(tmp_path, towers.build(kind))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match=message):
        packvit.load(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [1, 2])
def test_any_grid_equals_the_tower(tmp_path: Path, kind: str, seed: int):
    model = towers.build(kind, seed)
    encoder = packvit.load(saved(tmp_path, model))
    generator = torch.Generator().manual_seed(seed)
    sides = torch.randint(1, 13, (12, 2), generator=generator).tolist()
    grid = [(1 + place % 2, 2 * rows, 2 * columns) for place, (rows, columns) in enumerate(sides)]
    patches = draw(encoder, grid)
    assert towers.misses(encode(encoder, patches, grid), model, patches, grid) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_as_exact_as_the_towers(tmp_path: Path, kind: str, dtype: torch.dtype):
    model = towers.build(kind, hidden_size=128).to(dtype)
    encoder = packvit.load(saved(tmp_path, model), dtype=dtype)
    patches = draw(encoder).to(dtype)
    exactness = torch.float32 if dtype == torch.float64 else None
    assert towers.misses(encode(encoder, patches), model, patches, GRID, exactness) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["hwc", "chw"])
def test_patches_of_two_frames_equal_the_towers(tmp_path: Path, kind: str, order: Any):
    model = towers.build(kind)
    encoder = packvit.load(saved(tmp_path, model), patch_order=order)
    patches = reference.draw_patches(GRID, 2 * encoder.config.patch_dim)
    given = patches if order == "hwc" else patches.unflatten(1, (-1, 3)).transpose(1, 2).flatten(1)
    assert towers.misses(encode(encoder, given), model, patches, GRID) == []


def test_images_flattened_channel_first_are_those_flattened_row_first(tmp_path: Path):
    folder = saved(tmp_path, towers.build("qwen3_vl"))
    encoder = packvit.load(folder)
    patches = draw(encoder)
    turned = patches.unflatten(1, (-1, 3)).transpose(1, 2).flatten(1)
    found = packvit.load(folder, patch_order="chw")(turned, GRID)
    torch.testing.assert_close(found, encoder(patches, GRID), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tower_is_written_back_bit_for_bit_and_read_by_transformers(tmp_path: Path, kind: str):
    model = towers.build(kind)
    encoder = packvit.load(saved(tmp_path, model))
    encoder.save_pretrained(tmp_path / "ours")
    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("model", "ours"))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    again, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    ours, theirs = again.config.to_dict(), model.config.to_dict()
    for left_out in ("_name_or_path", "initializer_range", "transformers_version", "architectures"):
        for config in (ours, theirs):
            config.pop(left_out, None)
    assert ours == theirs
    assert packvit.load(tmp_path / "ours").config == encoder.config


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", ["model.visual.", "visual."])
def test_the_tower_of_a_whole_model_is_read_and_the_rest_reported(
    tmp_path: Path, kind: str, prefix: str
):
    folder = saved(tmp_path, towers.build(kind))
    encoder = packvit.load(folder)
    tensors = load_file(folder / "model.safetensors")
    text = "model.language_model" if prefix.startswith("model") else "model"
    others = {
        f"{text}.layers.0.x.weight": torch.ones(2),
        "lm_head.weight": torch.ones(2),
    }
    save_file(
        {prefix + name: tensor for name, tensor in tensors.items()} | others,
        folder / "model.safetensors",
    )
    found = packvit.load(folder)
    assert set(found.skipped) == others.keys()
    patches = draw(encoder)
    assert torch.equal(found(patches, GRID), encoder(patches, GRID))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_in_memory_is_taken_over(kind: str):
    model = towers.build(kind)
    [family] = [e for e in FAMILIES if e.family.claims(model.config.to_dict())]
    encoder = family.from_transformers(model)
    patches = draw(encoder)
    assert towers.misses(encode(encoder, patches), model, patches, GRID) == []


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_of_nan_keep_every_bit(tmp_path: Path, kind: str):
    encoder = packvit.load(saved(tmp_path, towers.build(kind)))
    patches = draw(encoder)
    before = encode(encoder, patches)
    patches[: 2 * 46] = torch.nan
    after = encode(encoder, patches)
    assert before.merged is not None
    assert after.merged is not None
    assert torch.equal(before.tokens[92:], after.tokens[92:])
    assert torch.equal(before.merged[23:], after.merged[23:])
    for layer, tokens in before.deepstack.items():
        assert torch.equal(tokens[23:], after.deepstack[layer][23:])
    assert torch.equal(before.vectors()[1:], after.vectors()[1:])
    assert after.merged[:23].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_the_towers(tmp_path: Path, kind: str):
    model = towers.build(kind)
    encoder = packvit.load(saved(tmp_path, model))
    patches = draw(encoder)
    pull = torch.Generator().manual_seed(0)
    found, theirs = encode(encoder, patches), towers.forward(model, patches, GRID)
    pairs = [(found.merged, theirs.merged), (found.tokens, theirs.tokens)]
    pairs += zip(found.deepstack.values(), theirs.deepstack, strict=True)
    for ours, own in pairs:
        weight = torch.randn(own.shape, generator=pull)
        assert ours is not None
        (ours * weight).sum().backward(retain_graph=True)
        (own * weight).sum().backward(retain_graph=True)
    layout = encoder.family.layout(dict(model.state_dict()), model.config.to_dict())
    for name, parameter in encoder.named_parameters():
        [(rule, names)] = [(r, n) for r in layout.rules if (n := r.names(name))]
        [expected] = [rule.load([model.get_parameter(n).grad for n in names])]
        assert parameter.grad is not None
        assert (parameter.grad - expected).norm() <= 1e-4 * expected.norm(), name


def test_the_one_vector_is_the_mean_of_merged_tokens(tmp_path: Path):
    encoder = packvit.load(saved(tmp_path, towers.build("qwen3_vl")))
    images = [Image.effect_noise((side, 96), 90).convert("RGB") for side in (64, 160)]
    pack = encoder.pack(images, resize="native")
    found = encoder.encode(pack, merged=True)
    assert found.pooled is None
    assert found.merged is not None
    means = image_means(found.merged, [6, 15])
    assert torch.equal(found.vectors(), means)
    np.testing.assert_allclose(
        encoder.embed(images, resize="native"), means.detach().numpy(), atol=1e-5
    )


def test_sides_that_the_merger_does_not_divide_are_refused(tmp_path: Path):
    encoder = packvit.load(saved(tmp_path, towers.build("qwen3_vl")))
    grid = [(1, 2, 2), (1, 3, 4)]
    patches = draw(encoder, grid)
    assert encoder(patches, grid).shape == (16, 64)
    with pytest.raises(ValueError, match=r"Image 1 is 3 x 4 patches.*squares of 2 x 2"):
        encoder.encode(patches, grid, merged=True)


SETTINGS: list[dict[str, Any]] = [
    {"patch_size": 16, "size": {"shortest_edge": 65536, "longest_edge": 300_000}},
    {"patch_size": 16, "min_pixels": 4096, "max_pixels": 90_000, "image_mean": [0.5] * 3},
    {"patch_size": 16},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_images_are_prepared_pixel_for_pixel_as_transformers_does(
    tmp_path: Path, settings: dict[str, Any]
):
    folder = saved(tmp_path, towers.build("qwen3_5"))
    processor = Qwen2VLImageProcessorPil(**settings)
    processor.save_pretrained(folder)
    encoder = packvit.load(folder)
    draw = np.random.default_rng(0)
    sizes = [(64, 64), (37, 911), (1200, 30), (480, 640), (479, 641), (1, 32), (99, 1501)]
    images = [Image.fromarray(draw.integers(0, 256, (*size, 3), np.uint8)) for size in sizes]
    for image in images:
        pack = encoder.pack([image])
        made = processor(images=image, return_tensors="pt")
        assert pack.grid_thw.tolist() == made["image_grid_thw"].tolist()
        [grid] = pack.grid_thw.tolist()
        ours = towers.to_theirs(encoder.to_values(pack.hidden_states), 16)
        assert torch.equal(ours[towers.block_order(*grid)], made["pixel_values"])
    with pytest.raises(packvit.ImageError) as refused:
        encoder.pack([Image.new("RGB", (2010, 10))])
    assert refused.value.code == "aspect_ratio"


def test_native_and_bounded_images_part_into_squares(tmp_path: Path):
    encoder = packvit.load(saved(tmp_path, towers.build("qwen3_5")))
    image = Image.new("RGB", (1000, 700))
    several: list[dict[str, Any]] = [
        {"resize": "native"},
        {"max_patches": 100},
        {"resize": "native", "max_patches": 30},
    ]
    for options in several:
        pack = encoder.pack([image], **options)
        assert all(side % 2 == 0 for side in pack.grid_thw[0, 1:].tolist())
        assert len(pack.hidden_states) <= options.get("max_patches", 1024)


def test_a_job_writes_means_of_merged_tokens_and_its_photographs_are_drawn(tmp_path: Path):
    folder = saved(tmp_path, towers.build("qwen2_5_vl"))
    (tmp_path / "photos").mkdir()
    for side in (64, 90, 150):
        noise = Image.effect_noise((side, 100), 90).convert("RGB")
        noise.save(tmp_path / "photos" / f"{side}.png")
    out = tmp_path / "out"
    options: dict[str, Any] = {"device": "cpu", "workers": 1, "taps": (1,), "format": "npy"}
    packvit.embed(tmp_path / "photos", out=out, model=folder, **options)
    assert check_folder(out).faults == []
    written = packvit.read(out)
    assert written.matrix.shape == (3, 40)
    paths = sorted((tmp_path / "photos").iterdir(), key=lambda path: path.name)
    expected = packvit.load(folder).embed(paths)
    np.testing.assert_allclose(written.matrix, expected, atol=1e-4)
    manifest = json.loads((out / "_manifest.json").read_bytes())
    assert manifest["pooled"] == "mean of merged tokens"
    picture = str(tmp_path / "picture.png")
    draw_pictures([str(tmp_path / "photos")], out=picture, model=str(folder), device="cpu")
    with Image.open(picture) as drawn:
        assert drawn.width > 100


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_activations_give_the_same_gradients(kind: str):
    model = towers.build(kind)
    [family] = [e for e in FAMILIES if e.family.claims(model.config.to_dict())]
    found = []
    for recomputed in (False, True):
        encoder = family.from_transformers(model).train()
        if recomputed:
            checkpoint_activations(encoder)
        merged = encode(encoder, draw(encoder)).merged
        assert merged is not None
        merged.square().mean().backward()
        found.append([p.grad for p in encoder.parameters() if p.grad is not None])
    assert found[0]
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "vocab_size": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 4, 4]},
}
WHOLE = {
    "qwen3_vl": Qwen3VLForConditionalGeneration,
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen2_vl": Qwen2VLForConditionalGeneration,
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_whole_model_in_shards_gives_its_tower(tmp_path: Path, kind: str):
    tower, whole = towers.build(kind, out_hidden_size=48), WHOLE[kind]
    config = whole.config_class(vision_config=tower.config.to_dict(), text_config=TEXT)
    model = whole(config)
    model.model.visual.load_state_dict(tower.state_dict())
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    encoder = packvit.load(tmp_path)
    patches = draw(encoder)
    assert towers.misses(encode(encoder, patches), tower, patches, GRID) == []
    assert encoder.skipped
    assert not any("visual" in name for name in encoder.skipped)
    findings = verify_checkpoint(tmp_path, VerifyOptions(quick=True, lower=()), device="cpu")
    assert findings.missed == ()
    hub.convert(tmp_path, tmp_path / "alone", "transformers")
    assert packvit.load(tmp_path / "alone").config == encoder.config


def clip(frames: int, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return draw.integers(0, 256, (frames, 84, 112, 3), dtype=np.uint8)


@pytest.mark.parametrize("order", ["hwc", "chw"])
def test_clips_and_images_of_one_pack_equal_the_tower(tmp_path: Path, order: Any):
    """Two frames a patch, of which the last one is repeated."""
    model = towers.build("qwen2_5_vl")
    encoder = packvit.load(saved(tmp_path, model), patch_order=order)
    frames = clip(5)
    image = Image.fromarray(frames[3])
    pack = encoder.pack([frames, image, [Image.fromarray(frame) for frame in frames[:2]]])
    grid = [(3, 6, 8), (1, 6, 8), (1, 6, 8)]
    assert [tuple(row) for row in pack.grid_thw.tolist()] == grid
    alone = packvit.load(tmp_path / "model")
    single = [alone.to_values(alone.pack([frame]).hidden_states) for frame in frames]
    pairs = [(0, 1), (2, 3), (4, 4), (3, 3), (0, 1)]
    patches = torch.cat([torch.cat([single[a], single[b]], 1) for a, b in pairs])
    found = encoder.encode(pack, taps=range(3), merged=True)
    assert towers.misses(found, model, patches, grid) == []
    with pytest.raises(ValueError, match="2 different grids"):
        encoder.pack([[image, Image.new("RGB", (56, 56))]])
    with pytest.raises(packvit.ImageError, match="Image 1"):
        encoder.pack([image, [image, b"no image"]])


def test_a_clip_is_frames_of_an_encoder_of_images():
    encoder = packvit.load("tiny", device="cpu")
    frames = clip(3)
    found = encoder(encoder.pack([frames]))
    assert torch.equal(found, encoder(encoder.pack(list(frames))))
    assert encoder.pack([frames]).grid_thw.tolist() == [[3, 6, 8]]


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_is_as_exact_as_the_tower_by_graphs_too(tmp_path: Path, kind: str, attention: str):
    model = towers.build(kind, hidden_size=128).bfloat16()
    options: dict[str, Any] = {"device": "cuda", "attention": attention}
    encoder = packvit.load(saved(tmp_path, model), dtype=torch.bfloat16, **options)
    patches = draw(encoder).bfloat16()
    with torch.inference_mode():
        for _ in range(3):  # the third is replayed, where there are graphs
            found = encode(encoder, patches.cuda())
            assert towers.misses(found, model, patches, GRID) == []


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_fused_blocks_of_towers_train_as_the_plain_ones(kind: str):
    model = towers.build(kind, hidden_size=128).bfloat16()
    [family] = [e for e in FAMILIES if e.family.claims(model.config.to_dict())]
    grads = []
    for fused in (True, False):
        encoder = family.from_transformers(model, device="cuda").train()
        if not fused:
            encoder.fast = None
        merged = encode(encoder, draw(encoder).cuda().bfloat16()).merged
        assert merged is not None
        merged.float().square().mean().backward()
        grads.append(
            {name: p.grad.float() for name, p in encoder.named_parameters() if p.grad is not None}
        )
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[1].items():
        assert (grads[0][name] - grad).norm() <= 0.05 * grad.norm() + 1e-6, name


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_no_tower_waits_for_the_device(tmp_path: Path, kind: str):
    encoder = packvit.load(saved(tmp_path, towers.build(kind)), device="cuda", dtype=torch.bfloat16)
    patches = draw(encoder).cuda().bfloat16()
    encode(encoder, patches)  # kernels are loaded on first use
    torch.cuda.set_sync_debug_mode("error")
    try:
        encode(encoder, patches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
