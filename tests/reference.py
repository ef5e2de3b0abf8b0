"""The oracle: transformers' models run one image at a time, and the slow, obvious formulas.

Nothing here shares code with packvit. Weights are drawn at a scale where every tensor matters, so
that one which is ignored, swapped or misplaced shows in the output.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    RadioConfig,
    RadioModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    Tipsv2VisionConfig,
    Tipsv2VisionModel,
)

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 14,
    "image_size": 5 * 14,
}


class Outputs(NamedTuple):
    """What a reference says about a pack: per-patch rows end to end, per-frame rows of the rest."""

    tokens: Tensor
    hidden_states: list[Tensor]  # of the patches, leaving each block
    pooled: Tensor | None
    prefix: Tensor
    projected: Tensor | None


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every weight so that it matters, and return the model ready to compare with."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            if parameter.ndim == 1 and "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.ndim < 2 or "position" in name or "token" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model.eval()


def aimv2(seed: int = 0, **changes: Any) -> Any:
    """A small AIMv2 of transformers, with any entry of its configuration changed."""
    return build("aimv2", seed, **changes)


KINDS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "aimv2": (Aimv2VisionModel, Aimv2VisionConfig, {}),
    "siglip2": (Siglip2VisionModel, Siglip2VisionConfig, {"num_patches": 25}),
    "siglip": (SiglipVisionModel, SiglipVisionConfig, {}),
    "clip": (CLIPVisionModel, CLIPVisionConfig, {}),
    "clip, projected": (CLIPVisionModelWithProjection, CLIPVisionConfig, {"projection_dim": 24}),
    "dinov2": (Dinov2Model, Dinov2Config, {"mlp_ratio": 2}),
    "dinov2, swiglu": (Dinov2Model, Dinov2Config, {"use_swiglu_ffn": True}),
    "dinov2, registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig, {}),
    "dinov3": (DINOv3ViTModel, DINOv3ViTConfig, {"num_register_tokens": 4}),
    "dinov3, no registers": (DINOv3ViTModel, DINOv3ViTConfig, {"num_register_tokens": 0}),
    "dinov3, gated": (
        DINOv3ViTModel,
        DINOv3ViTConfig,
        {"num_register_tokens": 2, "use_gated_mlp": True, "hidden_act": "silu"},
    ),
    "tipsv2": (Tipsv2VisionModel, Tipsv2VisionConfig, {"mlp_ratio": 1.6875}),
    "tipsv2, swiglu": (Tipsv2VisionModel, Tipsv2VisionConfig, {"use_swiglu_ffn": True}),
    "radio": (
        RadioModel,
        RadioConfig,
        {
            "mlp_ratio": 1.5,
            "max_img_size": 5 * 14,
            "num_cls_tokens": 4,
            "summary_idxs": [2, 0, 3],
        },
    ),
    "radio, swiglu": (RadioModel, RadioConfig, {"use_swiglu_ffn": True, "max_img_size": 5 * 14}),
}


def build(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A small random model of transformers, with any entry of its configuration changed."""
    model, config, own = KINDS[kind]
    entries = TINY | own | changes
    if kind == "siglip2":
        del entries["image_size"]
    if kind.startswith(("dinov2", "radio", "tipsv2")):
        del entries["intermediate_size"]
    return randomise(model(config(**entries)), seed)


def scaled_difference(ours: Tensor | None, theirs: Tensor | None) -> float:
    """max|ours - theirs| / max(1, max|theirs| / 4): absolute for small outputs, else relative."""
    assert ours is not None, "ours is missing"
    assert theirs is not None, "theirs is missing"
    assert ours.shape == theirs.shape
    if not ours.numel():
        return 0.0  # no prefix tokens on either side
    ours, theirs = ours.detach().double().cpu(), theirs.detach().double().cpu()
    return ((ours - theirs).abs().max() / max(1.0, theirs.abs().max().item() / 4)).item()


