"""Run a reference one image at a time: its outputs for every image of a pack."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from packvit.packs.grid import Grid
from packvit.verification.answers import PER_FRAME, Answers
from packvit.verification.references import projection, tower
from packvit.verification.timm_reference import is_timm, pixels_of, run_timm_frame
from packvit.verification.towers import is_tower, run_tower, tower_inputs


class RightInterpolation(TorchFunctionMode):
    """Work around torch's wrong antialiased interpolation to one column, by transposing."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given: dict[str, Any] = kwargs or {}
        size = given.get("size")
        if func is F.interpolate and given.get("antialias") and size and size[-1] == 1:
            turned = args[0].transpose(2, 3).contiguous()
            with torch._C.DisableTorchFunction():
                return F.interpolate(turned, **{**given, "size": size[::-1]}).transpose(2, 3)
        return func(*args, **given)


def interpolation_error(device: torch.device | str) -> float:
    """Return the error of torch's antialiased interpolation to one column on this device.

    With torch 2.13 on a CPU the error exceeds 1 for a table of N(0, 1), and references that
    antialias have it too.
    """
    image = torch.randn(
        1, 16, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu"
    ).to(device)
    found = F.interpolate(image, (9, 1), mode="bilinear", antialias=True)
    with RightInterpolation():
        right = F.interpolate(image, size=(9, 1), mode="bilinear", antialias=True)
    return (found - right).abs().max().item()


@torch.no_grad()
def run(
    model: nn.Module, patches: Sequence[Tensor], grid: Grid, *, interpolate: bool = False
) -> Answers:
    """Return the model's outputs, running every frame, or a tower's clip, by itself.

    Shapes: patches N x [patches, P], normalised, in the order (row, column, channel).
    """
    answers: dict[str, list[Tensor]] = {}
    for image, (frames, rows, columns) in zip(patches, grid, strict=True):
        if is_tower(tower(model)):  # a clip may be one sequence
            parts = [run_whole(tower(model), image, (frames, rows, columns))]
        elif is_timm(model):
            parts = [run_timm_frame(model, frame, rows, columns) for frame in image.chunk(frames)]
        else:
            parts = [
                run_frame(model, frame, rows, columns, interpolate) for frame in image.chunk(frames)
            ]
        for kind in parts[0]:
            outputs = [part[kind] for part in parts]
            joined = torch.stack(outputs) if kind in PER_FRAME else torch.cat(outputs, -2)
            answers.setdefault(kind, []).append(joined)
    return answers


def run_whole(model: nn.Module, patches: Tensor, place: tuple[int, int, int]) -> dict[str, Tensor]:
    """Return a tower's outputs for one image or clip."""
    weight = next(model.parameters())
    return run_tower(model, patches.to(weight.device, weight.dtype), place)


def run_frame(
    model: nn.Module, patches: Tensor, rows: int, columns: int, interpolate: bool
) -> dict[str, Tensor]:
    """Return the model's outputs for one frame."""
    looking = tower(model)
    weight = next(looking.parameters())
    patches = patches.to(weight.device, weight.dtype)
    take_normalized(looking)
    options = {"interpolate_pos_encoding": True} if interpolate else {}
    with RightInterpolation():
        out = looking(
            **inputs(looking, patches, rows, columns), output_hidden_states=True, **options
        )
    state = out.last_hidden_state[0]
    first = len(state) - rows * columns  # prefix tokens come first
    said = {
        "tokens": state[first:],
        "taps": torch.stack([layer[0, first:] for layer in out.hidden_states[1:]]),
    }
    if first:
        said["prefix"] = state[:first]
    if (pooled := getattr(out, "pooler_output", getattr(out, "summary", None))) is not None:
        said["pooled"] = pooled[0]
        if shared := projection(model):
            said["projected"] = shared(pooled)[0]
    return said


def take_normalized(model: Any) -> Any:
    """Have a model that normalises pixels by itself, and in float32, take normalised ones."""
    if hasattr(model, "make_preprocessor_external"):
        model.make_preprocessor_external()
    return model


def inputs(model: Any, patches: Tensor, rows: int, columns: int) -> dict[str, Tensor]:
    """Return the model's arguments for one image: pixels, or patches with mask and shape."""
    if is_timm(model):
        return {"pixel_values": pixels_of(patches, rows, columns)}
    if is_tower(model):
        return tower_inputs(model, patches, (1, rows, columns))
    if model.main_input_name == "pixel_values" and "num_patches" in model.config.to_dict():
        return {
            "pixel_values": patches[None],
            "pixel_attention_mask": torch.ones(
                1, len(patches), dtype=torch.float32, device=patches.device
            ),
            "spatial_shapes": torch.tensor([[rows, columns]], dtype=torch.int64, device="cpu"),
        }
    return {"pixel_values": pixels_of(patches, rows, columns)}


def last_state(model: Any, given: Mapping[str, Any], **options: Any) -> Tensor:
    """Return the tokens that leave a model, prefix and all, of arguments that `inputs` made."""
    if is_timm(model):
        return model.forward_features(given["pixel_values"])
    return model(**given, **options).last_hidden_state
