"""The patch tokens of photographs, encoded a pack at a time, as often as needed.

The preprocessed pixels of all photographs are kept. Up to `KEPT` tokens are kept, and the others
are computed again for each pass: an exact PCA takes two.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from packvit.corpus import UsageError
from packvit.corpus.decode.prepare import Prepared
from packvit.corpus.decode.queue import Decoders
from packvit.corpus.encode.context import make_preprocessing
from packvit.corpus.encode.packs import encode_halved
from packvit.corpus.folder.rows import Row
from packvit.corpus.inputs.sources import Input
from packvit.corpus.settings import EmbedOptions, check_options, fit_options
from packvit.encoder import Encoder
from packvit.images.decode import Source, load_image
from packvit.images.errors import ImageError
from packvit.packs.planning import plan_packs

KEPT = 65536  # tokens: 256 MiB at a width of 1024
MOST = 140  # photographs of a sheet: at most 62,000 pixels tall, and JPEG allows 65,535

# Called with the rows of photographs that were read or encoded since the last call.
Watch = Callable[[Sequence[Row]], None]


class NothingToDraw(ValueError):
    """No photograph can be drawn."""


class Tokens(NamedTuple):
    """The features of one photograph: tokens [rows * columns, D], pooled [D], float32."""

    tokens: Float[np.ndarray, "T D"]
    pooled: Float[np.ndarray, " D"]


@dataclass(slots=True)
class Photographs:
    """Photographs cut into patches, and the encoder for them.

    `options` chooses its outputs: the tokens, or the tap of one layer.
    """

    encoder: Encoder
    options: EmbedOptions
    prepared: list[Prepared]
    watch: Watch
    kept: dict[int, Tokens] = field(default_factory=dict)  # by index in `prepared`
    reported: set[int] = field(default_factory=set)  # indices whose rows went to `watch`

    @property
    def usable(self) -> list[int]:
        """The indices of the photographs without error so far."""
        return [i for i, one in enumerate(self.prepared) if one.row.status == "ok"]

    @property
    def errors(self) -> list[Row]:
        """The rows of the photographs that cannot be drawn."""
        return [one.row for one in self.prepared if one.row.status != "ok"]

    @property
    def source(self) -> str:
        """The name of the tokens for titles: the model, and the layer if one was chosen."""
        checkpoint = self.encoder.checkpoint
        name = checkpoint.name if checkpoint else type(self.encoder).__name__
        return f"{name}, layer {self.options.taps[0]}" if self.options.taps else name

    def refuse_errors(self) -> None:
        """Raise the ImageError of the first photograph with an error."""
        for index, one in enumerate(self.prepared):
            if one.row.status != "ok":
                raise ImageError(one.row.status, "encode", one.row.note, index)

    def grid(self, place: int) -> tuple[int, int]:
        """Return the rows and columns of a usable photograph, in patches."""
        row = self.prepared[place].row
        assert row.rows is not None
        assert row.columns is not None
        return row.rows, row.columns

    def pixels(self, place: int) -> UInt8[np.ndarray, "height width 3"]:
        """Return the preprocessed pixels of a usable photograph."""
        patches, (rows, columns) = self.prepared[place].patches, self.grid(place)
        assert patches is not None
        side = self.encoder.config.patch
        if self.encoder.patch_order == "hwc":
            cut = patches.reshape(rows, columns, side, side, 3).transpose(0, 2, 1, 3, 4)
        else:
            cut = patches.reshape(rows, columns, 3, side, side).transpose(0, 3, 1, 4, 2)
        return cut.reshape(rows * side, columns * side, 3)

    def encode(self) -> Iterator[tuple[int, Tokens]]:
        """Yield the index and tokens of every usable photograph, one forward for each pack.

        A photograph whose tokens are not finite becomes an error and is skipped.

        Raises: NothingToDraw if no photograph is left.
        """
        todo = [place for place in self.usable if place not in self.kept]
        yield from list(self.kept.items())
        room = KEPT - sum(len(one.tokens) for one in self.kept.values())
        budget = self.options.token_budget
        # Where image sizes are unbounded, an image larger than the budget gets its own pack.
        sizes = [min(self.grid(place)[0] * self.grid(place)[1], budget) for place in todo]
        for pack in plan_packs(sizes, budget):
            places = [todo[index] for index in pack]
            images = [self.prepared[place] for place in places]
            encoded, _, _ = encode_halved(self.encoder, images, self.options)
            if rows := [encoded[i].row for i, j in enumerate(places) if j not in self.reported]:
                self.watch(rows)
            self.reported.update(places)
            for place, one in zip(places, encoded, strict=True):
                if one.row.status != "ok":
                    self.prepared[place] = Prepared(one.row)
                    continue
                [tokens] = one.lists.values()
                found = Tokens(tokens, one.vectors["pooled"])
                if len(tokens) <= room:
                    # The arrays are views of the whole pack.
                    self.kept[place] = Tokens(tokens.copy(), one.vectors["pooled"].copy())
                    room -= len(tokens)
                yield place, found
        if not self.usable:
            raise NothingToDraw("No photograph has finite features, so there is nothing to draw.")

    def maps(
        self, function: Callable[[Float[np.ndarray, "T D"]], np.ndarray]
    ) -> dict[int, np.ndarray]:
        """Return `function` of every photograph's tokens, as [rows, columns, ...]."""
        return {
            place: (made := function(one.tokens)).reshape(*self.grid(place), *made.shape[1:])
            for place, one in self.encode()
        }


