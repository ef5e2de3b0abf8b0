"""Accuracy of fp8 next to bf16, on weights of several kinds.

No published weights were measured, so how accurate fp8 is on those is not known.
"""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from packvit import hub
from packvit.bench import SEED
from packvit.bench.models import Model
from packvit.bench.workloads import mixed_sizes
from packvit.encoder import Encoder
from packvit.images.patches import cut_patches
from packvit.model.layers import Block, first_linear
from packvit.model.options import LoadOptions
from packvit.packs.grid import Grid

IMAGES = 8
OUTLIERS, FACTOR = 3, 100  # channels of every norm


def fp8_accuracy(model: Model, device: torch.device) -> list[dict[str, Any]]:
    """Return how close tokens in bf16 and in fp8 are to those in fp32, for each kind of weights.

    Raises: ValueError if fp8 cannot run here.
    """
    found = []
    for title, encoder in kinds(model, device):
        grid = mixed_sizes(IMAGES, 240, 1008)
        patches = torch.from_numpy(pictures(grid, encoder.config.patch)).to(device)
        fp8, whole = copy.deepcopy(encoder), copy.deepcopy(encoder).float()
        fp8.switch_on(LoadOptions(fp8=True))
        with torch.inference_mode():
            exact, *others = (
                candidate(patches, torch.tensor(grid, dtype=torch.int64, device="cpu")).float()
                for candidate in (whole, encoder, fp8)
            )
        near = [F.cosine_similarity(tokens, exact) for tokens in others]
        found.append({"weights": title} | dict(zip(("bf16", "fp8"), map(said, near), strict=True)))
    return found


def said(cosines: Tensor) -> dict[str, float]:
    """Return the mean, the first percentile and the least cosine."""
    p1 = cosines.quantile(0.01).item()
    return {"mean": cosines.mean().item(), "p1": p1, "least": cosines.min().item()}


def kinds(model: Model, device: torch.device) -> Iterator[tuple[str, Encoder]]:
    """Yield encoders in bf16: random weights with and without outliers, and the tiny model."""
    random = model.encoder.from_transformers(model.reference)
    yield f"{model.name}, {model.weights}", random
    title = f"the same, {OUTLIERS} channels of every norm x {FACTOR}"
    yield title, plant(copy.deepcopy(random), undo=False)
    yield f"{title}, undone by the matrices that read them", plant(random, undo=True)
    yield "tiny, which comes with packvit", hub.load("tiny", device=device, dtype=torch.bfloat16)


@torch.no_grad()
def plant(encoder: Encoder, *, undo: bool) -> Encoder:
    """Scale a few input channels of every block's matrices by FACTOR, to make outliers.

    `undo` divides the matrices' columns by FACTOR, so that the function stays the same, as in
    trained models with outliers.
    """
    draw = torch.Generator().manual_seed(SEED)
    for block in encoder.encoder.layers:
        assert isinstance(block, Block)
        for norm, reader in (
            (block.attention_norm, block.attention.qkv),
            (block.mlp_norm, first_linear(block.mlp)),
        ):
            channels = torch.randperm(
                encoder.config.width, generator=draw, dtype=torch.int64, device="cpu"
            )[:OUTLIERS]
            for parameter in norm.parameters():
                parameter[channels.to(parameter.device)] *= FACTOR
            if undo:
                weight = reader.get_parameter("weight")
                weight[:, channels.to(weight.device)] /= FACTOR
    return encoder


def pictures(grid: Grid, patch: int) -> np.ndarray:
    """Return patches of 1/f noise, the spectrum of photographs.

    Shapes: -> uint8 [T, P].
    """
    draw = np.random.default_rng(SEED)
    cut = []
    for _, rows, columns in grid:
        height, width = rows * patch, columns * patch
        y, x = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
        fall = 1 / np.maximum(np.hypot(y, x), 1 / max(height, width))
        noise = np.fft.rfft2(draw.standard_normal((3, height, width)))
        waves = np.fft.irfft2(noise * fall, s=(height, width))
        levels = 128 + 48 * waves / waves.std()
        pixels = np.clip(levels, 0, 255).astype(np.uint8).transpose(1, 2, 0)
        cut.append(cut_patches(np.ascontiguousarray(pixels), patch))
    return np.concatenate(cut)
