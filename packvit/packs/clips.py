"""Frames of one video as patches: what `Encoder.pack` takes beside images.

A patch holds as many frames as the checkpoint's do, flattened (frame, row, column, channel), or
channel first.
"""

from collections.abc import Sequence

import numpy as np

from packvit.config import PatchOrder
from packvit.images.decode import Source, load_image
from packvit.images.patches import Cutting, Patches

Clip = np.ndarray | Sequence[Source]  # uint8 [frames, height, width, 3], or a list of images


def frames_of(source: Source | Clip) -> Sequence[Source] | None:
    """Return the frames of a clip, or None for an image."""
    if isinstance(source, np.ndarray):
        return list(source) if source.ndim == 4 else None
    return source if isinstance(source, list | tuple) else None


def cut_clip(frames: Sequence[Source], cutting: Cutting, temporal: int) -> Patches:
    """Return the patches of a clip; the last frame is repeated where `temporal` wants more.

    Raises: ValueError for a clip without frames, or with frames of several sizes; ImageError.
    """
    cutting = cutting.for_frames()
    cut = [cutting.cut(load_image(frame).image) for frame in frames]
    if not cut:
        raise ValueError("A clip holds no frame, but must hold at least one.")
    sides = {(frame.rows, frame.columns) for frame in cut}
    if len(sides) > 1:
        raise ValueError(
            f"The frames of a clip become {len(sides)} different grids, {sorted(sides)[:2]} among "
            "them, but must be of one size. Resize them to one."
        )
    cut += [cut[-1]] * (-len(cut) % temporal)
    groups = [cut[first : first + temporal] for first in range(0, len(cut), temporal)]
    patches = [lay_frames([one.patches for one in group], cutting.order) for group in groups]
    return Patches(np.concatenate(patches), cut[0].rows, cut[0].columns, len(groups))


def lay_frames(frames: Sequence[np.ndarray], order: PatchOrder) -> np.ndarray:
    """Return patches of several frames side by side. Shapes: n x [patches, P] -> [patches, n P]."""
    leading = 1 if order == "hwc" else 3  # a frame's number stands behind the channel's, if first
    parts = [patches.reshape(len(patches), leading, -1) for patches in frames]
    return np.stack(parts, 2).reshape(len(parts[0]), -1)


def of_one_width(cut: Sequence[Patches], temporal: int, order: PatchOrder) -> list[np.ndarray]:
    """Return the patches of images and clips; beside clips, an image is a clip of equal frames."""
    widest = max(one.patches.shape[1] for one in cut)
    return [
        one.patches
        if one.patches.shape[1] == widest
        else lay_frames([one.patches] * temporal, order)
        for one in cut
    ]