def choose_outputs(
    encoder: Encoder, images: int, options: EmbedOptions, layer: int | None
) -> EmbedOptions:
    """Return options for the tokens, or the tap of `layer`, checked against the encoder.

    Raises: UsageError if they do not fit, or for no images or more than a sheet takes.
    """
    if not 1 <= images <= MOST:
        raise UsageError(
            f"{images:,} photographs were given, but a picture takes 1 to {MOST}. "
            "Name fewer at a time."
        )
    check_options(options)
    taps = () if layer is None else (layer,)
    wanted = replace(options, tokens=layer is None, taps=taps, dtype_out="float32")
    return fit_options(encoder, wanted)


def read_photographs(
    encoder: Encoder,
    inputs: Sequence[Input],
    options: EmbedOptions,
    watch: Watch,
    *,
    layer: int | None = None,
) -> Photographs:
    """Read photographs as `packvit embed` does; unreadable ones become errors.

    Raises: UsageError if the options do not fit the encoder.
    """
    options = choose_outputs(encoder, len(inputs), options, layer)
    with Decoders(min(options.workers, len(inputs))) as decoders:
        ahead = options.max_pixels  # they do not wait: all are kept
        prepared = list(decoders.prepare_all(inputs, make_preprocessing(encoder, options), ahead))
    if bad := [one.row for one in prepared if one.patches is None]:
        watch(bad)
    return Photographs(encoder, options, prepared, watch)


def take_photographs(
    encoder: Encoder, images: Sequence[Source], options: EmbedOptions, *, layer: int | None = None
) -> Photographs:
    """Read and cut images given by a caller: paths, PIL images or uint8 arrays.

    Raises: ImageError with the index of the first unreadable image; UsageError as above.
    """
    options = choose_outputs(encoder, len(images), options, layer)
    preprocessing, prepared = make_preprocessing(encoder, options), []
    for index, source in enumerate(images):
        try:
            photo = load_image(source)
            cut = preprocessing.cut(photo.image)
        except ImageError as error:
            error.index = index
            raise
        named = isinstance(source, (str, os.PathLike))
        name = os.fsencode(source).decode("utf-8", "replace") if named else f"image {index}"
        row = Row(name, width=photo.width, height=photo.height, frames=1)
        prepared.append(Prepared(replace(row, rows=cut.rows, columns=cut.columns), cut.patches))
    return Photographs(encoder, options, prepared, lambda rows: None)
