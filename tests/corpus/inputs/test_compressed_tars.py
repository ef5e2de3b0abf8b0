"""Compressed tars give the rows and bytes of the tar in them, whole or damaged, local or served."""

import bz2
import gzip
import io
import lzma
import os
import tarfile
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from served import outcome_of

import packvit
from packvit.corpus import UsageError, WriteError
from packvit.corpus.inputs import limits, unpacking
from packvit.corpus.inputs.find import list_inputs
from packvit.corpus.inputs.sources import read
from packvit.images.errors import ImageError

ZSTD: Callable[[bytes], bytes] = lambda data: pa.Codec("zstd").compress(data).to_pybytes()  # noqa: E731
WAYS = {
    "x.tar.gz": gzip.compress,
    "x.TGZ": gzip.compress,
    "x.tar.bz2": bz2.compress,
    "x.tar.xz": lzma.compress,
    "x.tar.zst": ZSTD,
}


def drawn(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def tar_of(names: Iterable[str], size: int = 5000) -> bytes:
    """Return a tar of files of noise with these names, in this order."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for seed, name in enumerate(names):
            member = tarfile.TarInfo(f"{name}.jpg")
            member.size = size
            tar.addfile(member, io.BytesIO(drawn(size, seed)))
    return out.getvalue()


def write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


@pytest.mark.parametrize("name", WAYS)
def test_a_compressed_tar_gives_the_rows_and_bytes_of_the_tar(tmp_path: Path, name: str):
    first, second = tar_of("dbca"), tar_of("fe")  # two joined tars, not in the order of their ids
    plain = first + second
    expected = outcome_of(write(tmp_path / "x.tar", plain))
    assert list(expected) == list("abcdef")
    compress = WAYS[name]
    # One stream, and two back to back that are cut in the middle of a member.
    for data in (compress(plain), compress(plain[:7000]) + compress(plain[7000:])):
        assert outcome_of(write(tmp_path / name, data)) == expected
    assert outcome_of(write(tmp_path / name, plain)) == expected  # a name may be wrong


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tar.bz2", "x.tar.xz", "x.tar.zst"])
def test_a_compressed_tar_that_is_called_tar_is_read_as_what_it_is(tmp_path: Path, name: str):
    plain = tar_of("dbca")
    expected = outcome_of(write(tmp_path / "x.tar", plain))
    assert outcome_of(write(tmp_path / "x.tar", WAYS[name](plain))) == expected


def test_a_tar_whose_first_file_is_called_like_a_compression_is_a_tar(tmp_path: Path):
    plain = tar_of(["BZh9-a", "b"])
    for name in ("x.tar", "x.tar.bz2"):
        found = outcome_of(write(tmp_path / name, plain))
        assert found == {"BZh9-a": drawn(5000, 0), "b": drawn(5000, 1)}


def test_frames_of_zstd_that_are_skipped_do_not_hide_the_tar(tmp_path: Path):
    plain = tar_of("ab")
    skipped = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"  # as pzstd writes
    path = write(tmp_path / "x.tar.zst", skipped + ZSTD(plain))
    assert outcome_of(path) == outcome_of(write(tmp_path / "x.tar", plain))


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tar.bz2", "x.tar.xz", "x.tar.zst"])
def test_a_stream_cut_anywhere_loses_nothing_that_is_before_the_cut(tmp_path: Path, name: str):
    plain = tar_of("abc")
    whole = outcome_of(write(tmp_path / "x.tar", plain))
    data = WAYS[name](plain)
    for cut in (0, 3, 100, len(data) // 2, len(data) - 1):
        path = write(tmp_path / name, data[:cut])
        found = outcome_of(path)
        assert found.pop(path) == "truncated"
        assert all(value in ("truncated", whole[key]) for key, value in found.items())
        if name == "x.tar.gz":  # zlib says how much of it there is
            there = zlib.decompressobj(31).decompress(data[:cut])
            plainly = outcome_of(write(tmp_path / "cut.tar", there))
            plainly.pop(str(tmp_path / "cut.tar"), None)
            assert found == plainly


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tar.bz2", "x.tar.xz"])
def test_a_flipped_bit_that_the_checksum_finds_is_a_row(tmp_path: Path, name: str):
    data = bytearray(WAYS[name](tar_of("abc")))
    data[len(data) // 2] ^= 1
    path = write(tmp_path / name, bytes(data))
    found = outcome_of(path)
    assert found[path] == "truncated"


def test_a_bomb_is_one_row_and_costs_a_bounded_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(limits, "MOST_UNDECLARED", 1 << 20)
    member = tarfile.TarInfo("b.jpg")
    member.size = 64 << 20
    plain = tar_of("a")[:5632] + member.tobuf() + bytes(member.size)
    path = write(tmp_path / "x.tar.gz", gzip.compress(plain + bytes(1024)))
    found = outcome_of(path)
    assert found == {"a": drawn(5000), "b": "unreadable", path: "unreadable"}
    with unpacking.Unpacked(path) as file, pytest.raises(ImageError, match="10 times"):
        file.read_at(0, 64 << 20)
    assert file.length <= 1 << 20


def test_a_full_temporary_folder_ends_the_listing_and_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = write(tmp_path / "x.tar.gz", gzip.compress(tar_of("a")))
    listing = list(list_inputs([path]))

    def full(**options: object) -> object:
        return open("/dev/full", "wb", buffering=0)

    unpacking.open_unpacked.cache_clear()
    monkeypatch.setattr(unpacking, "TemporaryFile", full)
    with pytest.raises(WriteError, match=r"No space left on device.* TMPDIR"):
        list_inputs([path])
    with pytest.raises(ImageError) as caught:
        read(listing[0])
    assert caught.value.code == "unreadable"
    assert caught.value.note == "TMPDIR has no room for what is unpacked"


def test_an_archive_is_unpacked_once_by_each_process_that_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = write(tmp_path / "x.tar.gz", gzip.compress(tar_of("cba")))
    opened: list[str] = []

    class Counting(unpacking.Unpacked):
        def __init__(self, path: str) -> None:
            opened.append(path)
            super().__init__(path)

    listing = list_inputs([path])
    unpacking.open_unpacked.cache_clear()
    monkeypatch.setattr(unpacking, "Unpacked", Counting)
    assert [len(read(source)) for source in listing] == [5000] * 3
    assert opened == [path]
    os.utime(path, (1, 1))  # another version of it
    read(next(iter(listing)))
    assert opened == [path] * 2


def test_the_seconds_of_unpacking_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(unpacking, "SPENT_SECONDS", 0.0)
    path = write(tmp_path / "x.tar.gz", gzip.compress(tar_of("ba", size=3 << 20), 1))
    unpacking.open_unpacked.cache_clear()
    spent: list[float] = []
    last, first = sorted(list_inputs([path]), key=lambda source: source.id)
    read(last, spent=spent.append)
    assert len(spent) >= 6  # one for each MiB
    spent.clear()
    read(first, spent=spent.append)  # which is unpacked already
    assert spent == []


def test_other_compressions_are_refused_with_what_is_read(tmp_path: Path):
    with pytest.raises(UsageError, match=r"x\.tar\.lz4 is compressed in a way that is not read"):
        list_inputs([str(tmp_path / "x.tar.lz4")])


class Quiet(SimpleHTTPRequestHandler):
    """Serves files without ranges; those called "unpacks" have their encoding told."""

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def end_headers(self) -> None:
        if "unpacks" in self.path:
            self.send_header("Content-Encoding", "gzip")
        super().end_headers()


def test_a_server_without_ranges_or_that_has_it_unpacked_gives_the_same(
    tmp_path: Path,
):
    plain = tar_of("ba")
    expected = outcome_of(write(tmp_path / "x.tar", plain))
    data = gzip.compress(plain)
    write(tmp_path / "x.tar.gz", data)
    write(tmp_path / "unpacks.tar.gz", data)
    write(tmp_path / "cut.tar.gz", data[:-20])
    handler = partial(Quiet, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert outcome_of(f"{url}/x.tar.gz") == expected
        assert outcome_of(f"{url}/x.tar.gz?token=secret") == expected
        assert outcome_of(f"{url}/unpacks.tar.gz") == expected
        cut = outcome_of(f"{url}/cut.tar.gz")
        assert cut.pop(f"{url}/cut.tar.gz") == "truncated"
        assert cut["b"] == expected["b"]
        with pytest.raises(UsageError, match="is not there"):
            outcome_of(f"{url}/gone.tar.gz")
        server.shutdown()


def test_a_compressed_tar_becomes_the_features_of_the_tar(tmp_path: Path, checkpoint: Path):
    photos = tmp_path / "x.tar"
    with tarfile.open(photos, "w") as tar:
        for name in ("b", "a"):
            Image.effect_noise((40, 30), 50).convert("RGB").save(tmp_path / f"{name}.png")
            tar.add(tmp_path / f"{name}.png", f"{name}.png")
    packed = tmp_path / "x.tar.zst"
    packed.write_bytes(ZSTD(photos.read_bytes()))
    for path in (photos, packed):
        packvit.embed(path, out=tmp_path / path.suffix, model=checkpoint, workers=1)
    parts = [tmp_path / suffix / "data" / "part-00000.parquet" for suffix in (".tar", ".zst")]
    assert parts[0].read_bytes() == parts[1].read_bytes()
