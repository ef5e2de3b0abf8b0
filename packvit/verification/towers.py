"""Run transformers' vision towers of multimodal models, in our order of patches.

Qwen's patches stand in blocks, square by square, or in windows of them, and are flattened (channel,
frame, row, column), an image being frames of one picture. Kimi's stand in raster order. None of our
rules are used.
"""

from typing import Any

import torch
from torch import Tensor

Place = tuple[int, int, int]  # (frames, rows, columns) of an image or a clip


def is_tower(model: Any) -> bool:
    """Return whether a model of transformers is a tower, which takes packs and merges squares."""
    config = getattr(model, "config", None)  # timm's have none
    return hasattr(config, "spatial_merge_size") or hasattr(config, "merge_kernel_size")


def merges_by_blocks(model: Any) -> bool:
    """Return whether its patches stand in blocks."""
    return hasattr(model.config, "spatial_merge_size")


def block_order(model: Any, place: Place) -> Tensor:
    """Return the raster place of each patch as a tower orders them. Shapes: [patches]."""
    frames, rows, columns = place
    raster = torch.arange(frames * rows * columns, dtype=torch.int64, device="cpu")
    if not merges_by_blocks(model):
        return raster
    side = model.config.spatial_merge_size
    blocks = raster.view(frames, rows // side, side, columns // side, side)
    return blocks.transpose(2, 3).flatten()


def last_order(model: Any, place: Place) -> Tensor:
    """Return the raster place of each token as the blocks leave them. Shapes: [patches]."""
    order = block_order(model, place)
    if not hasattr(model.config, "window_size"):
        return order
    from transformers.vision_utils import get_vision_window_index

    config, grid = model.config, torch.tensor([place], dtype=torch.int64, device="cpu")
    side = config.spatial_merge_size
    windows, _ = get_vision_window_index(grid, side, config.window_size, config.patch_size)
    return order.view(-1, side**2)[windows].flatten()


def tower_inputs(model: Any, patches: Tensor, place: Place) -> dict[str, Tensor]:
    """Return a tower's arguments for one image or clip. Shapes: patches [patches, P]."""
    side = model.config.patch_size
    grid = torch.tensor([place], dtype=torch.int64, device=patches.device)
    order = block_order(model, place).to(patches.device)
    cut = patches[order].view(-1, side, side, 3).permute(0, 3, 1, 2)
    if not merges_by_blocks(model):
        return {"pixel_values": cut, "grid_thw": grid}
    frames = model.config.temporal_patch_size
    repeated = cut.unsqueeze(2).expand(-1, -1, frames, -1, -1)
    return {"hidden_states": repeated.flatten(1), "grid_thw": grid}


def run_tower(model: Any, patches: Tensor, place: Place) -> dict[str, Tensor]:
    """Return a tower's outputs for one image or clip.

    Shapes: tokens [patches, D], taps [layers, patches, D], merged [squares, L], deepstack [layers,
    squares, L].
    """
    last: list[Tensor] = []  # what leaves the last block, where that is normed at the end
    watched = getattr(model, "final_layernorm", None)
    handle = watched and watched.register_forward_pre_hook(lambda _, given: last.append(given[0]))
    out = model(**tower_inputs(model, patches, place), output_hidden_states=True)
    if handle:
        handle.remove()
    back = last_order(model, place).argsort().to(patches.device)
    layers = [*out.hidden_states[1:-1], *(last or out.hidden_states[-1:])]
    said = {
        "tokens": out.last_hidden_state[back],
        "taps": torch.stack([layer[back] for layer in layers]),
    }
    if merges_by_blocks(model):
        said["merged"] = out.pooler_output
    if deep := out.get("deepstack_features"):
        said["deepstack"] = torch.stack(list(deep))
    return said
