"""Perception Encoder in float64, written out from timm's tensors, and timm itself where it is.

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
    "embed_dim": 64,
    "depth": 3,
    "num_heads": 4,
    "mlp_ratio": 1.5,
    "patch_size": 14,
    "img_size": 70,
    "ref_feat_shape": [5, 5],
}
KINDS: dict[str, tuple[str, dict[str, Any], int]] = {  # architecture, arguments, num_classes
    "core": (
        "vit_pe_core_large_patch14_336",
        {"attn_pool_num_heads": 2, "attn_pool_mlp_ratio": 2.0},
        24,
    ),
    "core, no class token": ("vit_pe_core_gigantic_patch14_448", {}, 24),
    "lang": ("vit_pe_lang_large_patch14_448", {}, 0),
    "spatial": ("vit_pe_spatial_large_patch14_448", {}, 0),
    "spatial, no class token": ("vit_pe_spatial_gigantic_patch14_448", {}, 0),
}
Grid = list[tuple[int, int, int]]


class Outputs(NamedTuple):
    """What the formula says: per-patch rows end to end, per-frame rows of the rest."""

    tokens: Tensor
    taps: list[Tensor]
    prefix: Tensor
    pooled: Tensor | None
    projected: Tensor | None


def config_of(kind: str, **changes: Any) -> dict[str, Any]:
    """A config.json of timm's."""
    name, own, classes = KINDS[kind]
    made = SIZES | own | changes
    return {
        "architecture": name,
        "num_classes": classes,
        "num_features": made["embed_dim"],
        "model_args": made,
        "pretrained_cfg": {
            "tag": "fb",
            "input_size": [3, made["img_size"], made["img_size"]],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "num_classes": classes,
        },
    }


def draw(kind: str, seed: int = 0, **changes: Any) -> dict[str, Tensor]:
    """Random tensors of timm's names and shapes, every one of which matters."""
    config = config_of(kind, **changes)
    made = config["model_args"]
    width, inner = made["embed_dim"], int(made["embed_dim"] * made["mlp_ratio"])
    has_class = "no class token" not in kind
    side = made["img_size"] // made["patch_size"]

    def norm(name: str) -> Shapes:
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    shapes: Shapes = {
        "patch_embed.proj.weight": (width, 3, made["patch_size"], made["patch_size"]),
        "pos_embed": (1, side**2 + has_class, width),
        **norm("norm_pre"),
    }
    if has_class:
        shapes["cls_token"] = (1, 1, width)
    for layer in range(made["depth"]):
        block = f"blocks.{layer}."
        shapes |= norm(f"{block}norm1") | norm(f"{block}norm2")
        shapes |= linear(f"{block}attn.qkv", 3 * width, width)
        shapes |= linear(f"{block}attn.proj", width, width)
        shapes |= linear(f"{block}mlp.fc1", inner, width) | linear(f"{block}mlp.fc2", width, inner)
        if kind in ("lang", "spatial, no class token"):
            shapes |= {f"{block}gamma_1": (width,), f"{block}gamma_2": (width,)}
    if kind.startswith("core"):
        inner = int(width * made.get("attn_pool_mlp_ratio", 4.0))
        shapes |= norm("norm") | norm("attn_pool.norm") | {"attn_pool.latent": (1, 1, width)}
        shapes |= linear("attn_pool.q", width, width) | linear("attn_pool.kv", 2 * width, width)
        shapes |= linear("attn_pool.proj", width, width)
        shapes |= linear("attn_pool.mlp.fc1", inner, width)
        shapes |= linear("attn_pool.mlp.fc2", width, inner)
        shapes |= linear("head", config["num_classes"], width)
    return written.draw(shapes, seed)


def write(folder: Path, kind: str, tensors: dict[str, Tensor], **changes: Any) -> Path:
    """A checkpoint as timm publishes it."""
    return written.write(folder, config_of(kind, **changes), tensors)


def formula(tensors: dict[str, Tensor], kind: str, patches: Tensor, grid: Grid) -> Outputs:
    """Every frame by itself, in float64. Shapes: patches [T, P], (row, column, channel)."""
    made = config_of(kind)["model_args"]
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    frames = [(rows, columns) for count, rows, columns in grid for _ in range(count)]
    found = [
        run_frame(exact, made, part.double(), rows, columns)
        for part, (rows, columns) in zip(
            patches.split([rows * columns for rows, columns in frames]), frames, strict=True
        )
    ]
    tokens, taps, prefix, pooled, projected = zip(*found, strict=True)
    return Outputs(
        torch.cat(tokens),
        [torch.cat(layer) for layer in zip(*taps, strict=True)],
        torch.stack(prefix),
        None if pooled[0] is None else torch.stack(pooled),
        None if projected[0] is None else torch.stack(projected),
    )


