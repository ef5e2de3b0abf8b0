"""Tars that are joined, empty or dishonest about sizes, compared with what GNU tar lists."""

import io
import subprocess
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from served import outcome_of

from packvit.corpus import UsageError

END = bytes(1024)


def header(name: str, size: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    """Return a header whose size field holds any bytes, with a right checksum."""
    member = tarfile.TarInfo(name)
    member.type = kind
    block = bytearray(member.tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def octal(size: int) -> bytes:
    return b"%011o\0" % size


def binary(size: int) -> bytes:
    """Return a size as GNU tar writes those that octal digits have no room for."""
    return (b"\xff" if size < 0 else b"\x80") + size.to_bytes(11, "big", signed=True)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def records(text: str, kind: bytes = tarfile.XHDTYPE) -> bytes:
    """Return a pax header with one record."""
    length = len(text) + 2
    length += len(str(length + len(str(length))))
    data = f"{length} {text}\n".encode()
    assert len(data) == length
    return header("pax", octal(len(data)), kind) + padded(data)


def archive(names: Sequence[str], end: bytes = END) -> bytes:
    """Return a tar of files that hold their own names."""
    files = (header(name, octal(len(name))) + padded(name.encode()) for name in names)
    return b"".join(files) + end


def write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


@pytest.mark.parametrize("zeros", [1024, 10_240, 1 << 20, 3 * 512])
def test_joined_tars_are_read_to_the_end_of_the_last(tmp_path: Path, zeros: int):  # case V1
    parts = [archive(["a.jpg", "b.jpg"], bytes(zeros)), archive([], bytes(zeros))]
    parts += [archive(["c.jpg"], bytes(zeros)), archive(["d.jpg", "e.txt"])]
    name = write(tmp_path / "x.tar", b"".join(parts))
    argv = ["tar", "--ignore-zeros", "-tf", name]
    listed = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()
    found = outcome_of(name)
    assert [f"{key}.jpg" for key in found] == [each for each in listed if each.endswith("jpg")]
    assert found == {key: f"{key}.jpg".encode() for key in "abcd"}


def test_long_names_in_joined_tars_are_found(tmp_path: Path):  # case V1
    whole = b""
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=kind) as tar:
            member = tarfile.TarInfo(f"{'d' * 150}/{kind}.jpg")
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
        whole += out.getvalue()
    found = outcome_of(write(tmp_path / "x.tar", whole))
    assert set(found) == {
        f"{'d' * 150}/{kind}" for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    }


@pytest.mark.parametrize(
    "data", [b"?" * 512, b"?", b"?" * 5000, archive(["b.jpg"])[:300], b"\0" * 100 + b"x"]
)
def test_data_behind_the_end_that_is_no_member_is_a_row(tmp_path: Path, data: bytes):  # case V1
    name = write(tmp_path / "x.tar", archive(["a.jpg"]) + data)
    assert outcome_of(name) == {"a": b"a.jpg", name: "truncated"}


def test_zeros_without_end_are_a_row(tmp_path: Path):  # case V1
    name = write(tmp_path / "x.tar", archive(["a.jpg"]))
    with open(name, "r+b") as file:
        file.truncate(1 << 40)  # of which the disk holds nothing
    assert outcome_of(name) == {"a": b"a.jpg", name: "truncated"}


def test_an_empty_archive_among_others_is_passed_over(tmp_path: Path):  # case V2
    full = write(tmp_path / "a.tar", archive(["a.jpg"]))
    empty = write(tmp_path / "b.tar", archive([], bytes(10_240)))
    text = write(tmp_path / "c.tar", archive(["c.txt"]))
    none = str(tmp_path / "d.parquet")
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), none)
    with zipfile.ZipFile(packed := str(tmp_path / "e.zip"), "w"):
        pass
    (tmp_path / "folder").mkdir()
    folder = str(tmp_path / "folder")
    alone = {f"{full}/a": b"a.jpg"}
    assert outcome_of(str(tmp_path / "*.tar")) == alone
    assert outcome_of(full, empty, text, none, packed, folder) == alone
    for paths in ([empty], [none], [empty, none], [str(tmp_path / "[b-d].*")], [empty, folder]):
        with pytest.raises(UsageError, match=r"holds? no photographs, but"):
            outcome_of(*paths)
    with pytest.raises(UsageError, match=r"b\.tar, .*d\.parquet hold no photographs, but 0 other"):
        outcome_of(empty, none)


LYING = {
    "negative": header("b.jpg", binary(-1024)),
    "negative and small": header("b.jpg", binary(-1)),
    "a negative folder": header("b", binary(-1024), tarfile.DIRTYPE),
    "a negative kind that nobody knows": header("b", binary(-1536), b"Q"),
    "a negative text": header("b.txt", binary(-1024)),
    "a negative long name": header("b", binary(-1024), tarfile.GNUTYPE_LONGNAME),
    "negative records": header("b", binary(-1024), tarfile.XHDTYPE),
    "records of terabytes": header("b", binary(1 << 42), tarfile.XHDTYPE),
    "a long name of terabytes": header("b", binary(1 << 42), tarfile.GNUTYPE_LONGNAME),
    "negative by a record": records("size=-1536") + header("b.jpg", octal(0)),
    "a negative folder by a record": records("size=-1536") + header("b", octal(0), b"5"),
    "negative for all": records("size=-1536", tarfile.XGLTYPE) + header("b.jpg", octal(0)),
    "records for all without end": records(f"comment={'x' * 70_000}", tarfile.XGLTYPE)
    + header("b.jpg", octal(0)),
    "negative with holes": records("GNU.sparse.size=-9") + header("b.jpg", octal(0)),
}


@pytest.mark.parametrize("kind", LYING)
def test_a_size_that_none_can_have_is_one_row(tmp_path: Path, kind: str):  # cases V3 and V4
    data = archive(["a.jpg"], b"") + LYING[kind] + END
    name = write(tmp_path / "x.tar", data)
    assert outcome_of(name) == {"a": b"a.jpg", name: "truncated"}


@pytest.mark.parametrize("size", [4096, 1 << 40, 1 << 62, (1 << 63) - 1, 1 << 70])
def test_a_member_that_leaves_its_archive_is_truncated(tmp_path: Path, size: int):  # case V4
    for number, lying in enumerate(
        (header("b.jpg", binary(size)), records(f"size={size}") + header("b.jpg", octal(0)))
    ):
        name = write(tmp_path / f"{number}.tar", archive(["a.jpg"], b"") + lying + END)
        assert outcome_of(name) == {"a": b"a.jpg", "b": "truncated", name: "truncated"}


def test_an_old_sparse_file_is_a_row_and_what_follows_is_read(tmp_path: Path):  # kind V4
    with (tmp_path / "b.jpg").open("wb") as file:
        for place in range(0, 400 << 12, 2 << 12):  # 200 pieces, more than one block describes
            file.seek(place)
            file.write(b"x" * 4096)
        file.truncate(1 << 30)
    for name in ("a.jpg", "c.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    names = ["a.jpg", "b.jpg", "c.jpg"]
    argv = ["tar", "--sparse", "--format=gnu", "-cf", "x.tar", *names]
    subprocess.run(argv, cwd=tmp_path, check=True)
    found = outcome_of(str(tmp_path / "x.tar"))
    assert found == {"a": b"a.jpg", "b": "unreadable", "c": b"c.jpg"}
