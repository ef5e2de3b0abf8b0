"""transformers' vision towers of multimodal models, image by image, in our order of tokens.

Their tokens stand in blocks of 2 x 2, and their patches are flattened (channel, frame, row,
column). Nothing here shares code with packvit.
"""

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from reference import randomise
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5VisionModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
from transformers.vision_utils import get_vision_window_index

from packvit.packs.features import Features
from packvit.verification.rule import judge

SIZES: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 4,
    "out_hidden_size": 40,
}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen3_vl": (
        Qwen3VLVisionModel,
        {"num_position_embeddings": 49, "deepstack_visual_indexes": [0, 2]},
    ),
    "qwen3_5": (Qwen3_5VisionModel, {"num_position_embeddings": 49}),
    "qwen2_5_vl": (
        Qwen2_5_VisionTransformerPretrainedModel,
        {"patch_size": 14, "window_size": 112, "fullatt_block_indexes": [1]},
    ),
    "qwen2_vl": (Qwen2VisionTransformerPretrainedModel, {"patch_size": 14, "mlp_ratio": 2}),
}

Grid = list[tuple[int, int, int]]


class Outputs(NamedTuple):
    """What a tower says about a pack: patches and squares in raster order, end to end."""

    tokens: Tensor
    taps: list[Tensor]
    merged: Tensor
    deepstack: list[Tensor]


def build(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A small random tower, every tensor of which matters."""
    model, own = KINDS[kind]
    entries = SIZES | own | changes
    if kind == "qwen2_vl":  # which has other words for the width, and for that behind the merger
        entries |= {"embed_dim": entries["hidden_size"], "hidden_size": entries["out_hidden_size"]}
        del entries["out_hidden_size"], entries["intermediate_size"]
    tower = randomise(model(model.config_class(**entries)), seed)
    for name, parameter in tower.named_parameters():
        if "ln_q" in name and name.endswith("weight"):  # is named like no norm
            parameter.data = 1 + 0.6 * parameter.data
    return tower


def block_order(frames: int, rows: int, columns: int) -> Tensor:
    """The raster places of patches in the order of blocks of 2 x 2. Shapes: [patches]."""
    raster = torch.arange(frames * rows * columns)
    blocks = raster.view(frames, rows // 2, 2, columns // 2, 2)
    return blocks.transpose(2, 3).flatten()


def to_theirs(patches: Tensor, side: int) -> Tensor:
    """Patches of images or of two frames, flattened as the towers take them."""
    frames = patches.shape[1] // (3 * side**2)
    cut = patches.view(-1, frames, side, side, 3).expand(-1, 2, -1, -1, -1)
    return cut.permute(0, 4, 1, 2, 3).flatten(1)


def run_image(model: Any, patches: Tensor, grid: tuple[int, int, int]) -> Outputs:
    """Forward one image or clip."""
    order = block_order(*grid)
    left = order  # as the last block leaves them: in windows of blocks, where there are windows
    if size := getattr(model.config, "window_size", None):
        windows, _ = get_vision_window_index(torch.tensor([grid]), 2, size, model.config.patch_size)
        left = order.view(-1, 4)[windows].flatten()
    back = left.argsort()
    weight = next(model.parameters())
    given = to_theirs(patches.to(weight.dtype), model.config.patch_size)[order]
    out = model(given, grid_thw=torch.tensor([grid]), output_hidden_states=True)
    taps = [state[back] for state in out.hidden_states[1:]]
    deep = list(out.get("deepstack_features") or [])
    return Outputs(out.last_hidden_state[back], taps, out.pooler_output, deep)


def forward(model: Any, patches: Tensor, grid: Grid) -> Outputs:
    """Forward every image by itself, and lay the outputs end to end."""
    lengths = [frames * rows * columns for frames, rows, columns in grid]
    found = [
        run_image(model, part, one) for part, one in zip(patches.split(lengths), grid, strict=True)
    ]
    tokens, taps, merged, deep = zip(*found, strict=True)
    return Outputs(
        torch.cat(tokens),
        [torch.cat(layer) for layer in zip(*taps, strict=True)],
        torch.cat(merged),
        [torch.cat(layer) for layer in zip(*deep, strict=True)],
    )


def misses(
    found: Features, model: Any, patches: Tensor, grid: Grid, exactness: torch.dtype | None = None
) -> list[str]:
    """What in `found` is further from float64 than the tower in its precision, in words.

    The towers turn queries in float32 at the most, so `exactness` float32 is for float64.
    """
    with torch.no_grad():
        patches = patches.to(next(model.parameters()).dtype)
        theirs = forward(model, patches, grid)
        truth = forward(copy.deepcopy(model).double(), patches.double(), grid)
    missed = []
    for name, ours, own, exact, blocks in outputs(found, theirs, truth):
        for judged in judge(
            [ours], [own], [exact], dtype=exactness or found.tokens.dtype, blocks=blocks
        ):
            if not judged.passed:
                missed.append(f"{name}: {judged}")
    return missed


def outputs(
    found: Features, theirs: Outputs, truth: Outputs
) -> Iterator[tuple[str, Tensor, Tensor, Tensor, int]]:
    """Yield every output of all three, with its name and the blocks before it."""
    blocks = len(theirs.taps)
    assert len(found.taps) == blocks
    assert len(found.deepstack) == len(theirs.deepstack)
    assert found.merged is not None
    yield "tokens", found.tokens, theirs.tokens, truth.tokens, blocks
    yield "merged", found.merged, theirs.merged, truth.merged, blocks + 1
    for layer, tap in found.taps.items():
        yield f"tap {layer}", tap, theirs.taps[layer], truth.taps[layer], layer + 1
    for place, (layer, tokens) in enumerate(found.deepstack.items()):
        own, exact = theirs.deepstack[place], truth.deepstack[place]
        yield f"deepstack {layer}", tokens, own, exact, layer + 2
