"""From a name or a folder to a text encoder, with its tokenizer."""

import os
from dataclasses import replace

import torch

from packvit.checkpoints import files as checkpoints
from packvit.checkpoints import parameters as weights
from packvit.checkpoints.description import check_sizes
from packvit.checkpoints.errors import CheckpointError
from packvit.checkpoints.files import Checkpoint
from packvit.checkpoints.layouts import outer_prefixes
from packvit.model.attention import resolve
from packvit.model.device import find_device, find_dtype
from packvit.text.encoder import TextEncoder
from packvit.text.tokenizing import find_tokenizer
from packvit.text.towers import TEXT_TOWERS, TextLayout, TextTower


def load_text(
    name_or_folder: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    attention: str = "auto",
) -> TextEncoder:
    """Load a text tower, with the checkpoint's own tokenizer.

    Takes the names that `packvit.load` takes if a text tower stands beside the images', and text
    towers that were saved alone. The vectors of the latter are in the space of images only if the
    file holds its projection, or needs none; they have no scale of logits. `device` None is CUDA if
    there is one; `dtype` None is bfloat16 there and float32 elsewhere. The scale and bias of logits
    stay in float32.

    Raises: CheckpointError saying what is wrong with the checkpoint; ValueError for an option;
    ImportError with the install line of what its tokenizer needs.
    """
    device = find_device(device)
    dtype = find_dtype(dtype, device)
    checkpoint = checkpoints.read(name_or_folder, revision=revision)
    tower = tower_of(checkpoint)
    layout = tower.layout(checkpoint.tensors, checkpoint.config)
    config = tower.read(checkpoint.config)
    if not layout.holds("projection.weight"):
        config = replace(config, projection=None)
    if not layout.holds("logit_scale"):
        config = replace(config, scaled=False, first_scale=None, logit_bias=False)
    check_sizes(config, checkpoint)
    tokenizer = find_tokenizer(checkpoint, tower.tokenizer, config)
    with torch.inference_mode(False):  # so that it can be trained, wherever it is loaded
        with torch.device("meta"):
            encoder = TextEncoder(config, tokenizer, attention=attention)
        shapes = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
        first = {}
        if config.first_scale is not None and not is_held("logit_scale", layout, checkpoint):
            shapes.pop("logit_scale", None)
            scale = torch.tensor([config.first_scale], dtype=torch.float32, device=device)
            first = {"logit_scale": scale}
        state = weights.load(
            shapes,
            checkpoint.tensors,
            layout.rules,
            unread=lambda name: any(
                outer[:-1] in layout.unread for outer in outer_prefixes(f"{name}.")
            ),
            # Exact numbers of two: in bf16 a scale of 100 would be off by 1 %.
            place=lambda t: t.to(device, dtype if t.numel() > 1 else torch.float32, copy=True),
        )
        encoder.load_state_dict(state | first, assign=True)
        if config.sinusoids:  # no checkpoint holds them: they are computed, on the host
            encoder.embeddings.positions = encoder.embeddings.positions.to(device, dtype)
    encoder.checkpoint = checkpoint
    resolve(attention, encoder.attention_inputs)  # refused here, not in a forward
    return encoder.eval()


def is_held(ours: str, layout: TextLayout, checkpoint: Checkpoint) -> bool:
    """Return whether the checkpoint holds what our parameter is read from."""
    _, names = weights.find(ours, layout.rules)
    return all(name in checkpoint.tensors for name in names)


def tower_of(checkpoint: Checkpoint) -> TextTower:
    """Return the text tower that a checkpoint has by its config.json.

    Raises: CheckpointError listing the model types that have one.
    """
    found = checkpoint.config.get("model_type")
    for tower in TEXT_TOWERS:
        if found in (*tower.model_types, *tower.alone_types):
            return tower
    known = ", ".join(name for tower in TEXT_TOWERS for name in tower.model_types)
    raise CheckpointError(
        f'{checkpoint.name} is of model type "{found}", in which packvit knows no text tower. It '
        f"knows those of: {known}."
    )
