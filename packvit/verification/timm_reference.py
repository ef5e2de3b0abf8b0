"""Run timm's models one image at a time: the reference of families that transformers lacks.

timm reads a checkpoint by its own code, and none of our rules, positions or layers are used. It is
imported only when it is asked for, and comes with torchvision.

Source: timm 1.0.31, models/_factory.py, models/_hub.py, models/eva.py.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from packvit.checkpoints.layouts import Variant
from packvit.version import version_of

SIZES: Mapping[str, Any] = {  # of the small random models
    "embed_dim": 64,
    "depth": 3,
    "num_heads": 4,
    "mlp_ratio": 1.5,
    "patch_size": 16,
    "img_size": 112,
    "ref_feat_shape": (7, 7),
}
SEEN = ("input_size", "interpolation", "crop_pct", "mean", "std", "num_classes")


def import_timm(said: str = "Verification of this family compares with timm") -> Any:
    """Return the library.

    Raises: ImportError that begins as `said`, with the line that installs it.
    """
    try:
        import timm  # pyright: ignore[reportMissingImports] # needs torchvision
    except ImportError as error:
        raise ImportError(
            f"{said}, which is not installed: pip install 'packvit[bench]'"
        ) from error
    return timm


def is_timm(model: nn.Module) -> bool:
    """Return whether a model is one of timm's."""
    return type(model).__module__.partition(".")[0] == "timm"


def architecture(config: Mapping[str, Any]) -> str:
    """Return timm's version and what a config.json of its names."""
    return f"timm {version_of('timm')} {config.get('architecture')}"


def load(folder: Path, dtype: torch.dtype) -> nn.Module:
    """Return the model of a folder in eval mode; its angles stay in float32, as ours do."""
    model = import_timm().create_model(f"local-dir:{folder}", pretrained=True)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def create(name: str, **entries: Any) -> nn.Module:
    """Return a model by the name of its architecture, with weights to be drawn."""
    return import_timm().create_model(name, **entries).eval()


def create_small(variant: Variant) -> nn.Module:
    """Return a small model of a variant."""
    return create(variant.model, **{**SIZES, **variant.entries})


def save(model: nn.Module, folder: Path) -> None:
    """Write a model as timm publishes it."""
    from timm.models import save_for_hf  # pyright: ignore[reportMissingImports]

    save_for_hf(model, str(folder), safe_serialization=True)


def entries_read(model: Any) -> dict[str, Any]:
    """Return what a model read in config.json: its layers, and how it wants its pixels."""
    return {"layers": str(model)} | {name: model.pretrained_cfg.get(name) for name in SEEN}


def transform(folder: Path) -> Callable[[Image.Image], Tensor]:
    """Return timm's preprocessing of a checkpoint. Shapes: -> [3, height, width]."""
    from timm.data import (  # pyright: ignore[reportMissingImports]
        create_transform,
        resolve_data_config,
    )

    model = import_timm().create_model(f"local-dir:{folder}", pretrained=False)
    made: Any = create_transform(**resolve_data_config(model=model))
    return made


def pixels_of(patches: Tensor, rows: int, columns: int) -> Tensor:
    """Return flattened patches as an image. Shapes: [patches, P] -> [1, 3, height, width]."""
    side = int((patches.shape[1] // 3) ** 0.5)
    tiles = patches.view(rows, columns, side, side, 3).permute(4, 0, 2, 1, 3)
    return tiles.reshape(1, 3, rows * side, columns * side)


def run_timm_frame(model: Any, patches: Tensor, rows: int, columns: int) -> dict[str, Tensor]:
    """Return the outputs of timm's model for one frame. Shapes: patches [patches, P]."""
    kept: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda module, given, out: kept.append(out[0]))
        for block in model.blocks
    ]
    patches = patches.to(next(model.parameters()).dtype)
    try:
        if hasattr(model, "embeds"):  # NaFlexVit takes patches and their places
            every = [
                torch.arange(side, dtype=torch.int64, device="cpu") for side in (rows, columns)
            ]
            places = torch.cartesian_prod(*every)[None].to(patches.device)
            real = torch.ones(1, len(patches), dtype=torch.bool, device=patches.device)
            state = model.forward_features(patches[None], places, real)["patches"]
        else:
            state = model.forward_features(pixels_of(patches, rows, columns))
    finally:
        for hook in hooks:
            hook.remove()
    first = getattr(model, "embeds", model).num_prefix_tokens
    said = {"tokens": state[0, first:], "taps": torch.stack(kept)[:, first:]}
    if first:
        said["prefix"] = state[0, :first]
    if getattr(model, "attn_pool", None) is not None:
        said["pooled"] = model.forward_head(state, pre_logits=True)[0]
        if model.num_classes:
            said["projected"] = model.forward_head(state)[0]
    return said
