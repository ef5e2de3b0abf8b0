"""Run transformers' vision towers of multimodal models, in our order of patches.

Their patches stand in blocks, square by square, or in windows of them; each is flattened (channel,
frame, row, column), and an image is frames of one picture. None of our rules are used.
"""

from typing import Any

import torch
from torch import Tensor


def is_tower(model: Any) -> bool:
    """Return whether a model of transformers is a tower, which takes packs and merges squares."""
    return hasattr(model.config, "spatial_merge_size")


def block_order(model: Any, rows: int, columns: int) -> Tensor:
    """Return the raster place of each patch of a frame in the order of blocks. Shapes: [patches]"""
    side = model.config.spatial_merge_size
    raster = torch.arange(rows * columns, dtype=torch.int64, device="cpu")
    blocks = raster.view(rows // side, side, columns // side, side)
    return blocks.transpose(1, 2).flatten()


def last_order(model: Any, rows: int, columns: int) -> Tensor:
    """Return the raster place of each token of a frame as blocks leave them."""
    order = block_order(model, rows, columns)
    if not hasattr(model.config, "window_size"):
        return order
    from transformers.vision_utils import get_vision_window_index

    config, grid = model.config, torch.tensor([[1, rows, columns]], dtype=torch.int64, device="cpu")
    side = config.spatial_merge_size
    windows, _ = get_vision_window_index(grid, side, config.window_size, config.patch_size)
    return order.view(-1, side**2)[windows].flatten()


def tower_inputs(model: Any, patches: Tensor, rows: int, columns: int) -> dict[str, Tensor]:
    """Return a tower's arguments for one frame. Shapes: patches [patches, P]."""
    side, frames = model.config.patch_size, model.config.temporal_patch_size
    order = block_order(model, rows, columns).to(patches.device)
    cut = patches[order].view(-1, 1, side, side, 3).expand(-1, frames, -1, -1, -1)
    grid = torch.tensor([[1, rows, columns]], dtype=torch.int64, device=patches.device)
    return {"hidden_states": cut.permute(0, 4, 1, 2, 3).flatten(1), "grid_thw": grid}


def run_tower(model: Any, patches: Tensor, rows: int, columns: int) -> dict[str, Tensor]:
    """Return a tower's outputs for one frame.

    Shapes: tokens [patches, D], taps [layers, patches, D], merged [squares, L], deepstack [layers,
    squares, L].
    """
    out = model(**tower_inputs(model, patches, rows, columns), output_hidden_states=True)
    back = last_order(model, rows, columns).argsort().to(patches.device)
    said = {
        "tokens": out.last_hidden_state[back],
        "taps": torch.stack([layer[back] for layer in out.hidden_states[1:]]),
        "merged": out.pooler_output,
    }
    if deep := out.get("deepstack_features"):
        said["deepstack"] = torch.stack(list(deep))
    return said
