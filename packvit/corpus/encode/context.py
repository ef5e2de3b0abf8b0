"""What embedding a shard needs: encoder, options, decoders, and who decodes JPEGs."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from packvit.corpus import UsageError
from packvit.corpus.decode.prepare import Preprocessing
from packvit.corpus.decode.queue import Decoders
from packvit.corpus.settings import EmbedOptions
from packvit.encoder import Encoder
from packvit.gpu.decoder import Decoded, JpegDecoder, check_decoder
from packvit.gpu.jpeg import JpegPlan
from packvit.gpu.nvjpeg import NvJpeg

# Returns files' patches on the device, and the indices of those it refuses: JpegDecoder.decode.
DecodeJpegs = Callable[[Sequence[bytes | np.ndarray], Sequence[JpegPlan]], Decoded]


@dataclass(frozen=True, slots=True, eq=False)
class EmbedContext:
    """What embedding a shard needs; `decode_jpegs` is set if the device decodes JPEGs."""

    encoder: Encoder
    options: EmbedOptions
    decoders: Decoders
    decode_jpegs: DecodeJpegs | None = None

    @property
    def preprocessing(self) -> Preprocessing:
        """How images become patches for the encoder."""
        return make_preprocessing(self.encoder, self.options)


def make_context(
    encoder: Encoder,
    options: EmbedOptions,
    decoders: Decoders,
    engine: Future[NvJpeg] | None = None,
) -> EmbedContext:
    """Return the context for these options; the only place that decides who decodes JPEGs.

    `engine` is what `begin_engine` started, where it did.

    Raises: UsageError naming what is missing if the device should decode JPEGs and cannot.
    """
    if options.decode != "gpu":
        return EmbedContext(encoder, options, decoders)
    try:
        decoder = JpegDecoder(encoder.images, encoder.patch_order, encoder.device, engine=engine)
    except (ImportError, RuntimeError) as error:
        raise UsageError(str(error)) from error
    return EmbedContext(encoder, options, decoders, decoder.decode)


def check_decoding(encoder: Encoder, options: EmbedOptions) -> None:
    """Check that other processes can decode as asked, as far as can be told without a decoder.

    Raises: UsageError, as `make_context`.
    """
    if options.decode == "gpu":
        try:
            check_decoder(encoder.device)
        except (ImportError, RuntimeError) as error:
            raise UsageError(str(error)) from error


def make_preprocessing(encoder: Encoder, options: EmbedOptions) -> Preprocessing:
    """Return how images become patches for an encoder."""
    return Preprocessing(
        encoder.images,
        encoder.patch_order,
        options.resize,
        options.max_patches,
        options.max_pixels,
        options.decode,
        options.reuse.index if options.reuse else None,
    )
