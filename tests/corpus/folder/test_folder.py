import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from features import contents
from full_disk import no_file_over, small_disk

from packvit.corpus import UsageError, WriteError
from packvit.corpus.folder.layout import (
    claim,
    commit,
    enter,
    fingerprint,
    put,
    read_commits,
    read_manifest,
    stage,
    write_commits,
    write_manifest,
)
from packvit.corpus.folder.ownership import check_usable
from packvit.corpus.folder.parts import Outputs, build_table, encode_parquet
from packvit.corpus.folder.rows import Row

OUTPUTS = Outputs(width=8, lists=("tokens", "tap_3"))
ROWS = [
    Row("a.jpg", "ok", None, "alpha on white", "aa", 30, 20, 1, 2, 3),
    Row("b\\xe9.jpg", "truncated", "decode", None, "bb"),
    Row("é/c.jpg", "ok", None, None, "cc", 10, 10, 1, 1, 1),
    Row("d.jpg", "non_finite", "encode", None, "dd", 10, 20, 1, 2, 1),
]


def table(outputs: Outputs = OUTPUTS) -> pa.Table:
    draw = np.random.default_rng(0)
    pooled = draw.standard_normal((4, 8)).astype(np.float32)
    pooled[3] = np.nan
    lists = {
        name: [
            draw.standard_normal((row.rows * row.columns, 8)).astype(outputs.dtype_out)
            if row.status == "ok" and row.rows and row.columns
            else None
            for row in ROWS
        ]
        for name in outputs.lists
    }
    return build_table(outputs, ROWS, {"pooled": pooled}, lists)


def test_a_part_says_of_every_input_what_is_known_in_the_types_promised(tmp_path: Path):
    commit(tmp_path, 0, table())
    found = pq.read_table(tmp_path / "data/part-00000.parquet", page_checksum_verification=True)
    vector = pa.list_(pa.field("element", pa.float16()), 8)
    assert {field.name: field.type for field in found.schema} == {
        **dict.fromkeys(("id", "status", "stage", "note", "sha256"), pa.string()),
        **dict.fromkeys(("width", "height", "frames", "rows", "columns"), pa.int32()),
        "pooled": pa.list_(pa.field("element", pa.float32()), 8),
        "tokens": pa.list_(pa.field("element", vector)),
        "tap_3": pa.list_(pa.field("element", vector)),
    }
    plain = found.drop_columns(["pooled", "tokens", "tap_3"]).to_pylist()
    assert [tuple(row.values()) for row in plain] == [
        tuple(getattr(row, name) for name in plain[0]) for row in ROWS
    ]


def test_features_come_back_as_they_were_and_are_null_where_a_row_is_an_error(tmp_path: Path):
    written = table()
    commit(tmp_path, 0, written)
    found = pq.read_table(tmp_path / "data/part-00000.parquet")
    assert found.equals(written)
    for name in ("pooled", "tokens", "tap_3"):
        assert [value is None for value in found[name].to_pylist()] == [False, True, False, True]
    assert [len(tokens) for tokens in found["tokens"].to_pylist() if tokens] == [6, 1]
    assert np.shape(found["tokens"][0].as_py()) == (6, 8)


def test_tokens_can_be_float32():
    exact = Outputs(8, ("tokens",), "float32")
    assert table(exact).schema.field("tokens").type.value_type.value_type == pa.float32()


def test_a_part_of_errors_alone_can_be_written_and_read(tmp_path: Path):
    rows = [Row("x.jpg", "missing", "list")]
    lists = {"tokens": [None], "tap_3": [None]}
    entry = commit(
        tmp_path, 7, build_table(OUTPUTS, rows, {"pooled": np.zeros((1, 8), np.float32)}, lists)
    )
    assert (entry.rows, entry.errors, entry.tokens) == (1, 1, 0)
    (row,) = pq.read_table(tmp_path / "data/part-00007.parquet").to_pylist()
    assert (row["status"], row["stage"], row["pooled"], row["tokens"]) == (
        "missing",
        "list",
        None,
        None,
    )


def test_the_log_holds_what_anyone_can_count_again(tmp_path: Path):
    entries = [commit(tmp_path, number, table()) for number in range(2)]
    assert tuple(entries) == read_commits(tmp_path)
    assert (entries[0].rows, entries[0].errors, entries[0].tokens) == (4, 2, 7)
    for entry in entries:
        data = (tmp_path / entry.part).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry.bytes, entry.sha256)
    assert sorted(contents(tmp_path)) == [
        "_commits.jsonl",
        "data/part-00000.parquet",
        "data/part-00001.parquet",
    ]


