"""`packvit.read`: a finished feature folder as ids, a matrix and a table. No torch."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from packvit.corpus import UsageError
from packvit.corpus.folder.commits import Commit
from packvit.corpus.folder.layout import decode_manifest, encode_manifest, read_commits
from packvit.corpus.folder.names import CURRENT, FORMATS, names_of
from packvit.corpus.folder.opening import MOST_MANIFEST, find_flaw, open_own, read_own
from packvit.corpus.folder.parts import Outputs, read_part
from packvit.corpus.folder.sharding import WHOLE, find_shard_flaw, rows_of, shard_of
from packvit.corpus.folder.stores import Folder, StorePath, find_folder
from packvit.corpus.folder.swapping import restore

TRIES = 3  # to read a folder that is replaced meanwhile


@dataclass(frozen=True, slots=True, eq=False)
class FeatureFolder:
    """The rows of a feature folder, one for every input, in their order.

    Shapes: N ids and statuses; matrix [N, D], of the dtype that was written, NaN where a row is an
    error. Where the job wrote `_exports/pooled.npy` (`--format npy`), the matrix is that file,
    memory-mapped if it is on a disk; writing to the matrix changes the copy in memory only.
    """

    folder: Folder
    ids: tuple[str, ...]
    statuses: tuple[str, ...]  # ok, or an error code
    matrix: np.ndarray
    commits: tuple[Commit, ...]  # of the parts, as the log lists them
    text_space: str | None = None  # the column that texts compare with: pooled or projected
    keep: tuple[str, ...] = ()  # the columns that come with the photographs
    only_good: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def parts(self) -> tuple[str, ...]:
        """The paths of the parts below the folder."""
        return tuple(entry.part for entry in self.commits)

    @property
    def table(self) -> pa.Table:
        """All columns of the rows, with tokens and taps; all parts are read each time.

        Raises: UsageError if a part is missing or damaged.
        """
        return self.read_columns(None)

    @property
    def kept(self) -> pa.Table:
        """The columns that came with the photographs (`keep`); parts are read each time.

        Raises: UsageError if a part is missing or damaged.
        """
        return self.read_columns(self.keep).select(self.keep)

    @property
    def projected(self) -> np.ndarray | None:
        """The vectors [N, E] of the space shared with text, or None; parts are read each time.

        Raises: UsageError if a part is missing or damaged.
        """
        if self.text_space != "projected":
            return None
        return matrix_of(self.read_columns(["projected"]), "projected")

    def read_columns(self, names: Sequence[str] | None) -> pa.Table:
        """Return columns of the rows, beside their status; all of them for None.

        Raises: UsageError if a part is missing or damaged, or the folder changed since it was read.
        """
        columns = None if names is None else ["status", *names]
        with unchanged(self.folder, self.commits):
            tables = [read_whole(self.folder, part, columns) for part in self.parts]
        table = pa.concat_tables(tables)
        if not self.only_good:
            return table
        return table.filter(pa.array([status == "ok" for status in table["status"].to_pylist()]))

    def good(self) -> "FeatureFolder":
        """Return the rows that are ok; the matrix is then in memory."""
        kept = np.flatnonzero([status == "ok" for status in self.statuses])
        return replace(
            self,
            ids=tuple(self.ids[place] for place in kept),
            statuses=("ok",) * len(kept),
            matrix=self.matrix[kept],
            only_good=True,
        )


def read(folder: str | os.PathLike[str]) -> FeatureFolder:
    """Return the rows of a feature folder that a finished job wrote, on a disk or in a store.

    The checksum of every page that is read is verified; `packvit check` verifies all there is. A
    folder that an update puts in its place meanwhile is read instead.

    Raises: UsageError if it is not a feature folder, if its job is not finished, or if a file is
    missing or damaged.
    """
    path = find_folder(folder, name="folder")
    for _ in range(TRIES - 1):
        with suppress(ChangedError):
            return read_once(path)
    return read_once(path)


def read_once(path: Folder) -> FeatureFolder:
    """Return the rows of a feature folder, which no other must replace meanwhile.

    Memory is taken for the rows that are there, however many the manifest says.

    Raises: ChangedError; UsageError, as `read`.
    """
    open_finished(path)  # or the log is of nothing
    entries, names = read_commits(path), names_of(path)
    with unchanged(path, entries):
        manifest = open_finished(path)
        if (shard := shard_of(manifest)) != WHOLE:
            raise UsageError(
                f"{path} holds shard {shard} of a job. Put all shards together with "
                "`packvit merge` first."
            )
        rows, outputs = manifest["inputs"], Outputs.of_manifest(manifest)
        shape, kind = (rows, outputs.vector_width), np.dtype(outputs.vector_dtype)
        if sum(entry.rows for entry in entries) != rows:
            raise damaged(path, names.commits)
        exported = names.pooled in manifest["exports"] and (path / names.pooled).exists()
        mapped = map_matrix(path, names.pooled, shape, kind) if exported else None
        ids: list[str] = []
        statuses: list[str] = []
        blocks: list[np.ndarray] = []
        for entry in entries:
            table = read_whole(path, entry.part, ["id", "status"] + ["pooled"] * (not exported))
            if len(table) != entry.rows:
                raise damaged(path, entry.part)
            if not exported:
                if table.schema.field("pooled").type != outputs.schema.field("pooled").type:
                    raise damaged(path, entry.part)
                blocks.append(matrix_of(table, "pooled"))
            ids += table["id"].to_pylist()
            statuses += table["status"].to_pylist()
        matrix = join(blocks, outputs.vector_width, kind) if mapped is None else mapped
    space, keep = manifest.get("text_space"), tuple(name for name, _ in manifest.get("keep", ()))
    return FeatureFolder(path, tuple(ids), tuple(statuses), matrix, entries, space, keep)


def join(blocks: list[np.ndarray], width: int, kind: np.dtype[Any]) -> np.ndarray:
    """Return blocks [rows, D] as one; each is freed once it is copied, so that none is left."""
    matrix, start = np.empty((sum(map(len, blocks)), width), kind), 0
    blocks.reverse()
    while blocks:
        block = blocks.pop()
        matrix[start : start + len(block)] = block
        start += len(block)
    return matrix


@contextmanager
def unchanged(folder: Folder, entries: Sequence[Commit]) -> Iterator[None]:
    """Refuse what was read if the log is not, or no longer, the one of `entries`.

    Raises: ChangedError, in the place of an error too, since it was of another folder then.
    """
    try:
        yield
    except UsageError as error:
        if read_commits(folder) != entries:
            raise ChangedError.of(folder) from error
        raise
    if read_commits(folder) != entries:
        raise ChangedError.of(folder)


class ChangedError(UsageError):
    """A folder was replaced or changed while it was read."""

    @classmethod
    def of(cls, folder: Folder) -> "ChangedError":
        """Return the error for a folder."""
        return cls(f"{folder} changed while it was read: a job writes to it. Read it again.")


def open_finished(folder: Folder) -> dict[str, Any]:
    """Return the manifest of the feature folder of a finished job.

    Raises: UsageError if it is not one.
    """
    restore(folder)
    if not folder.is_dir():
        state = "is not a folder" if folder.exists() or folder.is_symlink() else "does not exist"
        raise UsageError(f"{folder} {state}. Name a feature folder that `packvit embed` wrote.")
    manifest = read_whole_manifest(folder, f"{folder} is")
    if not manifest["complete"]:
        written = sum(entry.rows for entry in read_commits(folder))
        raise UsageError(
            f"{folder} is half done: {written:,} of {rows_of(manifest):,} rows are written. Run "
            "the same embed command again to finish it, unless it still runs."
        )
    return manifest


def read_whole_manifest(folder: Folder, subject: str) -> dict[str, Any]:
    """Return the manifest of a feature folder; `subject` begins the sentence if there is none.

    Raises: UsageError if there is none, or it is damaged.
    """
    names, data = names_of(folder), b""
    with suppress(OSError):
        data = read_own(folder / names.manifest, MOST_MANIFEST)  # once: a job may write another
    manifest = decode_manifest(data)
    if manifest is None or manifest.get("format") not in FORMATS:
        raise UsageError(
            f"{subject} not a feature folder: it has no {CURRENT.manifest} of packvit. Name one "
            "that `packvit embed` wrote."
        )
    whole = data == encode_manifest(manifest)
    if not whole or find_flaw(manifest, names) or find_shard_flaw(manifest):
        raise damaged(folder, names.manifest)
    return manifest


def read_whole(folder: Folder, part: str, columns: list[str] | None = None) -> pa.Table:
    """Return columns of a part, all by default.

    Raises: UsageError if it cannot be read.
    """
    try:
        open_own(folder / part).close()  # which is no pipe, and no link out of the folder
        return read_part(folder / part, columns)
    except (OSError, pa.ArrowException) as error:
        raise damaged(folder, part) from error


def matrix_of(table: pa.Table, name: str) -> np.ndarray:
    """Return a column of vectors [rows, D], NaN where a row is an error."""
    column = table[name].combine_chunks()
    width = column.type.list_size
    values = column.drop_null().flatten().to_numpy()
    vectors = np.full((len(column), width), np.nan, values.dtype)
    vectors[column.is_valid().to_numpy(zero_copy_only=False)] = values.reshape(-1, width)
    return vectors


def map_matrix(
    folder: Folder, name: str, shape: tuple[int, int], dtype: np.dtype[Any]
) -> np.ndarray:
    """Return the exported matrix, memory-mapped; nothing that is written to it reaches the file.

    Raises: UsageError if it is missing or not a matrix of this shape and dtype.
    """
    try:
        with open_own(folder / name) as file:
            stored = isinstance(folder, StorePath)
            matrix = np.load(file) if stored else np.load(folder / name, mmap_mode="c")
    except (OSError, ValueError) as error:
        raise damaged(folder, name) from error
    if (matrix.shape, matrix.dtype) != (shape, dtype):
        raise damaged(folder, name)
    return matrix


def damaged(folder: Folder, name: str) -> UsageError:
    """Return the error for a file that cannot be used."""
    return UsageError(
        f"{folder / name} is missing or damaged. `packvit check {folder}` says how to repair it."
    )
