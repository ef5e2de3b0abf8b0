"""Checkpoints written for tests: tensors by name and shape, drawn so that each matters."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from packvit.encoder import Encoder

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def draw(shapes: Shapes, seed: int) -> dict[str, Tensor]:
    """Random tensors: norms around one, matrices that keep the size of what they multiply."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            drawn[name] = 1 + 0.3 * noise
        elif name.endswith("weight"):
            drawn[name] = noise / noise[0].numel() ** 0.5
        else:
            drawn[name] = 0.5 * noise
    return drawn


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def check_gradients(
    encoder: Encoder,
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    folder: Path,
) -> None:
    """Check that a checkpoint's tensors get the same gradients from our outputs and a formula's.

    Ours are put in the parameters' place and saved, so that they come under the checkpoint's names.
    """
    generator = torch.Generator().manual_seed(0)
    for name in [name for name, output in ours.items() if output.numel()]:
        weight = torch.randn(ours[name].shape, generator=generator, dtype=torch.float64)
        for side in (ours, theirs):
            (side[name] * weight).sum().backward(retain_graph=True)
    for parameter in encoder.parameters():
        assert parameter.grad is not None
        parameter.data = parameter.grad
    encoder.origin = None
    encoder.save_pretrained(folder)
    gradients = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        assert tensor.grad is not None
        assert (gradients[name] - tensor.grad).norm() <= 1e-5 * tensor.grad.norm(), name
