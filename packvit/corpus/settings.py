"""The options of a job, checked against the encoder."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from packvit.config import EncoderConfig, MostPatches, Table
from packvit.corpus import UsageError
from packvit.corpus.decode.prepare import Decode
from packvit.corpus.decode.queue import IMAGE_TIMEOUT, PIXELS_IN_FLIGHT, Decoders
from packvit.corpus.folder.exports import Format
from packvit.corpus.folder.known import Reuse
from packvit.corpus.folder.parts import DtypeOut, Outputs
from packvit.corpus.inputs.kept import Kind
from packvit.corpus.runners.launching import Launched
from packvit.encoder import Encoder
from packvit.gpu.decoder import BYTES_A_PIXEL, PIXELS_AT_ONCE
from packvit.images.decode import MAX_PIXELS
from packvit.images.resize import NATIVE_MOST_PATCHES, Resize, resize_plan
from packvit.model.memory import peak
from packvit.model.options import LoadOptions
from packvit.packs.checks import count_from_front

# Rows of a part, a power of two. 64 are about a minute of a large model on a CPU, and with 1,000
# tokens of 1,024 float16 each a part of 131 MB.
FEWEST_ROWS, MOST_ROWS = 64, 1024
FEWEST_PARTS = 16  # of a job on GPUs, as far as its rows allow: two for each GPU of a host
TYPICAL = (2000, 3000)  # height and width of a photograph


@dataclass(frozen=True, slots=True, kw_only=True)
class InputOptions:
    """Where photographs are found, as they were named; `packvit.embed` says what each means."""

    photos: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    column: str = "path"
    image_column: str = "image"
    keep: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelChoice:
    """The encoder of a job, and how it is loaded; None is the embedded "tiny"."""

    model: str | os.PathLike[str] | Encoder | None = None
    revision: str | None = None
    options: LoadOptions = field(default_factory=LoadOptions)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How a job runs, and what it does to its folder; it changes no number."""

    format: Format = "parquet"
    rows_per_part: int | None = None  # None: what the folder has, or `choose_rows`
    processes: int | None = None
    launched: Launched | None = None  # these processes, where they are started already
    ray: str | None = None
    verify: bool = False
    overwrite: bool = False
    retry_errors: bool | Sequence[str] = False
    shard: str | None = None
    reuse: tuple[str, ...] = ()
    reuse_across_versions: bool = False
    trust_mtime: bool = False
    update: bool = False

    @property
    def here(self) -> bool:
        """Whether this process embeds by itself."""
        return self.ray is None and self.processes in (None, 1)


@dataclass(frozen=True, slots=True)
class EmbedOptions:
    """What decides a row's features besides the encoder, and how images are decoded.

    Units: `max_patches` and `token_budget` count patches, of an image and of a pack;
    `image_timeout` seconds; `pixels_in_flight` pixels.
    """

    resize: Resize | None = None
    max_patches: int | None = None
    tokens: bool = False
    taps: tuple[int, ...] = ()  # layers: from the front, once `fit_options` has seen the encoder
    dtype_out: DtypeOut = "float16"  # of tokens and taps
    vector_dtype: DtypeOut = "float32"  # of pooled and projected
    token_budget: int = 16384
    max_pixels: int = MAX_PIXELS
    decode: Decode = "pil"
    image_timeout: float = IMAGE_TIMEOUT
    workers: int = 1
    pixels_in_flight: int = PIXELS_IN_FLIGHT
    rows_per_part: int = FEWEST_ROWS  # of every part but the last, which may have fewer
    text_space: Literal["pooled", "projected"] | None = None  # the column that texts compare with
    reuse: Reuse | None = None  # the rows that may be taken over
    keep: tuple[tuple[str, Kind], ...] = ()  # columns that come with the inputs, and their types

    def outputs(self, config: EncoderConfig) -> Outputs:
        """Return which features a part holds."""
        lists = ("tokens",) if self.tokens else ()
        lists += tuple(f"tap_{tap}" for tap in self.taps)
        pooled = config.vector_width if config.merger or config.summary else None
        projected = config.projection if self.text_space == "projected" else None
        lists_in, vectors_in = self.dtype_out, self.vector_dtype
        return Outputs(config.width, lists, lists_in, pooled, projected, vectors_in, self.keep)

    def decoders(self) -> Decoders:
        """Return the decoders of one embedding process; no worker is started yet."""
        return Decoders(
            self.workers,
            pixels_in_flight=self.pixels_in_flight,
            image_timeout=self.image_timeout,
        )


def check_options(options: EmbedOptions) -> None:
    """Refuse counts below 1 and unknown choices."""
    counts = ("max_patches", "token_budget", "max_pixels", "workers", "pixels_in_flight")
    for name in (*counts, "rows_per_part"):
        count = getattr(options, name)
        if count is not None and count < 1:
            raise UsageError(f"{name} is {count}, but must be 1 or more.")
    if not options.image_timeout > 0:
        raise UsageError(f"image_timeout is {options.image_timeout}, but must be above 0 seconds.")
    if options.dtype_out not in ("float16", "float32"):
        raise UsageError(f'dtype_out is "{options.dtype_out}". Choose float16 or float32.')
    if options.decode not in ("pil", "fast", "gpu"):
        raise UsageError(f'decode is "{options.decode}". Choose pil, fast or gpu.')


