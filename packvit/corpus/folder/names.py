"""The names of the files in a feature folder. No torch.

    _manifest.json           what was run on what, its fingerprint, and the counts once complete
    _commits.jsonl           one line for each committed part: rows, errors, tokens, bytes, sha256
    _certificate.json        how the encoder was verified, if asked for
    _inputs.jsonl.gz         the ids of the inputs, until the job is done
    _mtimes.parquet          size and time of change of each input's file, if they are trusted
    data/part-00000.parquet  one row for each input, in the order of the inputs
    _exports/pooled.npy, _exports/ids.jsonl   made from the parts once all are written, if asked for
    _exports/pooled.usearch, .usearch.json    an index of the vectors, if `search` was asked for it

Readers of Parquet folders skip names that begin with "_" or ".", so pandas and pyarrow open the
folder itself; others open `data`, which never holds anything but whole parts. Temporary files lie
beside it, under names that begin with ".".

In an object store `_commits/00000.json` stands for a line of `_commits.jsonl`, and `_lease/` says
which job may write.

In the first format all files lay at the top, and no name began with "_". Such a folder keeps its
format for good: it is read, resumed and checked as it is.
"""

import os
import re
from dataclasses import dataclass, replace

from packvit.corpus.folder.stores import Folder, StorePath

LOCK = ".lock"
MARK = ".updating"  # in a folder that is made to replace another
PENDING = "_inputs.jsonl.gz"  # in either format
MTIMES = "_mtimes.parquet"
KNOWN = "known"  # only under its temporary name: the rows that may be taken over
SPOOL = "shards"  # only under its temporary name: shards that wait for workers on other hosts
DATA, EXPORTS = "data/", "_exports/"
COMMITS, LEASE = "_commits/", "_lease"  # in an object store
PART = re.compile(rf"(?:{DATA})?part-(\d{{5,12}})\.parquet")
TEMPORARY = re.compile(r"\.(.+?)(?:\.[0-9a-f]{8})?\.tmp")  # with an optional `attempt`


@dataclass(frozen=True, slots=True)
class Names:
    """The names of a format, as paths below the feature folder."""

    format: str
    manifest: str
    commits: str
    certificate: str
    parts: str  # the folder of the parts, with its slash
    pooled: str
    ids: str

    def part(self, number: int) -> str:
        """Return the path of part `number`."""
        return self.parts + part_name(number)

    def index(self, column: str) -> tuple[str, str]:
        """Return the paths of the index of a column of vectors, and of the facts about it."""
        name = self.pooled.removesuffix("pooled.npy") + f"{column}.usearch"
        return name, f"{name}.json"

    @property
    def fixed(self) -> tuple[str, ...]:
        """All files except the parts, the manifest last."""
        made = (self.pooled, self.ids, *self.index("pooled"), *self.index("projected"))
        return (*made, PENDING, MTIMES, self.commits, self.certificate, self.manifest)


CURRENT = Names(
    format="packvit features 2",
    manifest="_manifest.json",
    commits="_commits.jsonl",
    certificate="_certificate.json",
    parts=DATA,
    pooled=f"{EXPORTS}pooled.npy",
    ids=f"{EXPORTS}ids.jsonl",
)
FIRST = Names(
    format="packvit features 1",
    manifest="manifest.json",
    commits="commits.jsonl",
    certificate="certificate.json",
    parts="",
    pooled="pooled.npy",
    ids="ids.jsonl",
)
STORED = replace(CURRENT, commits=COMMITS)
FORMATS = (FIRST.format, CURRENT.format)


def names_of(folder: Folder) -> Names:
    """Return the names that `folder` uses: the current ones unless it is of the first format."""
    if isinstance(folder, StorePath):
        return STORED

    def holds(names: Names) -> bool:
        return any(os.path.lexists(folder / name) for name in (names.manifest, names.commits))

    return FIRST if holds(FIRST) and not holds(CURRENT) else CURRENT


def part_name(number: int) -> str:
    """Return the file name of part `number`, without its folder."""
    return f"part-{number:05d}.parquet"


def part_number(path: str) -> int | None:
    """Return the number of a part from its name or its path, or None if it is not a part's."""
    found = PART.fullmatch(path)
    right = found and part_name(int(found[1])) == path.removeprefix(DATA)
    return int(found[1]) if found and right else None
