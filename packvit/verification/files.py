"""Compare what is written and read: saved weights that the reference loads, and preprocessing."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from packvit.checkpoints.files import Checkpoint
from packvit.checkpoints.folders import PREPROCESSOR, PROCESSOR
from packvit.config import ImageConfig, Table
from packvit.encoder import Encoder
from packvit.verification import Comparison, VerifyOptions, timm_reference
from packvit.verification.drawing import draw, draw_photograph
from packvit.verification.references import (
    ReferenceModel,
    image_processor,
    import_transformers,
    load_model,
    processor_class,
    quiet,
    vision_weights,
)
from packvit.verification.rule import judge
from packvit.verification.running import run

PHOTOGRAPHS = ((300, 421), (640, 97), (97, 640), (61, 50), (1024, 683), (224, 224))  # height, width
# Of processors that resize in floating point: Pillow, which we resize with, rounds to 8 bits twice,
# by half a step each, after the rows and after the columns.
ROUNDING = 1.01 / 255  # 1.0 of them was seen, and float32 rounds too
# Entries of a configuration in transformers that are about files, and not about a model.
ABOUT_FILES = ("_name_or_path", "architectures", "dtype", "model_type", "transformers_version")


def compare_saved(encoder: Encoder, reference: ReferenceModel) -> Iterator[Comparison]:
    """Save with our `save_pretrained`, load with transformers, and compare weights and outputs."""
    with TemporaryDirectory() as folder:
        encoder.save_pretrained(folder)
        before, exact = (reference.load(dtype, "cpu") for dtype in (torch.float32, torch.float64))
        after, name, left = load_saved(reference, Path(folder), before)
    ours, theirs = vision_weights(after), vision_weights(before)
    skipped = {name for layout in reference.family.layouts for name in layout.skipped}
    wrong = {name for name in left if name.split(".")[0] not in skipped}
    wrong |= {
        name
        for name in ours.keys() | theirs.keys()
        if name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name])
    }
    where = f"saved by us, loaded as {name}"
    yield Comparison("weights", where, "count", "none", "float32", "none", float(len(wrong)), 0.0)
    other = different(entries_read(after), entries_read(before))
    yield Comparison("configuration", where, "count", "none", "float32", "none", other, 0.0)
    # And what the model says. Not to the bit: kernels round by where in memory a file's weights
    # happen to start.
    table = encoder.config.positions
    rows, columns = (5, 7)
    if isinstance(table, Table) and not table.any_grid:
        rows, columns = table.rows, table.columns
    rows, columns = rows * encoder.images.multiple, columns * encoder.images.multiple
    grid = ((1, rows, columns),) * (1 + 256 // (rows * columns))
    patches = draw(grid, encoder, seed=0)
    said, own, truth = (run(model, patches, grid)["tokens"] for model in (after, before, exact))
    for judged in judge(said, own, truth, dtype=torch.float32, blocks=encoder.config.layers):
        numbers = (judged.worst, judged.limit, judged.own)
        yield Comparison("tokens", where, judged.measure, "alone", "float32", "none", *numbers)


def load_saved(
    reference: ReferenceModel, folder: Path, before: nn.Module
) -> tuple[nn.Module, str, list[str]]:
    """Return what the reference's library makes of a folder that we wrote, and of which class.

    The third value names the weights that it left at random.
    """
    if reference.library == "timm":
        saved = ReferenceModel(reference.family, folder)
        return saved.load(torch.float32, "cpu"), saved.architecture, []
    # A tower that we do not write gets random weights, in its own size rather than the default.
    two = hasattr(before.config, "text_config")
    written = json.loads((folder / "config.json").read_bytes())
    name = written.get("architectures", [reference.architecture])[0]
    config = before.config if two and name == reference.architecture else None
    after, left = load_model(name, folder, torch.float32, config=config)
    return after, name, left


def entries_read(model: nn.Module) -> dict[str, Any]:
    """Return what a model read in config.json about its vision tower."""
    if timm_reference.is_timm(model):
        return timm_reference.entries_read(model)
    config: Any = model.config
    looking = getattr(config, "vision_config", config)
    # Beside a text tower the outer width of the projection counts, and the inner is a leftover.
    shared = {x: getattr(config, x) for x in ("projection_dim",) if hasattr(looking, x)}
    entries = looking.to_dict() | shared
    return {name: value for name, value in entries.items() if name not in ABOUT_FILES}


def different(some: Mapping[str, Any], others: Mapping[str, Any]) -> float:
    """Return how many entries are not the same in both."""
    names = some.keys() | others.keys()
    return float(sum(n not in some or n not in others or some[n] != others[n] for n in names))


def compare_taken_over(encoder: Encoder, model: nn.Module) -> Comparison:
    """Compare weights loaded from files with weights taken from the model in memory."""
    ours, theirs = encoder.state_dict(), type(encoder).from_transformers(model).state_dict()
    wrong = sum(
        name not in ours or name not in theirs or not torch.equal(ours[name].cpu(), theirs[name])
        for name in ours.keys() | theirs.keys()
    )
    where = "taken over from memory"
    return Comparison("weights", where, "count", "none", "float32", "none", float(wrong), 0.0)


def obstacle_to_photographs(reference: ReferenceModel, checkpoint: Checkpoint) -> str | None:
    """Return why preprocessing cannot be compared here, or None."""
    if reference.library == "timm":
        return None
    name = processor_class(reference.family, checkpoint.preprocessor)
    if image_processor(name) is None and not hasattr(import_transformers(), name):
        return f"pixels: {name} is not in transformers, and comes with the checkpoint"
    if image_processor(name) is None:
        return f"pixels: {name} needs torchvision, which is not installed"
    if checkpoint.preprocessor is None:
        return f"pixels: the checkpoint has no {PREPROCESSOR}, and no image settings in {PROCESSOR}"
    return None


def compare_photographs(
    encoder: Encoder, folder: Path, options: VerifyOptions
) -> Iterator[Comparison]:
    """Preprocess the same files with ours and the reference's code, and compare pixels.

    `folder` is the checkpoint's. What resizes with Pillow must be equal bit for bit.
    """
    prepare, limit = preparer(encoder, folder)
    draw = np.random.default_rng(options.seed)
    with TemporaryDirectory() as temporary:
        for height, width in PHOTOGRAPHS[:2] if options.quick else PHOTOGRAPHS:
            for suffix in ("png", "jpg"):
                path = Path(temporary) / f"{height}x{width}.{suffix}"
                draw_photograph(draw, height, width).save(path)
                pack = encoder.pack([path], resize="checkpoint")
                ours = encoder.to_values(pack.hidden_states).cpu()
                with Image.open(path) as photograph:
                    theirs, sides = prepare(photograph.convert("RGB"))
                if not encoder.family.processor_normalizes:
                    theirs = normalized(theirs, encoder.images)
                worst = torch.inf
                if sides == tuple(pack.grid_thw[0, 1:].tolist()):
                    worst = (ours.double() - theirs.double()).abs().max().item()
                where = f"{suffix}, {height} x {width} pixels"
                yield Comparison("pixels", where, "pixels", "none", "float32", "none", worst, limit)


def preparer(
    encoder: Encoder, folder: Path
) -> tuple[Callable[[Image.Image], tuple[Tensor, tuple[int, int]]], float]:
    """Return the reference's preprocessing, and how far off ours may be.

    It returns flattened patches and their (rows, columns).
    """
    patch = encoder.config.patch
    if encoder.family.reference.library == "timm":
        made = timm_reference.transform(folder)
        return (lambda photograph: cut(made(photograph), patch)), 0.0
    assert encoder.checkpoint is not None
    kind = image_processor(processor_class(encoder.family, encoder.checkpoint.preprocessor))
    with quiet():
        processor = kind.from_pretrained(folder)
    on_pillow = kind.__name__.endswith("Pil")
    limit = 0.0 if on_pillow else ROUNDING / min(encoder.images.std)
    return (lambda photograph: prepare(processor, photograph, patch)), limit


def normalized(values: Tensor, images: ImageConfig) -> Tensor:
    """Return values from 0 to 1 as a model normalises them. Shapes: [patches, P]."""
    numbers = torch.tensor([images.mean, images.std], dtype=torch.float32, device="cpu")
    mean, std = numbers.repeat(1, values.shape[1] // 3)
    return (values - mean) / std


def prepare(processor: Any, image: Image.Image, patch: int) -> tuple[Tensor, tuple[int, int]]:
    """Return a reference's normalised patches and their (rows, columns).

    Shapes: [patches, P], (row, column, channel); what is left over right and below is dropped, as
    the reference's convolution drops it.
    """
    made = processor(images=image, return_tensors="pt")
    if "image_grid_thw" in made:
        _, rows, columns = made["image_grid_thw"][0].tolist()
        if made["pixel_values"].ndim == 4:  # in raster order
            return made["pixel_values"].permute(0, 2, 3, 1).flatten(1), (rows, columns)
        side = processor.merge_size
        blocks = made["pixel_values"].unflatten(1, (3, -1, patch, patch))[:, :, 0]
        squares = blocks.view(rows // side, columns // side, side, side, 3, patch, patch)
        # to (row of squares, row, column of squares, column, row, column, channel)
        return squares.permute(0, 2, 1, 3, 5, 6, 4).reshape(rows * columns, -1), (rows, columns)
    if "spatial_shapes" in made:
        rows, columns = made["spatial_shapes"][0].tolist()
        return made["pixel_values"][0, : rows * columns], (rows, columns)
    return cut(made["pixel_values"][0], patch)


def cut(pixels: Tensor, patch: int) -> tuple[Tensor, tuple[int, int]]:
    """Return an image's patches and their (rows, columns). Shapes: [3, H, W] -> [patches, P]."""
    rows, columns = pixels.shape[1] // patch, pixels.shape[2] // patch
    whole = pixels[:, : rows * patch, : columns * patch]
    tiles = whole.reshape(3, rows, patch, columns, patch).permute(1, 3, 2, 4, 0)
    return tiles.reshape(rows * columns, -1), (rows, columns)
