"""MoonViT against transformers' tower and projector, under its names and the published ones."""

import ast
import copy
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import reference
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import Kimi_K25Config, Kimi_K25VisionConfig, Kimi_K25VisionModel
from transformers.core_model_loading import PermuteForRope
from transformers.models import kimi_k25
from transformers.models.kimi_k25.modeling_kimi_k25 import Kimi_K25MultimodalProjection

import packvit
from packvit.checkpoints import files
from packvit.checkpoints.errors import CheckpointError
from packvit.encoder import Encoder
from packvit.families.kimi_k25 import KimiK25VisionPacking
from packvit.packs.features import Features
from packvit.verification import VerifyOptions
from packvit.verification.rule import judge
from packvit.verification.verify import verify_checkpoint

Grid = list[tuple[int, int, int]]
GRID: Grid = [(1, 2, 46), (1, 38, 2), (3, 4, 6), (1, 2, 2), (4, 6, 34), (1, 6, 6)]
SQUARES = [rows * columns // 4 for _, rows, columns in GRID]
NAMES = {  # of a block: transformers' to published ones
    "norm1": "norm0",
    "norm2": "norm1",
    "attn.proj": "wo",
    "mlp.fc1": "mlp.fc0",
    "mlp.fc2": "mlp.fc1",
}


def navit_resize(*sizes: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """transformers' own function, read out of a module that needs torchvision to be imported."""
    source = Path(kimi_k25.__file__).parent / "image_processing_kimi_k25.py"
    found: list[ast.stmt] = [
        node
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "navit_resize"
    ]
    names: dict[str, Any] = {"math": math}
    exec(compile(ast.Module(found, []), str(source), "exec"), names)
    return names["navit_resize"](*sizes)


class Kimi(NamedTuple):
    tower: Any
    projector: Any


def build(seed: int = 0) -> Kimi:
    config = Kimi_K25VisionConfig(
        num_hidden_layers=3,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        pos_emb_height=6,
        pos_emb_width=6,
    )
    whole = Kimi_K25Config(
        vision_config=config,
        text_config={"model_type": "deepseek_v3", "hidden_size": 40},
        projection_hidden_size=64,
    )
    tower = reference.randomise(Kimi_K25VisionModel(config), seed)
    return Kimi(tower, reference.randomise(Kimi_K25MultimodalProjection(whole), seed + 1))


def publish(kimi: Kimi, folder: Path) -> Path:
    """Write both as Kimi publishes them, beside a language model's tensors."""
    held = kimi.tower.state_dict()
    turn: Any = PermuteForRope(permute_layer_names=["q_proj", "k_proj"], inverse=True)
    turn.config = kimi.tower.config
    permute = getattr(turn, "_apply", None) or partial(  # transformers 5.17, and since 5.24
        turn._permute_for_rope, config=kimi.tower.config
    )
    tensors: dict[str, Tensor] = {"language_model.lm_head.weight": torch.ones(2)}
    for name in ("patch_embed.proj.weight", "patch_embed.proj.bias"):
        tensors[f"vision_tower.{name}"] = held[name]
    tensors["vision_tower.patch_embed.pos_emb.weight"] = held[
        "patch_embed.pos_emb.position_embeddings"
    ]
    for kind in ("weight", "bias"):
        tensors[f"vision_tower.encoder.final_layernorm.{kind}"] = held[f"final_layernorm.{kind}"]
        for layer in range(3):
            block = f"vision_tower.encoder.blocks.{layer}."
            for theirs, published in NAMES.items():
                tensors[f"{block}{published}.{kind}"] = held[f"layers.{layer}.{theirs}.{kind}"]
            q, k, v = (held[f"layers.{layer}.attn.{part}_proj.{kind}"] for part in "qkv")
            tensors[f"{block}wqkv.{kind}"] = torch.cat([permute(q), permute(k), v])
    projector = {"pre_norm": "pre_norm", "in_proj": "proj.0", "out_proj": "proj.2"}
    for theirs, published in projector.items():
        layer = kimi.projector.get_submodule(theirs)
        tensors[f"mm_projector.{published}.weight"] = layer.weight.data
        tensors[f"mm_projector.{published}.bias"] = layer.bias.data
    config = {
        "model_type": "kimi_k25",
        "vision_config": published_words(kimi),
        "text_config": {"hidden_size": 40},
    }
    files.write(folder, config=config, tensors=tensors, preprocessor=None)
    return folder


def published_words(kimi: Kimi) -> dict[str, Any]:
    """Return the entries of the published vision_config, which are not transformers'."""
    sizes = kimi.tower.config.to_dict()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {f"vt_{name}": sizes[name] for name in names} | {
        "init_pos_emb_height": sizes["pos_emb_height"],
        "init_pos_emb_time": sizes["pos_emb_time"],
        "init_pos_emb_width": sizes["pos_emb_width"],
        "merge_kernel_size": [2, 2],
        "merge_type": "sd2_tpool",
        "mm_hidden_size": 64,
        "mm_projector_type": "patchmerger",
        "model_type": "",
        "patch_size": 14,
        "pos_emb_type": "divided_fixed",
        "projector_hidden_act": "gelu",
        "projector_ln_eps": 1e-05,
        "text_hidden_size": 40,
        "video_attn_type": "spatial_temporal",
    }


ALONE: Grid = [(1, 2, 46), (1, 38, 2), (1, 6, 6), (1, 4, 10)]  # Kimi-VL takes no clips


def publish_vl(kimi: Kimi, folder: Path, *, whole: bool) -> Path:
    """Write both as Kimi-VL publishes them, or the tower alone as MoonViT-SO-400M is."""
    publish(kimi, folder)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.startswith("mm_projector."):
            tensors[name if whole else name.removeprefix("vision_tower.")] = tensor
        elif whole:
            for theirs, ours in {"proj.0": "linear_1", "proj.2": "linear_2"}.items():
                name = name.replace(theirs, ours)
            tensors[name.replace("mm_projector", "multi_modal_projector")] = tensor
    if not whole:
        del tensors["language_model.lm_head.weight"]
    sizes = kimi.tower.config.to_dict()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    tower = {name: sizes[name] for name in names} | {
        "model_type": "moonvit",
        "patch_size": 14,
        "init_pos_emb_height": 6,
        "init_pos_emb_width": 6,
        "merge_kernel_size": [2, 2],
    }
    config = {"model_type": "kimi_vl", "text_config": {"hidden_size": 40}, "vision_config": tower}
    settings = {
        "image_processor_type": "KimiVLImageProcessor",
        "in_token_limit": 4096,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "pad_input": True,
        "patch_size": 14,
    }
    files.write(
        folder.with_name(f"{folder.name}-vl"),
        config=config if whole else tower,
        tensors=tensors,
        preprocessor=settings,
    )
    return folder.with_name(f"{folder.name}-vl")


@torch.no_grad()
def run(kimi: Kimi, patches: Tensor, grids: Grid) -> dict[str, list[Tensor]]:
    """Forward every image or clip by itself."""
    said: dict[str, list[Tensor]] = {"tokens": [], "merged": [], "taps": []}
    weight = next(kimi.tower.parameters())
    for part, grid in zip(patches.split([t * r * c for t, r, c in grids]), grids, strict=True):
        pixels = part.to(weight.dtype).view(-1, 14, 14, 3).permute(0, 3, 1, 2)
        out = kimi.tower(
            pixel_values=pixels, grid_thw=torch.tensor([grid]), output_hidden_states=True
        )
        said["tokens"].append(out.last_hidden_state)
        said["merged"].append(kimi.projector(out.pooler_output)[:, 0])
        said["taps"].append(torch.stack(out.hidden_states[1:-1]))  # the last one is normed
    return said


def misses(found: Features, kimi: Kimi, patches: Tensor, grids: Grid = GRID) -> list[str]:
    theirs = run(kimi, patches, grids)
    truth = run(Kimi(*(copy.deepcopy(part).double() for part in kimi)), patches.double(), grids)
    lengths = [t * r * c for t, r, c in grids]
    ours: dict[str, Any] = {
        "tokens": found.tokens.split(lengths),
        "taps": torch.stack(list(found.taps.values())[:-1]).split(lengths, dim=1),
    }
    if found.merged is not None:
        ours["merged"] = found.merged.split([rows * columns // 4 for _, rows, columns in grids])
    return [
        f"{name}: {judged}"
        for name, mine in ours.items()
        for judged in judge(mine, theirs[name], truth[name], dtype=found.tokens.dtype, blocks=3)
        if not judged.passed
    ]


def encode(encoder: Encoder, patches: Tensor, merged: bool = True) -> Features:
    return encoder.encode(patches, torch.tensor(GRID), taps=range(3), merged=merged)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_published_checkpoint_equals_transformers_tower_and_projector(tmp_path: Path, seed: int):
    kimi = build(seed)
    encoder = packvit.load(publish(kimi, tmp_path / "model"))
    patches = reference.draw_patches(GRID, 588)
    found = encode(encoder, patches)
    assert misses(found, kimi, patches) == []
    assert encoder.skipped == ("language_model.lm_head.weight",)
    assert found.segment_image.tolist() == list(range(6))
    assert found.vectors().shape == (6, 40)
    merged = found.merged
    assert merged is not None
    torch.testing.assert_close(found.vectors()[2], merged.split(SQUARES)[2].mean(0))


def test_bf16_is_as_exact_as_the_towers(tmp_path: Path):
    kimi = Kimi(*(part.bfloat16() for part in build()))
    encoder = packvit.load(publish(kimi, tmp_path / "model"), dtype=torch.bfloat16)
    patches = reference.draw_patches(GRID, 588).bfloat16()
    assert misses(encode(encoder, patches), kimi, patches) == []


def test_a_tower_that_transformers_saved_is_read_and_written_bit_for_bit(tmp_path: Path):
    kimi = build()
    kimi.tower.save_pretrained(tmp_path / "model")
    encoder = packvit.load(tmp_path / "model")
    patches = reference.draw_patches(GRID, 588)
    assert misses(encode(encoder, patches, merged=False), kimi, patches) == []
    with pytest.raises(ValueError, match="has no merger"):
        encode(encoder, patches)
    encoder.save_pretrained(tmp_path / "ours")
    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("model", "ours"))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    kind: Any = Kimi_K25VisionModel
    again, info = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    assert again.config.pos_emb_time == 4
    taken = KimiK25VisionPacking.from_transformers(kimi.tower)
    for ours, theirs in zip(taken.parameters(), encoder.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_published_checkpoint_is_written_back_bit_for_bit(tmp_path: Path):
    folder = publish(build(), tmp_path / "model")
    encoder = packvit.load(folder)
    encoder.save_pretrained(tmp_path / "ours", layout="original")
    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("model", "ours"))
    del before["language_model.lm_head.weight"]
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert packvit.load(tmp_path / "ours").config == encoder.config
    with pytest.raises(ValueError, match='"original"'):
        encoder.save_pretrained(tmp_path / "other", layout="transformers")


def test_published_words_and_transformers_say_the_same():
    kimi = build()
    kimi.tower.config.pos_emb_time = 3
    read = KimiK25VisionPacking.family.layouts[1].read
    names = ("mm_projector.pre_norm.weight",)
    whole = {"model_type": "kimi_k25", "text_config": {"hidden_size": 40}}
    published = whole | {"vision_config": published_words(kimi) | {"projector_ln_eps": 1e-6}}
    theirs = whole | {"vision_config": kimi.tower.config.to_dict()}
    config = read(published, names)
    assert config == read(theirs | {"projection_layer_norm_eps": 1e-6}, names)
    assert (config.width, config.layers, config.mlp_width) == (64, 3, 96)
    other = published_words(kimi) | {"merge_type": "sd2"}
    with pytest.raises(CheckpointError, match=r"'merge_type': 'sd2'.*packvit knows.*sd2_tpool"):
        read(whole | {"vision_config": other}, names)


def test_frames_of_a_clip_see_each_other_and_no_other_image(tmp_path: Path):
    encoder = packvit.load(publish(build(), tmp_path / "model"))
    patches = reference.draw_patches(GRID, 588)
    before = encode(encoder, patches)
    patches[92 + 76 : 92 + 76 + 24] = torch.nan  # the first of a clip's three frames
    after = encode(encoder, patches)
    lengths = [t * r * c for t, r, c in GRID]
    pairs = zip(before.tokens.split(lengths), after.tokens.split(lengths), strict=True)
    for image, (was, now) in enumerate(pairs):
        assert torch.equal(was, now) if image != 2 else now.isnan().all()
    assert torch.equal(before.vectors()[3:], after.vectors()[3:])


def test_gradients_reach_every_weight_as_in_the_tower(tmp_path: Path):
    kimi = build()
    encoder = packvit.load(publish(kimi, tmp_path / "model"))
    patches = reference.draw_patches(GRID, 588)
    merged = encode(encoder, patches).merged
    assert merged is not None
    merged.square().sum().backward()
    lengths = [t * r * c for t, r, c in GRID]
    for part, grid in zip(patches.split(lengths), GRID, strict=True):
        pixels = part.view(-1, 14, 14, 3).permute(0, 3, 1, 2)
        pooled = kimi.tower(pixel_values=pixels, grid_thw=torch.tensor([grid])).pooler_output
        kimi.projector(pooled).square().sum().backward()
    pairs: list[tuple[Any, Any]] = [
        (encoder.embeddings.positions, kimi.tower.patch_embed.pos_emb.position_embeddings),
        (encoder.get_parameter("merger.last.up.weight"), kimi.projector.in_proj.weight),
        (encoder.get_parameter("embeddings.patches.bias"), kimi.tower.patch_embed.proj.bias),
    ]
    attention = kimi.tower.layers[0].attn
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    stacked = torch.cat([part.weight.grad for part in parts])
    qkv = encoder.get_parameter("encoder.layers.0.attention.qkv.weight").grad
    assert qkv is not None
    assert (qkv - stacked).norm() <= 1e-4 * stacked.norm()
    for ours, theirs in pairs:
        grad = theirs.grad.reshape(ours.shape)
        assert (ours.grad - grad).norm() <= 1e-4 * grad.norm()


def test_a_clip_of_more_frames_than_are_told_apart_is_refused(tmp_path: Path):
    encoder = packvit.load(publish(build(), tmp_path / "model"))
    with pytest.raises(ValueError, match="Image 1 has 5 frames, but this checkpoint tells 4"):
        encoder(torch.zeros(24, 588), [(1, 2, 2), (5, 2, 2)])


def test_images_are_shrunk_and_filled_up_with_black_as_transformers_does(tmp_path: Path):
    encoder = packvit.load(publish(build(), tmp_path / "model"))
    draw = np.random.default_rng(0)
    sizes = [(28, 28), (27, 29), (500, 333), (9, 1000), (1, 1), (3000, 2000), (20, 8000)]
    for height, width in sizes:
        image = Image.fromarray(draw.integers(0, 256, (height, width, 3), np.uint8))
        pack = encoder.pack([image])
        (tall, wide), padded = navit_resize(height, width, 14, 2, 16384, 512)
        canvas = np.zeros((*padded, 3), np.uint8)
        canvas[:tall, :wide] = np.asarray(image.resize((wide, tall), Image.Resampling.BICUBIC))
        rows, columns = padded[0] // 14, padded[1] // 14
        assert pack.grid_thw.tolist() == [[1, rows, columns]]
        cut = canvas.reshape(rows, 14, columns, 14, 3).transpose(0, 2, 1, 3, 4)
        assert np.array_equal(pack.hidden_states.numpy(), cut.reshape(rows * columns, 588))


@pytest.mark.parametrize("whole", [True, False])
def test_kimi_vls_tower_is_k25s_of_one_frame(tmp_path: Path, whole: bool):
    """Under its own names; transformers has no class of it, but one of the same arithmetic."""
    kimi = build(seed=3)
    folder = publish_vl(kimi, tmp_path / "model", whole=whole)
    encoder = packvit.load(folder)
    patches = reference.draw_patches(ALONE, 588)
    found = encoder.encode(patches, torch.tensor(ALONE), taps=range(3), merged=whole)
    assert misses(found, kimi, patches, ALONE) == []
    assert (found.merged is not None) is whole
    with pytest.raises(ValueError, match="2 frames, but this checkpoint tells 1"):
        encoder(torch.zeros(8, 588), [(2, 2, 2)])
    encoder.save_pretrained(tmp_path / "ours", layout="original")
    before, after = (load_file(side / "model.safetensors") for side in (folder, tmp_path / "ours"))
    before.pop("language_model.lm_head.weight", None)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert packvit.load(tmp_path / "ours").config == encoder.config
    verified = verify_checkpoint(folder, VerifyOptions(quick=True, lower=()), device="cpu")
    assert verified.missed == ()
    assert verified.reference == "Kimi_K25VisionModel"
    assert any("is not in transformers" in why for why in verified.not_compared)


@pytest.mark.parametrize("fill", [True, False])
def test_kimi_vl_shrinks_and_fills_up_or_cuts_as_its_authors_write(tmp_path: Path, fill: bool):
    """Written out with Pillow: their own code comes with the checkpoint, and was not run."""
    folder = publish_vl(build(), tmp_path / "model", whole=True)
    settings = folder / "preprocessor_config.json"
    settings.write_text(
        settings.read_text().replace('"pad_input": true', f'"pad_input": {fill}'.lower())
    )
    encoder = packvit.load(folder)
    draw = np.random.default_rng(0)
    for height, width in [(28, 28), (43, 71), (500, 333), (60, 1000), (1500, 1001), (901, 3000)]:
        image = Image.fromarray(draw.integers(0, 256, (height, width, 3), np.uint8))
        pack = encoder.pack([image])
        patches = (height // 14) * (width // 14)
        if patches > 4096:
            scale = math.sqrt(4096 / patches)
            size = int(width * scale), int(height * scale)
            image = image.resize(size, Image.Resampling.BICUBIC)
        wide, tall = image.size
        if fill:
            expected = Image.new("RGB", (wide + -wide % 28, tall + -tall % 28))
            expected.paste(image)
        else:
            left, top = round(wide % 28 / 2), round(tall % 28 / 2)
            expected = image.crop((left, top, left + wide // 28 * 28, top + tall // 28 * 28))
        pixels = np.asarray(expected)
        rows, columns = pixels.shape[0] // 14, pixels.shape[1] // 14
        assert pack.grid_thw.tolist() == [[1, rows, columns]]
        cut = pixels.reshape(rows, 14, columns, 14, 3).transpose(0, 2, 1, 3, 4)
        assert np.array_equal(pack.hidden_states.numpy(), cut.reshape(rows * columns, 588))
    assert encoder.images.mean == (0.5, 0.5, 0.5)
