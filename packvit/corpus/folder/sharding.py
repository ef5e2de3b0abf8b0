"""The shards of a job: contiguous runs of its parts, each made in a folder of its own. No torch.

A shard's folder has the manifest of the whole job, and an entry that says which shard it is.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from packvit.corpus import UsageError
from packvit.corpus.folder.opening import is_count

WRITTEN = re.compile(r"([1-9]\d{0,8})/([1-9]\d{0,8})", re.ASCII)


@dataclass(frozen=True, slots=True)
class JobShard:
    """Shard `number` of `count`, counted from 1; 1 of 1 is the whole job."""

    number: int = 1
    count: int = 1

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def parts(self, parts: int) -> range:
        """Return the numbers of this shard's parts, of a job of `parts` parts."""
        return range((self.number - 1) * parts // self.count, self.number * parts // self.count)

    @property
    def entry(self) -> dict[str, Any]:
        """What the manifest says besides the job: nothing if this is the whole."""
        return {} if self.count == 1 else {"shard": {"number": self.number, "count": self.count}}


WHOLE = JobShard()


def parse_shard(text: str) -> JobShard:
    """Return the shard written K/N.

    Raises: UsageError if it is not one.
    """
    found = WRITTEN.fullmatch(text)
    if not found or int(found[1]) > int(found[2]):
        raise UsageError(f'shard is "{text}", but must be K/N with K from 1 to N, such as 3/64.')
    return JobShard(int(found[1]), int(found[2]))


def shard_of(manifest: Mapping[str, Any]) -> JobShard:
    """Return which shard a manifest describes; `find_shard_flaw` has checked it."""
    return JobShard(**manifest["shard"]) if "shard" in manifest else WHOLE


def find_shard_flaw(manifest: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a manifest's shard, as the end of a sentence, or None."""
    entry = manifest.get("shard", {"number": 1, "count": 2})
    if not isinstance(entry, dict) or entry.keys() != {"number", "count"}:
        return "has a shard that is not an object with a number and a count."
    number, count = entry["number"], entry["count"]
    if not (is_count(count, least=2) and is_count(number, least=1, most=count)):
        return "has a shard that does not exist."
    return None


def parts_of(manifest: Mapping[str, Any]) -> range:
    """Return the numbers of the parts that a folder's job writes."""
    return shard_of(manifest).parts(-(-manifest["inputs"] // manifest["rows_per_part"]))


def rows_of(manifest: Mapping[str, Any]) -> int:
    """Return how many rows a folder's job writes."""
    parts, size = parts_of(manifest), manifest["rows_per_part"]
    return min(parts.stop * size, manifest["inputs"]) - min(parts.start * size, manifest["inputs"])
