"""Read the rows and features that a job takes over from other folders. No torch."""

from dataclasses import dataclass, fields, replace
from functools import lru_cache

import numpy as np
import pyarrow as pa

from packvit.corpus import WriteError
from packvit.corpus.folder.known import Reuse, find_place, open_index
from packvit.corpus.folder.layout import read_manifest, reading
from packvit.corpus.folder.parts import Outputs, read_part
from packvit.corpus.folder.rows import Row
from packvit.corpus.folder.stores import find_folder

PARTS_KEPT = 2  # in memory, of those that were read last


@dataclass(frozen=True, slots=True)
class Taken:
    """A row that was taken over.

    Shapes: vectors [D] and lists [tokens, D] under each name.
    """

    row: Row
    vectors: dict[str, np.ndarray]
    lists: dict[str, np.ndarray]


class Taker:
    """Takes rows over; parts stay in memory for a while, since rows mostly keep their order."""

    def __init__(self, reuse: Reuse, outputs: Outputs) -> None:
        self.index = open_index(reuse.index)
        self.folders = [find_folder(folder) for folder in reuse.folders]
        self.fingerprints = reuse.fingerprints
        self.outputs = outputs
        self.load = lru_cache(maxsize=PARTS_KEPT)(self.read)

    def take(self, row: Row) -> Taken:
        """Return the whole row for one of which the id and the sha256 are known.

        Raises: WriteError if its part cannot be read.
        """
        assert row.sha256
        place = find_place(self.index, row.sha256)
        assert place is not None  # a worker found it
        plain, vectors, lists = self.load(place.folder, place.part)
        found = Row(**plain.slice(place.row, 1).to_pylist()[0])
        if found.sha256 != row.sha256:
            raise WriteError(f"{self.folders[place.folder] / place.part} changed during the job.")
        return Taken(
            replace(found, id=row.id),
            {name: values[place.row] for name, values in vectors.items()},
            {name: values[place.row] for name, values in lists.items()},
        )

    def read(
        self, folder: int, part: str
    ) -> tuple[pa.Table, dict[str, np.ndarray], dict[str, "Lists"]]:
        """Return the rows of a part, and their features."""
        path = self.folders[folder] / part
        try:
            with reading(path):
                table = read_part(path)
        except (FileNotFoundError, pa.ArrowException) as error:
            raise WriteError(f"{path} is missing or damaged: no row can be taken over.") from error
        # Another model's part may have the same rows. Its job writes its manifest before its parts.
        manifest = read_manifest(self.folders[folder]) or {}
        if manifest.get("fingerprint") != self.fingerprints[folder]:
            raise WriteError(f"{self.folders[folder]} was embedded anew during the job.")
        plain = table.select([field.name for field in fields(Row)])
        vectors = {
            name: fill_nulls(table[name].combine_chunks(), width)
            for name, width in self.outputs.vectors.items()
        }
        lists = {name: Lists(table[name].combine_chunks()) for name in self.outputs.lists}
        return plain, vectors, lists


def fill_nulls(column: pa.FixedSizeListArray, width: int) -> np.ndarray:
    """Return vectors [rows, D], 0 where they are null."""
    values = column.drop_null().flatten().to_numpy()
    filled = np.zeros((len(column), width), values.dtype)
    filled[column.is_valid().to_numpy(zero_copy_only=False)] = values.reshape(-1, width)
    return filled


class Lists:
    """A column of lists of vectors [tokens, D]."""

    def __init__(self, column: pa.ListArray) -> None:
        width = column.type.value_type.list_size
        self.offsets = column.offsets.to_numpy()
        self.values = column.values.flatten().to_numpy().reshape(-1, width)

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]