def draw_patches(grid: list[tuple[int, int, int]], patch_dim: int, seed: int = 0) -> Tensor:
    """Normalised patches for a grid: [T, P] float32."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(frames * rows * columns for frames, rows, columns in grid)
    return torch.randn(total, patch_dim, generator=generator)


def image(patches: Tensor, rows: int, columns: int, side: int) -> Tensor:
    """Put (row, column, channel) patches back together. Shapes: [patches, P] -> [1, 3, H, W]."""
    tiles = patches.reshape(rows, columns, side, side, 3)
    return tiles.permute(4, 0, 2, 1, 3).reshape(1, 3, rows * side, columns * side)


@contextmanager
def right_interpolation() -> Iterator[None]:
    """Keep torch from interpolating an image to one column wrongly.

    With antialiasing, on the CPU, it does (seen in 2.13), and so do the references that antialias:
    Pillow says so in test_positions.py.
    """
    original = F.interpolate

    def turned(image: Tensor, *args: Any, **options: Any) -> Tensor:
        if not options.get("antialias") or options["size"][1] > 1:
            return original(image, *args, **options)
        options["size"] = options["size"][::-1]
        return original(image.transpose(2, 3).contiguous(), *args, **options).transpose(2, 3)

    F.interpolate = turned
    try:
        yield
    finally:
        F.interpolate = original


@torch.no_grad()
def run(model: Any, patches: Tensor, grid: list[tuple[int, int, int]], **options: Any) -> Outputs:
    """As `forward`, and no graph."""
    return forward(model, patches, grid, **options)


@right_interpolation()
def forward(
    model: Any, patches: Tensor, grid: list[tuple[int, int, int]], **options: Any
) -> Outputs:
    """Forward every frame by itself, and lay the outputs end to end."""
    frames = [(rows, columns) for count, rows, columns in grid for _ in range(count)]
    lengths = [rows * columns for rows, columns in frames]
    parameter = next(model.parameters())
    if isinstance(model, RadioModel):
        model.make_preprocessor_external()  # which normalises, and in float32
    found = []
    for part, (rows, columns) in zip(patches.split(lengths), frames, strict=True):
        part = part.to(parameter.device, parameter.dtype)
        out = model(**inputs(model, part, rows, columns), output_hidden_states=True, **options)
        state = out.last_hidden_state[0]
        first = len(state) - rows * columns  # prefix tokens come first
        layers = [state[0, first:] for state in out.hidden_states[1:]]
        pooled = out.get("pooler_output", out.get("summary"))
        found.append((state[first:], layers, pooled, state[:first], out.get("image_embeds")))
    tokens, layers, pooled, prefix, projected = zip(*found, strict=True)
    return Outputs(
        torch.cat(tokens),
        [torch.cat(parts) for parts in zip(*layers, strict=True)],
        None if pooled[0] is None else torch.cat(pooled),
        torch.stack(prefix),
        None if projected[0] is None else torch.cat(projected),
    )


def inputs(model: Any, patches: Tensor, rows: int, columns: int) -> dict[str, Tensor]:
    """One image as the model takes it: pixels, or patches with their mask and shape."""
    if not isinstance(model, Siglip2VisionModel):
        return {"pixel_values": image(patches, rows, columns, model.config.patch_size)}
    return {
        "pixel_values": patches[None],
        "pixel_attention_mask": torch.ones(1, len(patches), device=patches.device),
        "spatial_shapes": torch.tensor([[rows, columns]]),
    }


def to_apple(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rewrite transformers' AIMv2 weights in Apple's layout, by hand."""
    names = {
        "embeddings.patch_embed": "preprocessor.patchifier.proj",
        "embeddings.rms_norm": "preprocessor.patchifier.norm",
        "rms_norm": "trunk.post_trunk_norm",
        "head.k_proj": "head.k",
        "head.v_proj": "head.v",
        "head.output_proj": "head.linear",
        "rms_norm1": "norm_1",
        "rms_norm2": "norm_2",
        "attention.out_proj": "attn.proj",
        "ffn.gate_proj": "mlp.fc1",
        "ffn.up_proj": "mlp.fc3",
        "ffn.down_proj": "mlp.fc2",
    }
    apple, thirds = {}, {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if name == "embeddings.position_embedding.weight":
            apple["preprocessor.pos_embed"] = tensor[None].clone()
        elif name == "head.cls_token":
            apple[name] = tensor.clone()
        elif module.startswith("encoder.layers."):
            _, _, layer, inner = module.split(".", 3)
            if inner in ("attention.q_proj", "attention.k_proj", "attention.v_proj"):
                thirds.setdefault((layer, kind), {})[inner[10]] = tensor
            else:
                apple[f"trunk.blocks.{layer}.{names[inner]}.{kind}"] = tensor.clone()
        else:
            apple[f"{names[module]}.{kind}"] = tensor.clone()
    for (layer, kind), parts in thirds.items():
        apple[f"trunk.blocks.{layer}.attn.qkv.{kind}"] = torch.cat([parts[p] for p in "qkv"])
    return apple


def attention(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Softmax attention, one sequence at a time, in float64. Shapes: 3 x [T, H, K] -> [T, H, K]."""
    results = []
    sequences = zip(*(x.double().cpu().split(lengths) for x in (query, key, value)), strict=True)
    for q, k, v in sequences:
        scores = torch.einsum("qhk,thk->hqt", q, k) / q.shape[-1] ** 0.5
        results.append(torch.einsum("hqt,thk->qhk", scores.softmax(-1), v))
    return torch.cat(results)