def fit_options(encoder: Encoder, options: EmbedOptions) -> EmbedOptions:
    """Check the options against the encoder, and fill in the defaults that it decides.

    Raises: UsageError if the encoder has no such layer, if photographs would get grids that it has
    no positions for, or if the largest of them would not fit in a pack.
    """
    images, positions, resize = encoder.images, encoder.config.positions, options.resize
    try:
        layers = tuple(
            sorted({count_from_front(layer, encoder.config.layers) for layer in options.taps})
        )
        plans = [  # of two photographs whose grids only a fixed size makes equal
            resize_plan(*size, images, resize=resize, max_patches=options.max_patches)
            for size in ((600, 900), (3000, 1000))
        ]
    except ValueError as error:
        raise UsageError(str(error)) from error
    grids = {(plan.rows, plan.columns) for plan in plans}
    if isinstance(positions, Table) and not (positions.any_grid or encoder.embeddings.interpolate):
        native = (positions.rows, positions.columns)
        if grids != {native}:
            raise UsageError(
                f"This checkpoint learned positions for {native[0]} x {native[1]} patches alone, "
                f"and photographs would be resized to other grids. Leave `resize` out, or "
                'ask for `positions="interpolate"`.'
            )
    resize = resize or ("native" if images.sizing is None else "checkpoint")
    max_patches, most = options.max_patches, 0
    if resize == "native":
        max_patches = most = max_patches or NATIVE_MOST_PATCHES
    elif isinstance(images.sizing, MostPatches):
        max_patches = most = max_patches or images.sizing.patches
    elif len(grids) == 1:  # else nothing bounds it: a larger image fills a pack by itself
        most = plans[0].rows * plans[0].columns
    if most > options.token_budget:
        raise UsageError(
            f"An image may have {most} patches, but token_budget lets a pack hold "
            f"{options.token_budget}. Raise token_budget, or lower max_patches."
        )
    return replace(options, resize=resize, max_patches=max_patches, taps=tuple(sorted(layers)))


def typical_patches(encoder: Encoder, options: EmbedOptions) -> int:
    """Return the patches of a photograph of common size and shape."""
    height, width = TYPICAL
    plan = resize_plan(
        height, width, encoder.images, resize=options.resize, max_patches=options.max_patches
    )
    return plan.rows * plan.columns


def choose_rows(device: torch.device | None, inputs: int, *, large: bool) -> int:
    """Return the rows per part of a job of `inputs` on a kind of device; None is any.

    A killed job loses what is not committed, so parts are small on a CPU, whose rows take long, and
    where rows are `large`: with tokens or taps. On a GPU they are larger, so that more packs are
    full, unless that leaves fewer than `FEWEST_PARTS`. The number of processes does not matter,
    since the output must not depend on it.
    """
    small = large or (device is not None and device.type == "cpu")
    rows = FEWEST_ROWS if small else MOST_ROWS
    while rows > FEWEST_ROWS and inputs <= rows * (FEWEST_PARTS - 1):
        rows //= 2
    return rows


def check_memory(encoder: Encoder, options: EmbedOptions, free: int | None) -> None:
    """Refuse a token budget whose packs are unlikely to fit in the `free` bytes of a device.

    The bound of `memory.py` is about 1.5 times what a forward takes, so two thirds of it are
    compared; a pack that still does not fit is halved when it is encoded.

    Raises: UsageError with the budget that would fit.
    """
    if free is None:
        return
    beside = "the weights"
    if options.decode == "gpu":
        decoding = PIXELS_AT_ONCE * BYTES_A_PIXEL
        free = max(0, free - decoding)
        beside += f" and {decoding / 2**30:.1f} GiB for decoding"
    config, budget = encoder.config, options.token_budget
    taps, merged = len(options.taps), len(config.merger.deepstack) if config.merger else 0
    lists = taps + options.tokens
    bound = peak(config, encoder.dtype.itemsize, taps=taps + merged, lists=lists)
    rows = 1 + config.prefix / 64  # of the stream for each patch: images have 64 or more
    needed = bound.activations(round(budget * rows))
    if 2 * needed <= 3 * free:
        return
    fits = int(bound.most_tokens(free) / rows)
    advice = f"Lower token_budget to {fits}" if fits else "Choose a smaller model"
    raise UsageError(
        f"A pack of token_budget {budget} patches takes up to {needed / 2**30:.1f} GiB beside "
        f"{beside}, and {encoder.device} has {free / 2**30:.1f} GiB free. {advice}, or free the "
        "device of other programs."
    )
