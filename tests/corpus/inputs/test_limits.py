"""Tables and lists that would fill memory or never end, and tables as writers really make them."""

import ast
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rotten import encode, pixels
from served import outcome_of

import packvit
from packvit.checkpoints.folders import MOST_JSON
from packvit.config import ImageConfig
from packvit.corpus import UsageError
from packvit.corpus.decode.prepare import Preprocessing
from packvit.corpus.decode.processes import Worker
from packvit.corpus.inputs import limits
from packvit.corpus.inputs.cells import open_cells
from packvit.corpus.inputs.find import list_inputs
from packvit.corpus.inputs.retries import BOUND
from packvit.corpus.inputs.sources import Cell, Input
from packvit.images.files import MAX_BYTES

HALF = (0.5, 0.5, 0.5)
IMAGES = ImageConfig(patch=14, mean=HALF, std=HALF, resample="bicubic", sizing=None)
PREPROCESSING = Preprocessing(IMAGES, "hwc", "native", 256, 100_000_000)
MIB = 1 << 20


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    worker.await_ready()
    yield worker
    worker.end()


def held(worker: Worker) -> int:
    """Return the most bytes that a worker ever held."""
    lines = Path(f"/proc/{worker.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def read_cells(worker: Worker, path: Path, rows: int) -> list[tuple[str, str | None]]:
    """Return how a worker ends with each row of a table."""
    found = []
    for row in range(rows):
        source = Input(str(row), str(path), None, Cell(0, row, "image"))
        [prepared], _ = worker.prepare([source], PREPROCESSING, lambda pixels: None, 60.0)
        found.append((prepared.row.status, prepared.row.stage))
    return found


def shared(value: object, rows: int) -> pa.DictionaryArray:
    """Return a column that holds one value in many rows."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([value]))


def test_a_value_that_many_rows_share_is_not_unpacked_for_each(tmp_path: Path, worker: Worker):
    size = 100 * MIB  # case S5
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": shared(os.urandom(size), 40)}), path, compression="zstd")
    before = held(worker)
    assert read_cells(worker, path, 3) == [("unidentified", "header")] * 3
    assert held(worker) - before < size + 500 * MIB


@pytest.mark.soak
def test_what_unpacks_to_too_much_is_a_row_whatever_its_footer_says(tmp_path: Path, worker: Worker):
    path = tmp_path / "x.parquet"  # case S5
    photo = encode(pixels(20, 30), "PNG")
    value = photo + os.urandom(4 * MIB) + bytes(520 * MIB)  # below MOST_RATIO
    pq.write_table(pa.table({"image": pa.array([value])}), path, compression="zstd")
    del value
    before = held(worker)
    assert read_cells(worker, path, 1) == [("out_of_memory", "read")]
    assert held(worker) - before < 500 * MIB
    pq.write_table(pa.table({"image": pa.array([photo])}), path)
    assert read_cells(worker, path, 1) == [("ok", None)]


def test_a_footer_that_would_fill_memory_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "x.parquet"  # kind S5
    pq.write_table(pa.table({"image": pa.array([b"x"]), "path": pa.array(["x.jpg"])}), path)
    assert outcome_of(str(path)) == {"0": b"x"}
    assert outcome_of(lists=[str(path)]) == {"x.jpg": "missing"}
    monkeypatch.setattr(limits, "MOST_FOOTER", 100)
    assert outcome_of(str(path)) == {str(path): "unreadable"}
    with pytest.raises(UsageError, match="cannot be read"):
        outcome_of(lists=[str(path)])


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [False, True])
@pytest.mark.parametrize("compression", ["none", "snappy"])
def test_rows_before_a_page_that_is_too_large_are_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    dictionary: bool,
    compression: str,
):
    path = tmp_path / "x.parquet"  # case S5
    values = [os.urandom(100) for _ in range(300)]
    values[200] = os.urandom(100_000)
    pq.write_table(
        pa.table({"image": pa.array(values)}),
        path,
        use_dictionary=dictionary,
        dictionary_pagesize_limit=500,
        compression=compression,
        data_page_version=version,
        data_page_size=1000,
        write_batch_size=5,
    )
    monkeypatch.setattr(limits, "MOST_KEPT", 20_000)  # the headers of a smaller one are not read
    monkeypatch.setattr(limits, "MOST_OF_PAGE", 50_000)
    found = [*outcome_of(str(path)).values()]
    read = found.index("out_of_memory")
    assert 185 < read <= 200
    assert found == values[:read] + ["out_of_memory"] * (300 - read)
    monkeypatch.setattr(limits, "MOST_OF_PAGE", 300_000)
    open_cells.cache_clear()
    assert [*outcome_of(str(path)).values()] == values


def test_names_in_a_table_that_no_path_can_have_are_a_row(tmp_path: Path):
    path = tmp_path / "x.parquet"  # case S5, in the process that lists
    names = shared("x" * (2 * MIB), 3000)
    images = pa.array([b"x"] * 3000)
    column = pa.StructArray.from_arrays([images, names], ["bytes", "path"])
    pq.write_table(pa.table({"image": column}), path, compression="zstd")
    assert outcome_of(str(path)) == {str(path): "truncated"}


def test_null_rows_that_take_no_space_are_not_listed_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "x.parquet"  # case V5
    pq.write_table(pa.table({"image": pa.nulls(50_000, pa.binary())}), path, compression="zstd")
    assert len(list_inputs([str(path)])) == 50_000
    monkeypatch.setattr(limits, "FEW_ROWS", 1000)
    assert outcome_of(str(path)) == {str(path): "truncated"}


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), "dictionary"])
def test_paths_are_opened_whatever_their_writer_kept_them_in(tmp_path: Path, kind: Any):
    (tmp_path / "a.png").write_bytes(data := encode(pixels(20, 30), "PNG"))  # case V11
    paths = pa.array([str(tmp_path / "a.png")])
    paths = paths.dictionary_encode() if kind == "dictionary" else paths.cast(kind)
    column = pa.StructArray.from_arrays([pa.nulls(1, pa.binary()), paths], ["bytes", "path"])
    pq.write_table(pa.table({"image": column}), tmp_path / "x.parquet")
    assert list(outcome_of(str(tmp_path / "x.parquet")).values()) == [data]


@pytest.mark.parametrize("alone", [False, True])
def test_a_column_of_paths_alone_is_opened(tmp_path: Path, alone: bool):  # case V11
    (tmp_path / "a.png").write_bytes(data := encode(pixels(20, 30), "PNG"))
    paths = pa.array([str(tmp_path / "a.png"), str(tmp_path / "gone.png")])
    column = paths if alone else pa.StructArray.from_arrays([paths], ["path"])
    pq.write_table(pa.table({"image": column}), tmp_path / "x.parquet")
    assert [*outcome_of(str(tmp_path / "x.parquet")).values()] == [data, "missing"]


@pytest.mark.parametrize("nested", [False, True])
def test_images_of_one_length_are_read(tmp_path: Path, nested: bool):  # kind V11
    images = pa.array([b"one", None, b"two"], pa.binary(3))
    column = pa.StructArray.from_arrays([images], ["bytes"]) if nested else images
    pq.write_table(pa.table({"image": column}), tmp_path / "x.parquet")
    assert outcome_of(str(tmp_path / "x.parquet")) == {"0": b"one", "1": "missing", "2": b"two"}


@pytest.mark.parametrize("kind", ["binary", "large_binary", "binary_view", "dictionary"])
def test_images_are_read_whatever_their_writer_kept_them_in(tmp_path: Path, kind: str):
    images = pa.array([b"one", None, b"two"])
    images = images.dictionary_encode() if kind == "dictionary" else images.cast(kind)
    pq.write_table(pa.table({"image": images}), tmp_path / "x.parquet")
    found = outcome_of(str(tmp_path / "x.parquet"))
    assert found == {"0": b"one", "1": "missing", "2": b"two"}


@pytest.mark.parametrize("name", ["x.txt", "x.csv"])
def test_a_list_without_lines_is_refused_before_it_fills_memory(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"path\n" + bytes(3 * MIB))
    with pytest.raises(UsageError, match=r"has a line of over 1 MiB, so it is no list\."):
        list_inputs([], [str(tmp_path / name)])


def test_lines_are_the_same_wherever_they_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from packvit.corpus.inputs import lists
    from packvit.corpus.inputs.kept import Keeping

    path = tmp_path / "x.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\n\nthree\xff\nlast")
    for piece in (1, 2, 3, 7, 1000):
        monkeypatch.setattr(lists, "PIECE", piece)
        found = [name for name, _ in lists.read_list(str(path), "path", Keeping())]
        assert found == [b"one", b"two", b"three\xff", b"last"]


def test_memory_is_limited_only_while_it_is_asked_for():
    with limits.limited_memory(100 * MIB), pytest.raises(MemoryError):
        bytes(200 * MIB)
    assert len(bytes(200 * MIB)) == 200 * MIB


# What opens files or asks servers itself: the reader, what it stands on, and what needs a reason.
OPENERS = {
    "corpus/inputs/reader.py": {"open", "url_to_fs"},
    "corpus/inputs/lists.py": {"open"},  # a shell's pipe, and the first bytes of a named file
    "corpus/inputs/limits.py": {"open"},  # /proc
    "corpus/inputs/pages.py": {"open"},  # a table that `open_source` has opened before
    "images/files.py": {"open"},  # `read_file`, of regular files
    "checkpoints/folders.py": {"read_bytes"},  # of files that `find_file` found in their folder
    "checkpoints/downloads.py": {"hf_hub_download", "http_stream_backoff"},
    "checkpoints/ranges.py": {"read_bytes"},  # of small files that were downloaded
    "checkpoints/files.py": {"path.open"},
    "checkpoints/tensors.py": {"safe_open", "path.open"},
}
CALLS = {"open", "url_to_fs", "read_bytes", "read_text", "safe_open", "urlopen"}
CALLS |= {"hf_hub_download", "http_stream_backoff", "http_backoff", "get_session"}


def test_nothing_else_opens_what_comes_from_outside():
    """Point 4 of issue 16: no path can forget the limits."""
    package = Path(packvit.__file__).parent
    found: dict[str, set[str]] = {}
    for folder in ("corpus/inputs", "corpus/decode", "images", "checkpoints"):
        for file in sorted((package / folder).glob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if not isinstance(node, ast.Call):
                    continue
                name = ast.unparse(node.func)
                last = name.rpartition(".")[2]
                if last in CALLS and (last != "open" or name in ("open", "path.open")):
                    shown = name if last == "open" else last
                    found.setdefault(str(file.relative_to(package)), set()).add(shown)
    assert found == OPENERS


def test_the_security_page_promises_these_limits():
    assert len(BOUND.pauses) + 1 == 4
    page = (Path(packvit.__file__).parents[1] / "SECURITY.md").read_text()
    for said in (
        f"any file may have {MAX_BYTES >> 30} GiB",
        f"or {limits.MOST_UNDECLARED >> 20} MiB after decompression",
        f"a page of links may have {limits.MOST_PAGE >> 20} MiB and take {limits.PAGE_SECONDS:g} s",
        f"{limits.MOST_UNDECLARED >> 20} MiB, or {limits.MOST_RATIO_OF_ZIP} times its size",
        f"unpack to {limits.MOST_KEPT >> 20} MiB, or {limits.MOST_RATIO} times its size",
        f"may take {limits.MOST_MEMORY >> 20} MiB beside the largest page (on Linux)",
        f"unpacking a page {limits.MOST_OF_PAGE >> 20} MiB",
        f"a footer {limits.MOST_FOOTER >> 20} MiB",
        f"directory of more than {limits.MOST_DIRECTORY >> 20} MiB",
        f"or {limits.MOST_ROWS} for each byte",
        f"a line may have {limits.MOST_LINE >> 20} MiB",
        f"a list at a URL {limits.MOST_LIST >> 30} GiB",
        f"a checkpoint's JSON {MOST_JSON >> 20} MiB",
        f"tried four times in all, with at most {BOUND.longest:g} seconds",
    ):
        assert said in page, said