def run_frame(
    tensors: dict[str, Tensor], made: dict[str, Any], patches: Tensor, rows: int, columns: int
) -> Outputs:
    """One frame."""
    heads, side = made["num_heads"], made["img_size"] // made["patch_size"]

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        weight = tensors[f"{name}.weight"]
        return F.layer_norm(x, weight.shape, weight, tensors[f"{name}.bias"], 1e-5)

    def mlp(x: Tensor, name: str) -> Tensor:
        return linear(F.gelu(linear(x, f"{name}.fc1")), f"{name}.fc2")

    pixels = image(patches, rows, columns, made["patch_size"])
    x = F.conv2d(pixels, tensors["patch_embed.proj.weight"], stride=made["patch_size"])
    x = x[0].flatten(1).T
    prefix = 1 if "cls_token" in tensors else 0
    table = tensors["pos_embed"][0, prefix:].T.reshape(1, -1, side, side)
    if (rows, columns) != (side, side):  # in float32, as everyone does it
        table = F.interpolate(table.float(), (rows, columns), mode="bilinear").double()
    x = x + table[0].flatten(1).T
    if prefix:
        x = torch.cat([tensors["cls_token"][0] + tensors["pos_embed"][0, :1], x])
    x = norm(x, "norm_pre")

    depth = x.shape[1] // heads
    frequencies = 10000.0 ** -(torch.arange(depth // 4, dtype=torch.float64) / (depth // 4))
    column = torch.arange(columns, dtype=torch.float64).repeat(rows) + prefix
    row = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns) + prefix
    angles = torch.cat([column.outer(frequencies), row.outer(frequencies)], 1)
    angles = torch.cat([angles.new_zeros(prefix, depth // 2), angles])
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # of neighbours, as numbers

    def rotate(x: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(2)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = torch.einsum("qhk,thk->hqt", query, key) / query.shape[-1] ** 0.5
        return torch.einsum("hqt,thk->qhk", scores.softmax(-1), value).flatten(1)

    taps = []
    for layer in range(made["depth"]):
        block = f"blocks.{layer}."
        first, second = (tensors.get(f"{block}gamma_{half}", 1.0) for half in (1, 2))
        qkv = linear(norm(x, f"{block}norm1"), f"{block}attn.qkv").unflatten(1, (3, heads, -1))
        query, key, value = (part.contiguous() for part in qkv.unbind(1))
        found = attend(rotate(query), rotate(key), value)
        x = x + first * linear(found, f"{block}attn.proj")
        x = x + second * mlp(norm(x, f"{block}norm2"), f"{block}mlp")
        taps.append(x[prefix:])
    if "attn_pool.latent" not in tensors:
        return Outputs(x[prefix:], taps, x[:prefix], None, None)
    x = norm(x, "norm")
    heads = made.get("attn_pool_num_heads", 8)
    query = linear(tensors["attn_pool.latent"][0], "attn_pool.q").unflatten(1, (heads, -1))
    key, value = linear(x, "attn_pool.kv").unflatten(1, (2, heads, -1)).unbind(1)
    pooled = linear(attend(query, key, value), "attn_pool.proj")
    pooled = pooled + mlp(norm(pooled, "attn_pool.norm"), "attn_pool.mlp")
    return Outputs(x[prefix:], taps, x[:prefix], pooled[0], linear(pooled, "head")[0])


def timm_model(kind: str, folder: Path) -> Any:
    """timm's own model, with the weights of a checkpoint's folder."""
    import timm  # pyright: ignore[reportMissingImports]

    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return model.eval()


@torch.no_grad()
def run_timm(model: Any, patches: Tensor, rows: int, columns: int, side: int) -> Outputs:
    """One image of the model's own grid."""
    weight = next(model.parameters())
    pixels = image(patches, rows, columns, side).to(weight.dtype)
    taps = model.forward_intermediates(pixels, output_fmt="NLC", intermediates_only=True)
    state = model.forward_features(pixels)
    first = state.shape[1] - rows * columns
    pooled = model.forward_head(state, pre_logits=True)[0] if model.attn_pool else None
    projected = model.forward_head(state)[0] if model.attn_pool else None
    return Outputs(state[0, first:], [tap[0] for tap in taps], state[0, :first], pooled, projected)
