"""What a checkpoint says it is: the configuration of its encoder, and how it wants its images."""

from dataclasses import replace
from math import isfinite
from typing import NamedTuple

from packvit.checkpoints.errors import CheckpointError
from packvit.checkpoints.files import Checkpoint
from packvit.checkpoints.image_settings import image_config_from
from packvit.checkpoints.layouts import Family, Layout, named_type
from packvit.checkpoints.rules import bind
from packvit.config import EncoderConfig, ImageConfig, TransformerConfig


class Described(NamedTuple):
    """What a checkpoint says it is."""

    layout: Layout
    config: EncoderConfig
    images: ImageConfig


def describe(family: Family, checkpoint: Checkpoint) -> Described:
    """Return a checkpoint's layout and configurations, by its config.json and tensor names.

    Raises: CheckpointError if it is not one of `family`.
    """
    if not family.claims(checkpoint.config):
        raise CheckpointError(
            f'{checkpoint.name} is of model type "{named_type(checkpoint.config)}", but '
            f"{family.name} is {' or '.join(family.model_types)}. "
            "packvit.load finds the right family by itself."
        )
    layout = family.layout(checkpoint.tensors, checkpoint.config)
    config = layout.read(checkpoint.config, checkpoint.tensors)
    layout = replace(layout, rules=bind(layout.rules, config.heads))
    check_sizes(config, checkpoint)
    file = checkpoint.settings_file
    try:
        images = image_config_from(
            checkpoint.preprocessor,
            family.images(config),
            file=file,
            normalizes=family.processor_normalizes,
        )
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    except (TypeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{file} of {checkpoint.name} has an entry of another type than its processor takes "
            f"({error}). Compare it with the published one."
        ) from error
    numbers = (*images.mean, *images.std)
    if not all(map(isfinite, numbers)) or min(images.std) <= 0:
        raise CheckpointError(
            f"{file} says image_mean {images.mean} and image_std {images.std}, but they must be "
            "finite, and the latter above 0."
        )
    return Described(layout, config, images)


def check_sizes(config: TransformerConfig, checkpoint: Checkpoint) -> None:
    """Refuse sizes that no encoder can have, before an encoder is built.

    Raises: CheckpointError naming them.
    """
    if config.width % config.heads or config.head_dim % 2:
        raise CheckpointError(
            f"config.json of {checkpoint.name} says {config.heads} heads for a width of "
            f"{config.width}, which does not divide into heads of an even width."
        )
    if config.layers > len(checkpoint.tensors):
        raise CheckpointError(
            f"config.json of {checkpoint.name} says {config.layers} layers, but there are "
            f"{len(checkpoint.tensors)} tensors in all."
        )
