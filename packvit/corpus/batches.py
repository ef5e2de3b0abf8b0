"""`packvit.Embedder`: photographs to vectors, batch by batch, in the jobs of other libraries."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from packvit.corpus.inputs.addresses import is_url
from packvit.corpus.inputs.sources import Input, read
from packvit.encoder import Encoder
from packvit.hub import load
from packvit.images.errors import ImageError
from packvit.images.resize import Resize
from packvit.packs.checks import check_projected

STATUS = "status"


class Embedder:
    """Adds the vectors of a batch's photographs to it: a function for `datasets.map` and Ray Data.

    A call takes a batch as `datasets.map(..., batched=True)` and Ray's `map_batches` give it, by
    the names of its columns, and adds two: `pooled` (or `projected`, of the space shared with text,
    where that is asked for), float32 [N, D], and `status`, "ok" or the code of what is wrong with
    an image, whose vector is NaN. A cell of `column` is a path, a URL, the bytes of a file,
    {"bytes": ..., "path": ...} as datasets has it with `Image(decode=False)`, a PIL image, or a
    uint8 array [height, width, 3].

    The encoder is loaded by the first call of each process, from `model`, a checkpoint's name or
    folder; a copy by pickle does not have it. `resize`, `max_patches` and `token_budget` are as in
    `Encoder.embed`, the others as in `packvit.load`.

    Raises, when called: ValueError if the batch has no such column, or has one of the new names;
    TypeError for a batch or a cell of another kind; what `packvit.load` raises.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        column: str = "image",
        *,
        projected: bool = False,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        attention: str = "auto",
        revision: str | None = None,
        invariant: bool = False,
        resize: Resize | None = None,
        max_patches: int | None = None,
        token_budget: int = 16384,
    ) -> None:
        self.model = os.fspath(model)
        self.column = column
        self.projected = projected
        self.device = device
        self.dtype = dtype
        self.attention = attention
        self.revision = revision
        self.invariant = invariant
        self.resize: Resize | None = resize
        self.max_patches = max_patches
        self.token_budget = token_budget
        self.encoder: Encoder | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has: everything but the encoder."""
        return {**vars(self), "encoder": None}

    @property
    def output(self) -> str:
        """The name of the column of vectors."""
        return "projected" if self.projected else "pooled"

    def __call__(self, batch: Any) -> dict[str, Any]:
        """Return the batch with the columns of vectors and codes."""
        columns = self.check_batch(batch)
        encoder = self.encoder = self.encoder or self.load()
        codes: list[str] = []
        sources = []
        for cell in columns[self.column]:
            try:
                sources.append(source_of(cell))
                codes.append("ok")
            except ImageError as error:
                codes.append(error.code)
        good = [place for place, code in enumerate(codes) if code == "ok"]

        def note(index: int, error: ImageError) -> None:
            codes[good[index]] = error.code

        found = encoder.embed(
            sources,
            token_budget=self.token_budget,
            projected=self.projected,
            resize=self.resize,
            max_patches=self.max_patches,
            errors=note,
        )
        vectors = np.full((len(codes), found.shape[1]), np.nan, np.float32)
        vectors[good] = found
        for place in np.flatnonzero(~np.isfinite(vectors).all(1)):
            vectors[place] = np.nan
            codes[place] = "non_finite" if codes[place] == "ok" else codes[place]
        added = {self.output: vectors, STATUS: np.array(codes, str)}
        # datasets gives a lazy batch, and adds what is returned to the columns that it has.
        return {**columns, **added} if isinstance(columns, dict) else added

    def check_batch(self, batch: Any) -> Mapping[str, Any]:
        """Return the columns of a batch, checked.

        Raises: ValueError or TypeError.
        """
        if not isinstance(batch, Mapping):
            raise TypeError(
                "A batch is a dict of columns, as datasets.map gives with batched=True and Ray's "
                f'map_batches with batch_format="numpy", but this is a {type(batch).__name__}.'
            )
        if self.column not in batch:
            raise ValueError(
                f'The batch has no column "{self.column}". It has: {", ".join(batch) or "none"}. '
                "Name one with column=."
            )
        if isinstance(batch[self.column], (str, bytes, Mapping)):
            raise TypeError("The batch is a single row. Call datasets.map with batched=True.")
        for name in (self.output, STATUS):
            if name in batch:
                raise ValueError(
                    f'The batch has a column "{name}" already, which this would write. Rename it.'
                )
        return batch

    def load(self) -> Encoder:
        """Return the encoder."""
        encoder = load(
            self.model,
            revision=self.revision,
            device=self.device,
            dtype=self.dtype,
            attention=self.attention,
            invariant=self.invariant,
        )
        if self.projected:
            check_projected(encoder.config, encoder.family.name)
        return encoder


def source_of(cell: Any) -> Any:
    """Return what `load_image` takes for a cell; the bytes of a URL are read.

    Raises: ImageError missing for an empty cell, or what reading a URL raises.
    """
    if isinstance(cell, Mapping):
        data = cell.get("bytes")
        cell = cell.get("path") if data is None else data
    if cell is None or (isinstance(cell, str) and not cell):
        raise ImageError("missing", "read")
    if isinstance(cell, str) and is_url(cell):
        return read(Input(cell, cell))
    return bytes(cell) if isinstance(cell, (bytes, bytearray, memoryview)) else cell