def test_a_part_comes_into_data_only_when_it_is_committed(tmp_path: Path):
    commit(tmp_path, 0, table())
    staged = stage(tmp_path, 1, table(), attempt="0000000a")
    assert os.listdir(tmp_path / "data") == ["part-00000.parquet"]
    assert staged.file.startswith(".")  # readers of the folder pass over it
    assert pq.read_table(tmp_path).num_rows == 4
    enter(tmp_path, staged)
    assert pq.read_table(tmp_path).num_rows == 8
    assert not (tmp_path / staged.file).exists()


def test_the_same_rows_give_the_same_bytes_in_another_process(tmp_path: Path):
    code = (
        "import hashlib; from test_folder import table, encode_parquet;"
        "print(hashlib.sha256(encode_parquet(table())).hexdigest())"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.strip() == hashlib.sha256(encode_parquet(table())).hexdigest()


def test_a_flipped_bit_in_any_page_is_caught_by_a_reader_that_verifies(tmp_path: Path):
    commit(tmp_path, 0, table())
    path = tmp_path / "data/part-00000.parquet"
    data = bytearray(path.read_bytes())
    values = table()["tokens"].combine_chunks().flatten().flatten().to_numpy()[:48].tobytes()
    place = data.index(values)  # features are not compressed, so they can be found
    assert pq.read_table(pa.BufferReader(bytes(data)), page_checksum_verification=True)
    for bit in random.Random(0).sample(range(8 * len(values)), 50):
        flip = 1 << bit % 8
        data[place + bit // 8] ^= flip
        assert not pq.read_table(pa.BufferReader(bytes(data))).equals(table())
        with pytest.raises(OSError, match="CRC"):
            pq.read_table(pa.BufferReader(bytes(data)), page_checksum_verification=True)
        data[place + bit // 8] ^= flip


def test_a_line_cut_short_does_not_count(tmp_path: Path):
    entry = commit(tmp_path, 0, table())
    commit(tmp_path, 1, table())
    log = tmp_path / "_commits.jsonl"
    log.write_text(log.read_text()[:-1])
    assert read_commits(tmp_path) == (entry,)
    assert read_commits(tmp_path / "elsewhere") == ()


def test_a_manifest_is_replaced_in_one_step(tmp_path: Path):
    assert read_manifest(tmp_path) is None
    write_manifest(tmp_path, {"complete": False})
    write_manifest(tmp_path, {"complete": True})
    assert read_manifest(tmp_path) == {"complete": True}
    assert os.listdir(tmp_path) == ["_manifest.json"]


def test_a_file_that_is_there_and_cannot_be_read_is_said_in_a_sentence(tmp_path: Path):
    (tmp_path / "a").symlink_to("/proc/self/mem")  # a regular file, of which no read succeeds
    with pytest.raises(WriteError, match=r"/a could not be read: Input/output error\. Fix that"):
        put(tmp_path / "a", b"new")


def test_the_fingerprint_does_not_hang_on_the_order_of_the_settings():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1, "b": [2]}) != fingerprint({"a": 1, "b": [3]})


def test_a_folder_that_holds_anything_else_is_refused_with_what_it_holds(tmp_path: Path):
    check_usable(tmp_path)
    check_usable(tmp_path / "not there yet")
    (tmp_path / ".lock").touch()
    (tmp_path / "._manifest.json.tmp").touch()  # a job that was killed at once
    check_usable(tmp_path)
    (tmp_path / "holiday.txt").touch()
    with pytest.raises(UsageError, match=r"not empty: it holds holiday\.txt and 0 other files"):
        check_usable(tmp_path, overwrite=True)
    with pytest.raises(UsageError, match=r"holiday\.txt is not a folder"):
        check_usable(tmp_path / "holiday.txt")
    (tmp_path / "manifest.json").write_text('{"manifest_version": 3}')  # of a browser's extension
    for overwrite in (False, True):
        with pytest.raises(UsageError, match=r"no _manifest\.json of packvit\. Choose a new"):
            check_usable(tmp_path, overwrite=overwrite)


def test_a_damaged_manifest_is_refused_and_can_be_started_over(tmp_path: Path):
    write_manifest(tmp_path, {"format": "packvit features 2"})
    check_usable(tmp_path)
    manifest = tmp_path / "_manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-3])
    with pytest.raises(
        UsageError, match=r"_manifest\.json is damaged, .* start over with `overwrite`"
    ):
        check_usable(tmp_path)
    check_usable(tmp_path, overwrite=True)


def test_a_folder_is_held_by_one_job_at_a_time_and_let_go_when_it_ends(tmp_path: Path):
    out = tmp_path / "deep" / "features"
    with claim(out), pytest.raises(UsageError, match="Another job is writing to"), claim(out):
        raise AssertionError("two jobs hold one folder")
    with claim(out):
        pass


def test_a_line_of_the_log_that_is_not_exactly_one_does_not_count(tmp_path: Path):
    entry = commit(tmp_path, 0, table())
    line = (tmp_path / "_commits.jsonl").read_bytes()
    for bad in (b"\xff\n", b"[]\n", line.replace(b"4", b'"4"', 1), b" " + line, line[:-2] + b"\n"):
        (tmp_path / "_commits.jsonl").write_bytes(bad + line)
        assert read_commits(tmp_path) == (entry,)


def test_a_part_that_is_mended_is_entered_where_it_belongs(tmp_path: Path):
    for number in range(3):
        commit(tmp_path, number, table())
    before = (tmp_path / "_commits.jsonl").read_bytes()
    write_commits(tmp_path, [read_commits(tmp_path)[place] for place in (2, 0)])
    assert [entry.part[10:15] for entry in read_commits(tmp_path)] == ["00000", "00002"]
    commit(tmp_path, 1, table(), mends=True)
    assert (tmp_path / "_commits.jsonl").read_bytes() == before


def test_a_killed_job_holds_no_folder(tmp_path: Path):
    code = (
        "import sys, time; from pathlib import Path\n"
        "from packvit.corpus.folder.layout import claim\n"
        "with claim(Path(sys.argv[1])):\n    print('mine', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(UsageError, match="Another job"), claim(tmp_path):
            raise AssertionError("two processes hold one folder")
        other.send_signal(signal.SIGKILL)
        other.wait()
    with claim(tmp_path):
        pass


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 32 KB: room for a few parts, then for a part and not for its line in the log."""
    with small_disk(tmp_path, "32k") as disk:
        yield disk


def test_a_full_disk_is_said_in_a_sentence_and_leaves_only_what_is_whole(full_disk: Path):
    entry = commit(full_disk, 0, table())
    more = range(1, 1 + 32768 // entry.bytes)
    with pytest.raises(WriteError, match=r"could not be written: No space left on device\. Fix"):
        all(commit(full_disk, number, table()) for number in more)
    parts = [entry.part for entry in read_commits(full_disk)]
    assert sorted(contents(full_disk)) == ["_commits.jsonl", *parts]
    for entry in read_commits(full_disk):
        data = (full_disk / entry.part).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry.sha256


def test_a_log_that_takes_no_line_leaves_no_part(tmp_path: Path):
    entry = commit(tmp_path, 0, table())
    size = (tmp_path / "_commits.jsonl").stat().st_size
    filler = commit(tmp_path, 1, table())
    with (tmp_path / "_commits.jsonl").open("a") as log:
        log.write(" " * (2 * filler.bytes) + "\n")  # now the log is larger than any part
    before = (tmp_path / "_commits.jsonl").read_bytes()
    with (
        no_file_over(len(before) + 10),
        pytest.raises(WriteError, match=r"_commits\.jsonl could not be written"),
    ):
        commit(tmp_path, 2, table())
    assert (tmp_path / "_commits.jsonl").read_bytes() == before
    assert size < len(before)
    assert sorted(contents(tmp_path)) == ["_commits.jsonl", entry.part, filler.part]


def test_a_folder_in_the_place_of_a_part_is_said_in_a_sentence_and_stays(tmp_path: Path):
    (tmp_path / "data/part-00000.parquet").mkdir(parents=True)
    with pytest.raises(
        WriteError, match=r"data/part-00000\.parquet could not be written: Is a directory"
    ):
        commit(tmp_path, 0, table())
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")] == [
        "data/part-00000.parquet"
    ]


def test_a_place_where_nothing_can_be_made_is_said_in_a_sentence(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="could not be written: Not a directory"):
        claim(tmp_path / "file" / "features").__enter__()


def test_the_log_is_json_lines_without_a_clock(tmp_path: Path):
    commit(tmp_path, 0, table())
    line = json.loads((tmp_path / "_commits.jsonl").read_text())
    assert list(line) == ["part", "rows", "errors", "tokens", "bytes", "sha256"]


def test_the_format_does_not_load_torch():
    code = "import sys, packvit.corpus.folder.layout; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
