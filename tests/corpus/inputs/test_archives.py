"""Photographs in tar and Parquet files, through the command and past what is wrong with them."""

import hashlib
import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from rotten import encode, pixels
from served import outcome

from packvit.cli.embed import embed
from packvit.corpus import UsageError
from packvit.corpus.folder.layout import read_commits
from packvit.corpus.inputs.find import list_inputs
from packvit.corpus.inputs.sources import Cell, Input, read


def photo(number: int) -> bytes:
    return encode(pixels(20 + number, 30, number), "PNG" if number % 2 else "JPEG")


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **facts: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for fact, value in facts.items():
        setattr(member, fact, value)
    tar.addfile(member, io.BytesIO(data))


def write_tar(path: Path, files: Iterable[tuple[str, bytes]], **options: Any) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, data in files:
            add(tar, name, data)
    return path


def write_images(path: Path, images: list[bytes | None], paths: list[str | None]) -> Path:
    """Write a table as datasets lays images out."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    values = [{"bytes": b, "path": p} for b, p in zip(images, paths, strict=True)]
    pq.write_table(pa.table({"image": pa.array(values, kind)}), path, row_group_size=3)
    return path


def run(*argv: object) -> dict[str, dict[str, Any]]:
    """Run the command with the tiny model, and return the rows it wrote by id."""
    words = [str(word) for word in argv]
    done = CliRunner().invoke(embed, [*words, "--device", "cpu", "--json"])
    assert done.exit_code in (0, 3), done.output
    out = Path(words[words.index("--out") + 1])
    tables = [pq.read_table(out / entry.part) for entry in read_commits(out)]
    rows = pa.concat_tables(tables).to_pylist()
    assert [row["id"] for row in rows] == sorted((row["id"] for row in rows), key=str.encode)
    assert json.loads(done.stdout)["rows"] == len(rows)
    return {row["id"]: row for row in rows}


def check_rows(rows: dict[str, dict[str, Any]], expected: dict[str, bytes]) -> None:
    """Compare rows with the bytes that they must be of, and with those photographs as files."""
    assert {name: row["sha256"] for name, row in rows.items()} == {
        name: hashlib.sha256(data).hexdigest() for name, data in expected.items()
    }
    assert {row["status"] for row in rows.values()} == {"ok"}


def test_a_tar_gives_the_features_that_its_members_give_as_files(tmp_path: Path):
    files = {f"a/{number:04}": photo(number) for number in range(6)}
    (tmp_path / "files/a").mkdir(parents=True)
    members = []
    for number, (name, data) in enumerate(files.items()):
        members += [(f"{name}.{'png' if number % 2 else 'jpg'}", data), (f"{name}.json", b"{}")]
        (tmp_path / "files" / f"{name}.jpg").write_bytes(data)
    write_tar(tmp_path / "x.tar", members)
    rows = run(tmp_path / "x.tar", "--out", tmp_path / "out")
    check_rows(rows, files)
    loose = run(tmp_path / "files", "--out", tmp_path / "loose")
    assert [row["pooled"] for row in rows.values()] == [row["pooled"] for row in loose.values()]


def test_several_tars_are_told_apart_by_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("x", "y"):
        write_tar(Path(f"{name}.tar"), [("1.jpg", photo(0))])
    assert list(outcome(list_inputs(["y.tar", "./x.tar"]))) == ["./x.tar/1", "y.tar/1"]
    assert list(outcome(list_inputs(["*.tar"]))) == ["x.tar/1", "y.tar/1"]


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_names_that_are_not_utf8_are_found(tmp_path: Path, kind: int):
    long = "d" * 150 + "/" + "é" * 120
    files = [(f"{long}.jpg", b"long"), ("caf\udce9.JPG", b"bytes"), ("s.p.jpg", b"dots")]
    options = {"format": kind, "encoding": "utf-8", "errors": "surrogateescape"}
    path = write_tar(tmp_path / "x.tar", files, **options)
    expected = {long: b"long", "caf\\xe9": b"bytes", "s": b"dots"}
    assert outcome(list_inputs([str(path)])) == expected


def test_members_are_called_by_their_whole_names_where_a_sample_has_two_photographs(tmp_path: Path):
    files = [("1.jpg", b"1"), ("1.mask.png", b"m"), ("2.jpg", b"2"), (".jpg", b"none")]
    path = write_tar(tmp_path / "x.tar", files)
    listing = list_inputs([str(path)])
    assert outcome(listing) == {"1.jpg": b"1", "1.mask.png": b"m", "2.jpg": b"2"}
    assert listing.ignored == 1


def test_members_of_the_same_name_are_told_apart_by_their_order(tmp_path: Path):  # case V1
    files = [("1.jpg", b"1"), ("1.jpg", b"2"), ("1.jpg#2.jpg", b"3"), ("1.jpg", b"4")]
    path = write_tar(tmp_path / "x.tar", files)
    joined = tmp_path / "y.tar"  # two shards of a data set, each of which counts from 0
    joined.write_bytes(path.read_bytes() * 2)
    found = outcome(list_inputs([str(path)]))
    assert found == {"1.jpg": b"1", "1.jpg#2": b"2", "1.jpg#2.jpg": b"3", "1.jpg#3": b"4"}
    assert sorted(outcome(list_inputs([str(joined)])).values()) == [
        b"1",
        b"1",
        b"2",
        b"2",
        b"3",
        b"3",
        b"4",
        b"4",
    ]
    taken = [("1.jpg", b"1"), ("1.jpg", b"2"), ("1.jpg#2", b"3")]
    assert len(outcome(list_inputs([str(write_tar(tmp_path / "z.tar", taken))]))) == 2


def test_what_is_called_a_photograph_in_a_tar_and_is_no_file_is_a_row(tmp_path: Path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "file.jpg", b"file")
        add(tar, "empty.jpg")
        add(tar, "folder.jpg", type=tarfile.DIRTYPE)
        add(tar, "folder", type=tarfile.DIRTYPE)
        add(tar, "link.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "hard.jpg", type=tarfile.LNKTYPE, linkname="file.jpg")
        add(tar, "pipe.jpg", type=tarfile.FIFOTYPE)
        holes = {"GNU.sparse.map": "0,1", "GNU.sparse.size": "9"}
        add(tar, "sparse.jpg", b"x", pax_headers=holes)
    listing = list_inputs([str(tmp_path / "x.tar")])
    links = dict.fromkeys(("folder", "link", "hard", "pipe"), "not_a_file")
    assert outcome(listing) == {"file": b"file", "empty": b"", "sparse": "unreadable", **links}
    assert listing.ignored == 0


def test_a_tar_cut_anywhere_says_so_and_loses_nothing_that_is_there(tmp_path: Path):
    whole = write_tar(tmp_path / "x.tar", [("1.jpg", b"a" * 700), ("2.jpg", b"b" * 700)])
    data = whole.read_bytes()
    cut, name = tmp_path / "cut.tar", str(tmp_path / "cut.tar")
    for size in (0, 1, 511, 512, 900, 1212, 1536, 1600, 2048, 2700, 3072):
        cut.write_bytes(data[:size])
        found = outcome(list_inputs([name]))
        assert found.pop(name) == "truncated"
        assert set(found.values()) <= {b"a" * 700, b"b" * 700, "truncated"}
        assert (found.get("1") == b"a" * 700) == (size >= 1212)
        assert (found.get("2") == b"b" * 700) == (size >= 2748)
    cut.write_bytes(data[:1536] + b"?" * 512 + data[2048:])  # a damaged header is no end
    assert outcome(list_inputs([name])) == {"1": b"a" * 700, name: "truncated"}
    cut.write_bytes(data)
    listing = list_inputs([name])
    cut.write_bytes(data[:600])
    assert outcome(listing) == {"1": "truncated", "2": "truncated"}
    cut.unlink()
    assert outcome(listing) == {"1": "missing", "2": "missing"}


def test_an_archive_without_photographs_is_wrong_use(tmp_path: Path):
    for files, count in (([], 0), ([("a.txt", b"x"), ("b.json", b"x")], 2)):
        path = write_tar(tmp_path / "x.tar", files)
        with pytest.raises(UsageError, match=rf"x\.tar holds no photographs, but {count} other"):
            list_inputs([str(path)])


def test_archives_in_a_folder_are_counted_and_not_opened(tmp_path: Path):
    write_tar(tmp_path / "x.tar", [("1.jpg", b"1")])
    (tmp_path / "y.jpg").touch()
    listing = list_inputs([str(tmp_path)])
    assert ([source.id for source in listing], listing.ignored) == (["y.jpg"], 1)


def test_a_table_in_the_layout_of_datasets_is_embedded(tmp_path: Path):
    images = [photo(number) for number in range(8)]
    names = [f"{7 - number}.jpg" for number in range(8)]
    path = write_images(tmp_path / "x.parquet", [*images], [*names])
    rows = run(path, "--out", tmp_path / "out")
    check_rows(rows, dict(zip(names, images, strict=True)))


def test_rows_are_called_by_their_numbers_where_paths_do_not_tell_them_apart(tmp_path: Path):
    images: list[bytes | None] = [bytes([number]) for number in range(12)]
    numbers = {f"{number:02}": bytes([number]) for number in range(12)}
    for odd in (None, "", "1.jpg"):
        names = [f"{number}.jpg" for number in range(11)] + [odd]
        path = write_images(tmp_path / "x.parquet", images, names)
        assert outcome(list_inputs([str(path)])) == numbers
    images[3] = None
    path = write_images(tmp_path / "x.parquet", images, [None] * 12)
    assert outcome(list_inputs([str(path)])) == {**numbers, "03": "missing"}


def test_rows_of_paths_alone_are_opened_as_datasets_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):  # case V11
    from datasets import Image

    monkeypatch.chdir(tmp_path)
    for number in range(3):
        Path(f"{number}.png").write_bytes(encode(pixels(20, 30, number), "PNG"))
    here = str(tmp_path)
    paths = [f"{here}/0.png", "1.png", f"file://{here}/2.png"]
    write_images(Path("x.parquet"), [None, None, None, b"bytes"], [*paths, "1x.png"])
    found = outcome(list_inputs(["x.parquet"]))
    assert found.pop("1x.png") == b"bytes"  # which come first
    assert found.pop(paths[2]) == Path("2.png").read_bytes()
    for path in paths[:2]:
        theirs = Image().decode_example({"bytes": None, "path": path})
        data = found.pop(path)
        assert isinstance(data, bytes)
        assert PIL.Image.open(io.BytesIO(data)).tobytes() == theirs.tobytes()
    assert not found
    others = [paths[0], paths[0], "gone.png", here, "memory://x.png", "s3://u:hunter2@b/x.png"]
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as if it were not installed
    write_images(Path("y.parquet"), [None] * 7, [*others, None])
    whole = Path("0.png").read_bytes()
    listing = list_inputs(["y.parquet"])
    codes = [whole, whole, "missing", "not_a_file", "unreadable", "unreadable", "missing"]
    assert outcome(listing) == {str(number): code for number, code in enumerate(codes)}
    write_images(Path("z.parquet"), [None], ["https://u:hunter2@127.0.0.1:1/x.png?sig=hunter3"])
    assert outcome(list_inputs(["z.parquet"])) == {"https://127.0.0.1:1/x.png": "unreadable"}


def rewrite(footer: bytes, places: Iterable[int], rows: int) -> bytes:
    """Return a footer whose one-byte numbers at places are replaced, as thrift packs numbers."""
    number, packed = rows << 1 if rows >= 0 else (-rows << 1) - 1, b""
    while number > 127:
        packed, number = packed + bytes([number & 127 | 128]), number >> 7
    packed += bytes([number])
    for place in sorted(places, reverse=True):
        footer = footer[:place] + packed + footer[place + 1 :]
    return footer


@pytest.mark.parametrize("rows", [10**13, 5, -1, 0])
def test_counts_of_rows_that_cannot_be_are_a_row(tmp_path: Path, rows: int):  # case V5
    out = io.BytesIO()
    pq.write_table(pa.table({"image": pa.array([b"abc"] * 3)}), out, compression="none")
    data = out.getvalue()
    length = int.from_bytes(data[-8:-4], "little")
    body, footer = data[: -8 - length], data[-8 - length : -8]
    places = [n + 1 for n in range(len(footer) - 1) if footer[n] == 0x16 and footer[n + 1] == 6]
    path, tried = tmp_path / "x.parquet", 0
    choices = [c for size in (1, 2, 3) for c in itertools.combinations(places, size)]
    for chosen in choices:
        lying = rewrite(footer, chosen, rows)
        path.write_bytes(body + lying + len(lying).to_bytes(4, "little") + b"PAR1")
        try:
            facts = pq.ParquetFile(path).metadata
        except (pa.ArrowException, OSError):
            continue
        counts = {facts.num_rows, facts.row_group(0).num_rows}
        counts.add(facts.row_group(0).column(0).num_values)
        if counts == {3}:
            continue  # another field
        if counts == {5}:  # no count says so: each row beyond does
            expected: dict[str, Any] = {str(n): b"abc" if n < 3 else "truncated" for n in range(5)}
        elif counts == {0}:
            continue
        else:
            expected = {str(path): "truncated"}
        assert outcome(list_inputs([str(path)])) == expected
        tried += 1
    assert tried >= 3


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_a_column_of_bytes_is_embedded_by_its_name(tmp_path: Path, kind: pa.DataType):
    images = [photo(number) for number in range(3)]
    table = pa.table({"jpg": pa.array(images, kind), "label": [0, 1, 2]})
    pq.write_table(table, tmp_path / "x.parquet")
    rows = run(tmp_path / "x.parquet", "--image-column", "jpg", "--out", tmp_path / "out")
    check_rows(rows, {str(number): data for number, data in enumerate(images)})
    for column in ("image", "label"):
        with pytest.raises(
            UsageError, match=r"It has: jpg \(.*binary\), label \(int64\)\. Name one"
        ):
            list_inputs([str(tmp_path / "x.parquet")], image_column=column)


def test_rows_are_read_in_any_order_from_row_groups_of_any_size(tmp_path: Path):
    values = [os.urandom(5) for _ in range(500)]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": values}), path, row_group_size=190)
    order = [0, 1, 2, 70, 3, 199, 64, 189, 499, 190, 380, 400, 390, 0]
    for row in order:
        source = Input("x", str(path), None, Cell(row // 190, row % 190, "image"))
        assert read(source) == values[row]


def test_a_damaged_table_is_a_row_and_so_is_each_row_that_is_damaged(tmp_path: Path):
    path = tmp_path / "x.parquet"
    values = [bytes([65 + number]) * 2000 for number in range(6)]
    options = {"row_group_size": 3, "compression": "none", "use_dictionary": False}
    pq.write_table(pa.table({"image": values}), path, write_page_checksum=True, **options)
    data = bytearray(path.read_bytes())
    data[data.index(b"BBBB") + 500] ^= 1
    path.write_bytes(data)
    expected = {"0": "truncated", "1": "truncated", "2": "truncated"}
    expected |= {str(number): values[number] for number in (3, 4, 5)}
    assert outcome(list_inputs([str(path)])) == expected
    for content in (b"", b"PAR1 no table", bytes(data[:-9])):
        path.write_bytes(content)
        assert outcome(list_inputs([str(path)])) == {str(path): "truncated"}


def test_an_archive_that_is_not_there_is_refused(tmp_path: Path):
    for name in ("x.tar", "x.parquet"):
        with pytest.raises(UsageError, match=rf'"{tmp_path / name}" is not there'):
            list_inputs([str(tmp_path / name)])


MEASURE = """
import sys
from packvit.corpus.inputs.sources import Cell, Input, read
from packvit.images.errors import ImageError
for row in range(40):
    try:
        said = len(read(Input("x", sys.argv[1], None, Cell(0, row, "image"))))
    except ImageError as error:
        said = error.code
