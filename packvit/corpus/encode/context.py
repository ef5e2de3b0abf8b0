"""What shards are embedded with, and who decodes their JPEGs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from packvit.corpus import WrongUse
from packvit.corpus.decode.prepare import Recipe
from packvit.corpus.decode.queue import Decoders
from packvit.corpus.settings import Options
from packvit.encoder import Encoder
from packvit.gpu.decoder import Decoded, JpegDecoder
from packvit.gpu.jpeg import JpegPlan

# Returns files' patches on the device, and the places of those it refuses: JpegDecoder.decode.
DecodeJpegs = Callable[[Sequence[bytes | np.ndarray], Sequence[JpegPlan]], Decoded]


@dataclass(frozen=True, slots=True, eq=False)
class Tools:
    """What shards are embedded with; `decode_jpegs` is there if the device is to decode them."""

    encoder: Encoder
    options: Options
    decoders: Decoders
    decode_jpegs: DecodeJpegs | None = None

    @property
    def recipe(self) -> Recipe:
        """How images become patches for the encoder."""
        return recipe(self.encoder, self.options)


def equip(encoder: Encoder, options: Options, decoders: Decoders) -> Tools:
    """Return the tools that the options ask for: the one place that decides who decodes JPEGs.

    Raises: WrongUse if the device is to decode them and cannot, with what is missing.
    """
    if options.decode == "pil":
        return Tools(encoder, options, decoders)
    try:
        decoder = JpegDecoder(encoder.images, encoder.patch_order, encoder.device)
    except (ImportError, RuntimeError) as error:
        raise WrongUse(str(error)) from error
    return Tools(encoder, options, decoders, decoder.decode)


def recipe(encoder: Encoder, options: Options) -> Recipe:
    """Return how images become patches for an encoder."""
    return Recipe(
        encoder.images,
        encoder.patch_order,
        options.resize,
        options.max_patches,
        options.max_pixels,
        options.decode,
    )
