"""Download some tensors of a model by HTTP range: a tower of 1.2 GB out of 470 GB.

What is fetched lies beside the hub's cache, as a checkpoint of its own with the model's names. An
interrupted download continues where it ended. No torch.
"""

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from packvit.atomic import rename_flushed, sync, write_whole
from packvit.checkpoints.errors import CheckpointError

CHUNK = 32 << 20  # bytes of a request
MOST_HEADER = 100 << 20  # bytes, as safetensors itself has it
WORTH = 2  # a part is fetched by itself where the whole has this many times its bytes

Request = Callable[[str, int, int], tuple[bytes, int] | None]  # a file's bytes, and its size


@dataclass(frozen=True, slots=True)
class Part:
    """What is wanted of a model."""

    name: str  # of the folder that it is kept in
    applies: Callable[[Mapping[str, Any]], bool]  # whether config.json is that of a larger model
    wanted: Callable[[Mapping[str, Any], Collection[str]], Collection[str]]  # config, all names


class Place(NamedTuple):
    """Where a tensor lies."""

    file: str
    start: int
    end: int
    dtype: str
    shape: Sequence[int]


def read_places(request: Request, file: str) -> dict[str, Place] | None:
    """Return where a safetensors file's tensors lie, from its header alone.

    None if there is no such file.

    Raises: CheckpointError for a header that does not fit the file.
    """
    first = request(file, 0, 8)
    if first is None:
        return None
    length, size = int.from_bytes(first[0], "little"), first[1]
    damaged = CheckpointError(
        f"{file} is not a whole safetensors file: its header does not fit its {size} bytes. Ask "
        "the model's author."
    )
    if len(first[0]) != 8 or not 2 <= length <= min(MOST_HEADER, size - 8):
        raise damaged
    found = request(file, 8, 8 + length)
    try:
        header = json.loads(found[0]) if found else {}
        if not isinstance(header, dict):
            raise damaged
        places = {
            name: Place(
                file,
                8 + length + entry["data_offsets"][0],
                8 + length + entry["data_offsets"][1],
                entry["dtype"],
                entry["shape"],
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }
        if not all(8 + length <= place.start <= place.end <= size for place in places.values()):
            raise damaged
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise damaged from error
    ends = [place.end for place in places.values()]
    if not places or max(ends) != size:
        raise damaged
    return places


def choose_from_file(
    request: Request, file: str, choose_names: Callable[[Collection[str]], Collection[str]]
) -> list[tuple[str, Place]] | None:
    """Return the wanted tensors of a model's one file and their places, in the file's order.

    None if the whole file should be downloaded, since most of it is wanted, or does not exist.
    """
    places = read_places(request, file)
    if places is None:
        return None
    names = set(choose_names(places))
    if count_bytes(places.values()) < WORTH * count_bytes(places[name] for name in names):
        return None
    return in_order({name: places[name] for name in names})


def choose_from_shards(
    request: Request, weight_map: Mapping[str, str], names: Collection[str]
) -> list[tuple[str, Place]]:
    """Return the tensors `names` and their places, in the order of their shards and bytes.

    Raises: CheckpointError if a shard is missing, or lacks what the index names.
    """
    places: dict[str, Place] = {}
    for file in sorted({weight_map[name] for name in names}):
        found = read_places(request, file)
        if found is None:
            raise CheckpointError(f"The model lacks the shard {file}, which its index names.")
        places |= found
    if absent := sorted(set(names) - places.keys()):
        raise CheckpointError(f"The shards lack what their index names: {', '.join(absent)}.")
    return in_order({name: places[name] for name in names})


def in_order(places: Mapping[str, Place]) -> list[tuple[str, Place]]:
    """Return tensors in the order of their files and bytes."""
    return sorted(places.items(), key=lambda one: one[1][:2])


def count_bytes(places: Iterable[Place]) -> int:
    """Return the bytes of tensors."""
    return sum(place.end - place.start for place in places)


def encode_header(chosen: Sequence[tuple[str, Place]]) -> bytes:
    """Return the header of the file that holds these tensors one after another."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, place in chosen:
        end = at + place.end - place.start
        header[name] = {
            "dtype": place.dtype,
            "shape": list(place.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def runs(chosen: Sequence[tuple[str, Place]], done: int) -> Iterator[tuple[str, int, int]]:
    """Yield the ranges (file, start, end) of the tensors' bytes, without the first `done` bytes.

    Adjacent tensors share a range; no unwanted byte is in one.
    """
    joined: list[tuple[str, int, int]] = []
    for _, place in chosen:
        if joined and (joined[-1][0], joined[-1][2]) == (place.file, place.start):
            joined[-1] = (place.file, joined[-1][1], place.end)
        else:
            joined.append((place.file, place.start, place.end))
    for file, start, end in joined:
        skipped = min(done, end - start)
        done -= skipped
        for first in range(start + skipped, end, CHUNK):
            yield file, first, min(first + CHUNK, end)


def fetch_tensors(request: Request, chosen: Sequence[tuple[str, Place]], target: Path) -> None:
    """Write the tensors to the safetensors file `target`, continuing an interrupted download.

    Raises: CheckpointError if the hub answers with other bytes than asked for; OSError.
    """
    partial = target.with_name(f"{target.name}.incomplete")
    header = encode_header(chosen)
    whole = len(header) + count_bytes(place for _, place in chosen)
    with partial.open("a+b") as file:
        file.seek(0)
        # What is longer than all of it was written by something else.
        if file.read(len(header)) != header or file.seek(0, os.SEEK_END) > whole:
            file.truncate(0)
            file.write(header)
        file.seek(0, os.SEEK_END)
        for name, start, end in runs(chosen, file.tell() - len(header)):
            found = request(name, start, end)
            if found is None or len(found[0]) != end - start:
                raise CheckpointError(
                    f"The hub answered with {len(found[0]) if found else 0} bytes of {name} "
                    f"for {end - start}. Run the same command to continue."
                )
            file.write(found[0])
    sync(partial)
    rename_flushed(partial, target)


def write_texts(folder: Path, texts: Mapping[str, Path]) -> None:
    """Copy small files into a folder, under their names."""
    for name, source in texts.items():
        write_whole(folder / name, source.read_bytes())
