"""Checks of what a caller gives an encoder."""

from collections.abc import Sequence
from operator import index

import torch
from torch import Tensor

from packvit.config import EncoderConfig, VideoRotary
from packvit.packs.grid import Grid, GridLike, as_tensor, read_grid

PLACE_MEANING = "Each row of patch_positions is (time, row, column) of a patch."


def check_config(config: object, encoder: str) -> None:
    """Refuse anything but a configuration, such as the name of a checkpoint.

    Raises: TypeError saying how `encoder` loads one.
    """
    if not isinstance(config, EncoderConfig):
        raise TypeError(
            f"{encoder} is built from an EncoderConfig, not from {config!r}. To load a checkpoint "
            f"write {encoder}.from_pretrained(name_or_folder), or packvit.load(name_or_folder)."
        )


def read_inputs(
    hidden_states: Tensor,
    grid_thw: GridLike,
    patch_positions: GridLike | None,
    config: EncoderConfig,
    family: str,
    device: torch.device,
) -> tuple[Grid, Tensor | None]:
    """Check the arguments of a forward; return the grid on the host, and the positions.

    Raises: TypeError; ValueError.
    """
    check_patches(hidden_states, config, device)
    patches = len(hidden_states)
    grid = read_grid(grid_thw, patches=patches)
    return grid, read_positions(patch_positions, config, family, patches, device)


def check_patches(hidden_states: Tensor, config: EncoderConfig, device: torch.device) -> None:
    """Refuse what cannot be the patches of a pack for an encoder on `device`.

    Raises: ValueError for a shape or a device that does not fit; TypeError for other kinds.
    """
    side = config.patch
    if not isinstance(hidden_states, Tensor):
        raise TypeError(
            f"hidden_states is a {type(hidden_states).__name__}, but must be a tensor "
            f"[total_patches, {config.patch_dim}]. `encoder.pack(images)` makes it."
        )
    of_video = config.temporal * config.patch_dim
    if hidden_states.ndim != 2 or hidden_states.shape[1] not in (config.patch_dim, of_video):
        or_video = f", or {of_video} of videos, {config.temporal} frames of them a patch"
        raise ValueError(
            f"hidden_states is {list(hidden_states.shape)}, but must be "
            f"[total_patches, {config.patch_dim}]: flattened patches of {side} x {side} "
            f"pixels and 3 channels{or_video if config.temporal > 1 else ''}. "
            "`encoder.pack(images)` makes them."
        )
    if hidden_states.dtype != torch.uint8 and not hidden_states.is_floating_point():
        raise TypeError(
            f"hidden_states holds {hidden_states.dtype}, but must be uint8 (raw pixels) or "
            "floating point (already normalised)."
        )
    if hidden_states.device != device:
        raise ValueError(
            f"hidden_states is on {hidden_states.device}, but the encoder is on {device}. "
            f'Move it: hidden_states.to("{device}").'
        )


def read_positions(
    patch_positions: GridLike | None,
    config: EncoderConfig,
    family: str,
    patches: int,
    device: torch.device,
) -> Tensor | None:
    """Check the positions that a caller gives for patches, and return them on `device`.

    On a device it is copied to the host once, which waits for it.

    Shapes: [T, 3], any integer dtype -> [T, 3] int64.
    Raises: ValueError for another shape, or naming the first that is out of range; TypeError
    for what holds no numbers.
    """
    if patch_positions is None:
        return None
    frames = check_video(config, family).frames
    places = as_tensor(patch_positions, "patch_positions", PLACE_MEANING)
    if places.shape != (patches, 3):
        raise ValueError(
            f"patch_positions is {list(places.shape)}, but must be [{patches}, 3], as there are "
            f"{patches} patches. {PLACE_MEANING}"
        )
    if places.is_floating_point() or places.is_complex() or places.dtype == torch.bool:
        raise ValueError(
            f"patch_positions holds {places.dtype}, but must hold integers. {PLACE_MEANING}"
        )
    host = places.cpu().numpy()
    wrong = (host < 0).any(1)
    if frames is not None:
        wrong |= host[:, 0] >= frames
    if wrong.any():
        first = wrong.argmax()
        times = "" if frames is None else f", and times end at {frames - 1}"
        raise ValueError(
            f"patch_positions[{first}] is {tuple(host[first].tolist())}, but (time, row, column) "
            f"count from 0{times}."
        )
    return places.to(device, torch.int64, non_blocking=True)


def check_video(config: EncoderConfig, family: str) -> VideoRotary:
    """Return the rotary positions of an encoder whose positions include the time.

    Raises: ValueError for any other encoder.
    """
    if not isinstance(config.rotary, VideoRotary):
        raise ValueError(
            f"patch_positions says where each patch stands, which this {family} checkpoint takes "
            "from grid_thw alone. Leave it out."
        )
    return config.rotary


def check_outputs(
    config: EncoderConfig,
    family: str,
    taps: Sequence[object],
    *,
    pooled: bool,
    projected: bool,
    merged: bool,
) -> list[int]:
    """Check which outputs are asked for, and return the tapped layers counted from the front.

    Raises: ValueError for what the checkpoint does not have; TypeError for a tap of another kind.
    """
    if projected:
        check_projected(config, family)
        if not pooled:
            raise ValueError("projected=True needs pooled=True. Use `pooled`.")
    if merged and config.merger is None:
        raise ValueError(
            f"merged=True asks for a language model's tokens, but this {family} checkpoint has no "
            "merger. Leave it out; packvit.merging lays squares together."
        )
    return [count_from_front(layer, config.layers) for layer in taps]


def check_projected(config: EncoderConfig, family: str) -> None:
    """Refuse `projected` without a projection in the checkpoint.

    Raises: ValueError.
    """
    if config.projection is None:
        raise ValueError(
            f"projected=True asks for a space shared with text, but this {family} checkpoint has "
            "no projection. Use `pooled`."
        )


def count_from_front(layer: object, layers: int) -> int:
    """Return the number of a tapped layer, counted from the front.

    Raises: ValueError for a layer out of range; TypeError for anything but a whole number.
    """
    if isinstance(layer, bool) or not hasattr(layer, "__index__"):
        raise TypeError(
            f"taps holds {layer!r}, but must hold whole numbers: 0 to {layers - 1}, or -1 to "
            f"{-layers} from the end."
        )
    number = index(layer)  # pyright: ignore[reportArgumentType] # it has __index__
    if not -layers <= number < layers:
        raise ValueError(
            f"taps asks for layer {number}, but this encoder has {layers}: "
            f"0 to {layers - 1}, or -1 to {-layers} from the end."
        )
    return number % layers