print(said, next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def test_one_value_in_many_rows_is_not_unpacked_for_all(tmp_path: Path):
    column = pa.DictionaryArray.from_arrays(  # case S5; test_limits.py has values that do not pack
        pa.array([0] * 40, pa.int32()), pa.array([bytes(100 << 20)])
    )
    pq.write_table(pa.table({"image": column}), tmp_path / "x.parquet", compression="zstd")
    argv = [sys.executable, "-c", MEASURE, str(tmp_path / "x.parquet")]
    run = subprocess.run(argv, capture_output=True, text=True, check=True)
    said, peak = run.stdout.split()
    assert said == "unreadable"
    assert int(peak) < 400 << 10


def test_a_zip_gives_its_photographs_and_error_rows_for_what_must_not_be_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number, name in enumerate(("b.png", "a/1.png", "a::b.png", "locked.png")):
            archive.writestr(name, photo(number))
        archive.writestr("notes.txt", "no photograph")
        archive.writestr("bomb.png", bytes(257 << 20), compresslevel=1)
    data = bytearray(Path("x.zip").read_bytes())
    entry = data.rindex(b"PK\x01\x02", 0, data.rindex(b"locked.png"))
    data[entry + 8] |= 1  # the flag of encryption, in the central directory
    Path("x.zip").write_bytes(data)
    expected = {
        "a/1.png": photo(1),
        "a::b.png": photo(2),
        "b.png": photo(0),
        "bomb.png": "unreadable",
        "locked.png": "unreadable",
    }
    listing = list_inputs(["x.zip"])
    assert outcome(listing) == expected
    assert (listing.passed_over, listing.root["path"]) == ({".txt": 1}, str(tmp_path / "x.zip"))
    for name in ("*.zip", f"file://{tmp_path}/x.zip"):
        found = outcome(list_inputs([name]))
        assert [*found.values()] == [*expected.values()]
    with zipfile.ZipFile("z.zip", "w") as archive, warnings.catch_warnings(action="ignore"):
        for _ in range(2):
            archive.writestr("b.png", photo(0))
    assert outcome(list_inputs(["z.zip"])) == {"b.png": photo(0), "b.png#2": photo(0)}
    Path("y.zip").write_bytes(data[:-100])
    assert outcome(list_inputs(["x.zip", "y.zip"]))["y.zip"] == "truncated"
