"""Zip files as writers make them, beside Python's zipfile, and zips that lie."""

import io
import os
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rotten import encode, pixels
from served import outcome_of

from packvit.corpus.inputs import limits
from packvit.corpus.inputs.find import list_inputs

METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


class Pipe(io.RawIOBase):
    """A file that cannot seek, so that sizes stand behind each member."""

    def __init__(self) -> None:
        self.data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.data += data
        return len(data)


def by_zipfile(data: bytes) -> dict[str, bytes]:
    """Return what zipfile reads of all members, by name."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {each.filename: archive.read(each) for each in archive.infolist()}


@settings(max_examples=12, deadline=None)
@given(
    members=st.lists(
        st.tuples(
            st.sampled_from(["a", "b/c", "\u00e9", "\u65e5", "a::b", "x y", "../z", "/r"]),
            st.binary(max_size=300),
            st.sampled_from(METHODS),
            st.booleans(),
            st.binary(max_size=40),
        ),
        max_size=5,
        unique_by=lambda each: each[0],
    ),
    before=st.binary(max_size=50),
    comment=st.binary(max_size=50).filter(lambda text: b"PK" not in text),
    seeks=st.booleans(),
)
def test_members_are_those_that_zipfile_reads(
    tmp_path_factory: pytest.TempPathFactory,
    members: list[tuple[str, bytes, int, bool, bytes]],
    before: bytes,
    comment: bytes,
    seeks: bool,
):
    target: Any = io.BytesIO() if seeks else Pipe()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("first.png", b"first")
        for name, data, method, wide, note in members:
            info = zipfile.ZipInfo(f"{name}.png")
            info.compress_type, info.comment = method, note
            with archive.open(info, "w", force_zip64=wide) as file:
                file.write(data)
        archive.comment = comment
    data = before + (target.getvalue() if seeks else bytes(target.data))
    path = tmp_path_factory.mktemp("zips") / "x.zip"
    path.write_bytes(data)
    assert outcome_of(str(path)) == by_zipfile(data)


def test_a_directory_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from packvit.corpus.inputs import zips

    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for number in range(200):
            info = zipfile.ZipInfo(f"{number:04}.png")
            info.comment = b"c" * 4000
            archive.writestr(info, b"%d" % number)
    monkeypatch.setattr(zips, "PIECE", 1 << 16)
    found = outcome_of(str(tmp_path / "x.zip"))
    assert found == {f"{number:04}.png": b"%d" % number for number in range(200)}


def one(name: str = "a.png", data: bytes = b"x" * 1000) -> bytearray:
    """Return a zip of one packed member."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    return bytearray(file.getvalue())


def with_entry(place: int, kind: str, value: int) -> bytes:
    """Return such a zip with a number of its directory's entry changed."""
    data = one()
    struct.pack_into(kind, data, data.index(b"PK\1\2") + place, value)
    return bytes(data)


def with_end(place: int, kind: str, value: int) -> bytes:
    """Return such a zip with a number of its end changed."""
    data = one()
    struct.pack_into(kind, data, data.index(b"PK\5\6") + place, value)
    return bytes(data)


LIES = {
    "another sum": (with_entry(16, "<I", 1), {"a.png": "truncated"}),
    "a smaller size than it unpacks to": (with_entry(24, "<I", 10), {"a.png": "truncated"}),
    "a larger size": (with_entry(24, "<I", 2000), {"a.png": "truncated"}),
    "more than 2 GiB": (with_entry(24, "<I", 2**32 - 2), {"a.png": "unreadable"}),
    "more packed bytes than the file": (with_entry(20, "<I", 10**6), {"a.png": "truncated"}),
    "an offset beyond the file": (with_entry(42, "<I", 10**6), {"a.png": "truncated"}),
    "an offset that is no header": (with_entry(42, "<I", 5), {"a.png": "truncated"}),
    "a method that there is not": (with_entry(10, "<H", 77), {"a.png": "unreadable"}),
    "another disk": (with_entry(34, "<H", 3), {"a.png": "unreadable"}),
    "a longer name": (with_entry(28, "<H", 60000), {"x.zip": "truncated"}),
    "a longer directory": (with_end(12, "<I", 10**6), {"x.zip": "truncated"}),
    "a directory elsewhere": (with_end(16, "<I", 10**6), {"x.zip": "truncated"}),
    "64 bits that are not there": (with_end(16, "<I", 2**32 - 1), {"x.zip": "truncated"}),
    "no end": (bytes(one()[:-10]), {"x.zip": "truncated"}),
    "nothing": (b"", {"x.zip": "truncated"}),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_zip_that_lies_is_a_row(tmp_path: Path, lie: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # kinds V3 to V5 of issue 16
    data, expected = LIES[lie]
    Path("x.zip").write_bytes(data)
    (tmp_path / "y.png").write_bytes(b"")
    found = outcome_of("x.zip", "y.png")
    del found["y.png"]
    assert {name.removeprefix("x.zip/"): code for name, code in found.items()} == expected


def test_links_and_folders_in_a_zip_are_no_photographs(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/hostname")
        archive.writestr("folder.png/", b"")
        archive.writestr("folder.png/a.png", b"a")
    found = {"folder.png": "not_a_file", "folder.png/a.png": b"a", "link.png": "not_a_file"}
    assert outcome_of(str(tmp_path / "x.zip")) == found


def test_a_name_in_utf8_that_is_added_is_a_members_name(tmp_path: Path):
    """As Python's zipfile reads it from 3.12 on, but for what is damaged."""
    fields = {
        "a.png": (1, zlib.crc32(b"a.png"), "\u00e9.png".encode()),
        "b.png": (1, 7, b"another.png"),  # of a name that was changed since
        "c.png": (2, zlib.crc32(b"c.png"), b"another.png"),
        "d.png": (1, zlib.crc32(b"d.png"), b"\xe9.png"),
        "e.png": (1, zlib.crc32(b"e.png"), b""),
    }
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, (version, crc, added) in fields.items():
            info = zipfile.ZipInfo(name)
            other = struct.pack("<HHH", 0x5455, 2, 0)
            field = struct.pack("<HHBI", 0x7075, 5 + len(added), version, crc) + added
            info.extra = other + field
            archive.writestr(info, name)
    found = outcome_of(str(tmp_path / "x.zip"))
    names = ["b.png", "c.png", "d.png", "e.png", "\u00e9.png"]
    assert found == dict(
        zip(names, (b"b.png", b"c.png", b"d.png", b"e.png", b"a.png"), strict=True)
    )


def test_members_of_one_name_are_each_read(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("a.png", b"first")
        archive.writestr("a.png", b"second")
    assert outcome_of(str(tmp_path / "x.zip")) == {"a.png": b"first", "a.png#2": b"second"}


def test_a_pipe_or_a_long_directory_is_not_read_through_a_chained_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "x.zip").write_bytes(one(data=encode(pixels(4, 4), "PNG")))
    os.mkfifo(tmp_path / "pipe.zip")
    chained = tmp_path / "list.txt"
    chained.write_text(f"zip://a.png::{tmp_path}/pipe.zip\nzip://a.png::{tmp_path}/x.zip\n")
    assert sorted(map(str, outcome_of(lists=[str(chained)]).values()))[1] == "not_a_file"
    (tmp_path / "y.zip").write_bytes(one(data=b"other"))
    chained.write_text(f"zip://a.png::{tmp_path}/y.zip\n")
    monkeypatch.setattr(limits, "MOST_DIRECTORY", 10)
    assert [*outcome_of(lists=[str(chained)]).values()] == ["unreadable"]
    assert len(list_inputs([str(tmp_path / "y.zip")])) == 1
