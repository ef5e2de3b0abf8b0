"""OneVision-Encoder in float64, written out from the authors' tensors, one clip at a time.

Nothing here shares code with packvit.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import written
from reference import image
from torch import Tensor
from written import Shapes, linear

SIZES: dict[str, Any] = {
    "model_type": "onevision_encoder",
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 14,
    "image_size": 448,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "layer_norm_type": "layer_norm",
    "rope_theta": 10000.0,
    "rope_temporal_size": 64,
    "use_head": True,
}
KINDS: dict[str, dict[str, Any]] = {
    "layer norm": {},
    "rms norm": {
        "layer_norm_type": "rms_norm",
        "layer_norm_eps": 1e-3,
        "rope_theta": 500.0,
        "num_attention_heads": 4,
        "rope_temporal_size": 16,
    },
    "no head, numbered frames": {"use_head": False, "rope_temporal_size": None},
}
Grid = list[tuple[int, int, int]]


class Outputs(NamedTuple):
    """What the formula says: per-patch rows end to end, per-clip rows of the rest."""

    tokens: Tensor
    taps: list[Tensor]
    pooled: Tensor | None


def draw(kind: str, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of the authors' names and shapes, every one of which matters."""
    made = SIZES | KINDS[kind]
    width, inner = made["hidden_size"], made["intermediate_size"]

    def norm(name: str) -> Shapes:
        both = made["layer_norm_type"] == "layer_norm"
        return {f"{name}.weight": (width,)} | ({f"{name}.bias": (width,)} if both else {})

    def mlp(name: str) -> Shapes:
        return linear(f"{name}.fc1", inner, width) | linear(f"{name}.fc2", width, inner)

    shapes: Shapes = {
        "embeddings.patch_embedding.weight": (width, 3, made["patch_size"], made["patch_size"]),
        **norm("layernorm_pre"),
    }
    for layer in range(made["num_hidden_layers"]):
        block = f"encoder.layers.{layer}."
        shapes |= norm(f"{block}layer_norm1") | norm(f"{block}layer_norm2") | mlp(f"{block}mlp")
        for part in ("q", "k", "v", "out"):
            shapes |= linear(f"{block}self_attn.{part}_proj", width, width)
    if made["use_head"]:
        shapes |= norm("layernorm_post") | {"head.probe": (1, 1, width)} | mlp("head.mlp")
        shapes |= {"head.attention.in_proj_weight": (3 * width, width)}
        shapes |= {"head.attention.in_proj_bias": (3 * width,), "head.norm.weight": (width,)}
        shapes |= linear("head.attention.out_proj", width, width)
    return written.draw(shapes, seed)


def write(folder: Path, kind: str, tensors: dict[str, Tensor], **changes: Any) -> Path:
    """A checkpoint as the authors publish it."""
    return written.write(folder, SIZES | KINDS[kind] | changes, tensors)


def places(kind: str, grid: Grid) -> Tensor:
    """(time, row, column) of whole clips, as the authors' README makes them. Shapes: [T, 3]."""
    most, found = (SIZES | KINDS[kind])["rope_temporal_size"], []
    for frames, rows, columns in grid:
        spread = torch.linspace(0, (most or frames) - 1, frames).long()
        time = spread[:, None].repeat(1, rows * columns).flatten()
        row = torch.arange(rows).repeat_interleave(columns).repeat(frames)
        column = torch.arange(columns).repeat(rows).repeat(frames)
        found.append(torch.stack([time, row, column], 1))
    return torch.cat(found)


def formula(
    tensors: dict[str, Tensor],
    kind: str,
    patches: Tensor,
    at: Tensor,
    lengths: list[int],
    dtype: torch.dtype = torch.float64,
) -> Outputs:
    """Every clip by itself, rounded to `dtype` where the authors round. Shapes: [T, P], [T, 3]."""
    exact = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    parts = zip(patches.to(dtype).split(lengths), at.split(lengths), strict=True)
    found = [run_clip(exact, SIZES | KINDS[kind], part, own) for part, own in parts]
    tokens, taps, pooled = zip(*found, strict=True)
    return Outputs(
        torch.cat(tokens),
        [torch.cat(layer) for layer in zip(*taps, strict=True)],
        None if pooled[0] is None else torch.cat(pooled),
    )


def run_clip(
    tensors: dict[str, Tensor], made: dict[str, Any], patches: Tensor, at: Tensor
) -> Outputs:
    """One clip, or the patches chosen of it."""
    heads, side, eps = (
        made[name] for name in ("num_attention_heads", "patch_size", "layer_norm_eps")
    )

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def rms(x: Tensor, name: str) -> Tensor:
        wide = x.double()
        root = (wide.square().mean(-1, keepdim=True) + eps).sqrt()
        return (wide / root).to(x.dtype) * tensors[f"{name}.weight"]

    def norm(x: Tensor, name: str) -> Tensor:
        if made["layer_norm_type"] == "rms_norm":
            return rms(x, name)
        centred = x - x.mean(-1, keepdim=True)
        return rms(centred, name) + tensors[f"{name}.bias"]

    def mlp(x: Tensor, name: str) -> Tensor:
        hidden = linear(x, f"{name}.fc1").double()
        active = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        return linear(active.to(x.dtype), f"{name}.fc2")

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = torch.einsum("qhk,thk->hqt", query, key) / query.shape[-1] ** 0.5
        return torch.einsum("hqt,thk->qhk", scores.softmax(-1), value).flatten(1)

    squares = torch.cat([image(patch, 1, 1, side) for patch in patches.split(1)])
    x = F.conv2d(squares, tensors["embeddings.patch_embedding.weight"]).flatten(1)
    x = norm(x, "layernorm_pre")

    half = x.shape[1] // heads // 2
    sizes = [4 * half // 16, 6 * half // 16, 6 * half // 16]
    ladders = [
        made["rope_theta"] ** (-torch.arange(size, dtype=torch.float64) / size) for size in sizes
    ]
    axes = zip(at.double().unbind(1), ladders, strict=True)
    angles = torch.cat([axis.outer(ladder) for axis, ladder in axes], 1).repeat(1, 2)
    cosine, sine = (turn.to(x.dtype)[:, None] for turn in (angles.cos(), angles.sin()))

    def rotate(x: Tensor) -> Tensor:
        even, odd = x[..., ::2], x[..., 1::2]
        return x * cosine + torch.stack([-odd, even], -1).flatten(-2) * sine

    taps = []
    for layer in range(made["num_hidden_layers"]):
        block = f"encoder.layers.{layer}."
        h = norm(x, f"{block}layer_norm1")
        query, key, value = (
            linear(h, f"{block}self_attn.{part}_proj").unflatten(1, (heads, -1)) for part in "qkv"
        )
        found = attend(rotate(query), rotate(key), value)
        x = x + linear(found, f"{block}self_attn.out_proj")
        x = x + mlp(norm(x, f"{block}layer_norm2"), f"{block}mlp")
        taps.append(x)
    if not made["use_head"]:
        return Outputs(x, taps, None)
    x = norm(x, "layernorm_post")
    weights, biases = (tensors[f"head.attention.in_proj_{part}"] for part in ("weight", "bias"))
    given = (tensors["head.probe"][0], x, x)
    query, key, value = (
        F.linear(one, weight, bias).unflatten(1, (heads, -1))
        for one, weight, bias in zip(given, weights.chunk(3), biases.chunk(3), strict=True)
    )
    pooled = linear(attend(query, key, value), "head.attention.out_proj")
    return Outputs(x, taps, pooled + mlp(rms(pooled, "head.norm"), "head.mlp"))
