"""The oracle: transformers' models run one image at a time, and the slow, obvious formulas.

Nothing here shares code with packvit. Weights are drawn at a scale where every tensor matters, so
that one which is ignored, swapped or misplaced shows in the output.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Aimv2VisionConfig, Aimv2VisionModel

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 14,
    "image_size": 5 * 14,
}


class Outputs(NamedTuple):
    """What a reference says about a pack: per-patch rows end to end, per-frame rows of pooled."""

    tokens: Tensor
    hidden_states: list[Tensor]  # leaving each block
    pooled: Tensor | None


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


def aimv2(seed: int = 0, **changes: Any) -> Aimv2VisionModel:
    """A small AIMv2 of transformers, with any entry of its configuration changed."""
    model = Aimv2VisionModel(Aimv2VisionConfig(**(TINY | changes)))
    randomise(model, seed)
    return model


def scaled_difference(ours: Tensor, theirs: Tensor) -> float:
    """max|ours - theirs| / max(1, max|theirs| / 4): absolute for small outputs, else relative."""
    assert ours.shape == theirs.shape
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


@torch.no_grad()
def run(model: Any, patches: Tensor, grid: list[tuple[int, int, int]], **options: Any) -> Outputs:
    """Forward every frame by itself, and lay the outputs end to end."""
    side = model.config.patch_size
    frames = [(rows, columns) for count, rows, columns in grid for _ in range(count)]
    parameter = next(model.parameters())
    tokens, layers, pooled = [], [], []
    for part, (rows, columns) in zip(
        patches.split([rows * columns for rows, columns in frames]), frames, strict=True
    ):
        pixels = image(part, rows, columns, side).to(parameter.device, parameter.dtype)
        out = model(pixels, output_hidden_states=True, **options)
        tokens.append(out.last_hidden_state[0])
        layers.append([state[0] for state in out.hidden_states[1:]])
        pooled.append(out.pooler_output)
    return Outputs(
        torch.cat(tokens),
        [torch.cat(parts) for parts in zip(*layers, strict=True)],
        None if pooled[0] is None else torch.cat(pooled),
    )


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
