"""A listing is in the order of bytes, however it was found, and is never in memory as a whole."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packvit.corpus import WriteError
from packvit.corpus.completing import shards
from packvit.corpus.folder.layout import Commit
from packvit.corpus.inputs.find import list_inputs
from packvit.corpus.inputs.listing import Listing, spooling

NAMES = st.binary(min_size=1, max_size=4).filter(
    lambda name: name not in (b".", b"..") and not set(name) & {0, ord("/")}
)


@settings(max_examples=40, deadline=None)
@given(st.sets(st.tuples(NAMES, NAMES, NAMES), max_size=25))
def test_a_walk_is_in_the_order_of_the_bytes_of_the_paths(found: set[tuple[bytes, ...]]):
    with tempfile.TemporaryDirectory() as folder:
        root = os.fsencode(folder)
        made = {b"always.jpg"}
        for names in found:
            depth = len(names[0]) % 3  # 0 to 2 folders above the file
            path = b"/".join([*(b"d" + name for name in names[:depth]), names[-1] + b".jpg"])
            os.makedirs(os.path.dirname(root + b"/" + path), exist_ok=True)
            made.add(path)
        for path in made:
            open(root + b"/" + path, "wb").close()
        paths = [os.fsencode(source.path) for source in list_inputs([folder])]
    assert paths == [root + b"/" + path for path in sorted(made)]


def fill(count: int) -> Listing:
    listing = Listing()
    for number in range(count):
        name = f"{number * 7919 % count:06}.jpg".encode()
        listing.add(name, name, None)
    listing.sort()
    return listing


def test_shards_are_drawn_one_at_a_time_and_skip_what_is_kept():
    listing = fill(2500)
    kept = {1: Commit("data/part-00001.parquet", 1024, 2, 0, 0, "")}
    drawn = list(shards(listing, range(3), 1024, Path("out"), kept, {}))
    assert [(shard.number, len(shard.inputs)) for shard in drawn] == [(0, 1024), (2, 452)]
    ids = [source.id for source in listing]
    assert ids == sorted(ids)
    every = shards(listing, range(3), 1024, Path("out"), {}, {})
    assert [source.id for shard in every for source in shard.inputs] == ids
    again = list(shards(listing, range(3), 1024, Path("out"), kept, {1: (0, 1023)}))[1]
    assert [source.id for source in again.inputs] == [ids[1024], ids[2047]]
    assert (again.written, again.places) == (Path("out/data/part-00001.parquet"), (0, 1023))


MEASURE = """
import resource, sys
from packvit.corpus.inputs.find import list_inputs
from packvit.corpus.inputs.listing import Listing
def peak():
    return int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])
import pyarrow.parquet
Listing().sort()
before = peak()
listing = list_inputs([sys.argv[1]]) if sys.argv[2] == "path" else list_inputs([], [sys.argv[1]])
listing.sha256()
assert sum(1 for _ in listing) == int(sys.argv[3]), len(listing)
print(peak() - before)
"""


def peak(path: Path, kind: str, count: int) -> int:
    """Return by how many KiB a process grows at most that lists what `path` holds."""
    argv = [sys.executable, "-c", MEASURE, str(path), kind, str(count)]
    return int(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)


def grow_list(folder: Path, count: int) -> int:
    path = folder / f"{count}.txt"
    with path.open("w") as file:
        file.writelines(f"/nowhere/folder/photograph-{n:08}.jpg\n" for n in range(count))
    return peak(path, "list", count)


def grow_folder(folder: Path, count: int) -> int:
    """Make a folder for each photograph, since folders that wait to be read take memory too."""
    for number in range(count):
        path = folder / f"{count}/{number:06}"
        path.mkdir(parents=True)
        (path / "x.jpg").touch()
    return peak(folder / str(count), "path", count)


@pytest.mark.soak
def test_the_memory_of_a_list_does_not_grow_with_it(tmp_path: Path):
    small, large = grow_list(tmp_path, 10_000), grow_list(tmp_path, 60_000)
    assert large - small < 4096  # KiB; as Python objects 50,000 inputs take about 20,000


@pytest.mark.soak
def test_the_memory_of_a_walk_does_not_grow_with_the_corpus(tmp_path: Path):
    small, large = grow_folder(tmp_path, 20_000), grow_folder(tmp_path, 100_000)
    assert large - small < 8192


@pytest.mark.soak
def test_a_million_inputs_take_no_more_memory_than_some(tmp_path: Path):
    small, large = grow_list(tmp_path, 100_000), grow_list(tmp_path, 1_000_000)
    assert large - small < 8192


def test_no_room_for_the_list_of_inputs_is_said_in_a_sentence():
    listing = Listing()
    listing.rows.execute("PRAGMA max_page_count = 10")

    def overfill() -> None:
        with spooling():
            for number in range(10_000):
                listing.add(b"%d" % number, b"x", None)

    with pytest.raises(WriteError, match=r"temporary file: .*full\. Make room there, or set TMP"):
        overfill()
