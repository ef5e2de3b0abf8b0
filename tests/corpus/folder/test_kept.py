"""Columns that come with photographs: from the file that has them to the feature folder."""

import io
import json
import os
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

import packvit
from packvit.cli.embed import embed as command
from packvit.corpus import UsageError
from packvit.corpus.folder.checking import UNTOLD, check_folder
from packvit.corpus.folder.layout import encode_manifest, fingerprint
from packvit.corpus.inputs.find import list_inputs
from packvit.corpus.progress import Progress


def photo(seed: int) -> bytes:
    data = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


PHOTO = photo(0)


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def kept(
    paths: list[Path], *names: str, lists: list[Path] | None = None, **options: str
) -> tuple[dict[str, str], dict[str, list[Any]], tuple[str, ...]]:
    """Return the types of the columns, the values by id, and what was noted."""
    listed = [str(path) for path in lists or []]
    listing = list_inputs([str(path) for path in paths], listed, keep=names, **options)
    types = listing.settle_kept(names)
    values = {source.id: json.loads(source.kept or "") for source in listing}
    return dict(types), values, listing.notes


def embed(photos: Path, out: Path, checkpoint: Path, **options: Any) -> Any:
    options = {"workers": 1, "invariant": True, **options}
    return packvit.embed(photos, out=out, model=checkpoint, device="cpu", **options)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*.parquet"))}


def test_a_tars_columns_are_those_that_datasets_reads(tmp_path: Path):
    said = [
        {"score": 0.5, "tags": ["a", "é"], "good": True},
        {"score": 2.0, "tags": [], "good": False},
    ]
    files = {}
    for number, each in enumerate(said):
        files |= {
            f"{number:03}.txt": f"photo № {number}\n".encode(),
            f"{number:03}.png": photo(number),
            f"{number:03}.json": json.dumps(each).encode(),
            f"{number:03}.cls": str(7 * number).encode(),
        }
    path = write_tar(tmp_path / "x.tar", files)
    read: Any = datasets.load_dataset(
        "webdataset", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )
    rows: list[Any] = list(read.remove_columns("png"))
    for row in rows:
        row["json"]["tags"] = json.dumps(row["json"]["tags"], ensure_ascii=False)
    types, values, notes = kept([path], "txt", "cls", "score", "good", "tags")
    assert list(types.values()) == ["string", "int64", "float64", "bool", "string"]
    assert list(values.values()) == [
        [*(row[n] for n in ("txt", "cls")), *(row["json"][n] for n in ("score", "good", "tags"))]
        for row in rows
    ]
    assert notes == ()


SIDECARS = {
    "a/1.png": PHOTO,
    "a/1.json": b'{"caption": "one", "n": 1}',
    "a/1.txt": b"first\n",
    "a/2.png": PHOTO,
    "a/2.cls": b" 7\n",
    "a/3.png": PHOTO,
    "a/3.json": b'{"n": 0.5}',
    "a/4.png": PHOTO,
    "a/5.json": b'{"caption": "no photograph"}',
}


def test_zips_and_local_files_have_the_columns_of_a_tar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    names = ("caption", "n", "txt", "cls")
    types, expected, _ = kept([write_tar(tmp_path / "x.tar", SIDECARS)], *names)
    expected = {f"{key}.png": values for key, values in expected.items()}
    folder = tmp_path / "photos"
    (folder / "a").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in SIDECARS.items():
            archive.writestr(name, data)
            (folder / name).write_bytes(data)
    for path in (tmp_path / "x.zip", folder):
        assert kept([path], *names) == (types, expected, ())
    monkeypatch.chdir(folder)  # a pattern, and files that are named themselves
    for paths in ([Path("a/*.png")], [Path(name) for name in expected]):
        assert kept(paths, *names) == (types, expected, ())
    listing = list_inputs([str(folder)], keep=["n"])
    assert listing.ignored == 0  # what is read beside photographs is not passed over
    assert list_inputs([str(folder)]).ignored == 5


def test_a_name_with_dots_has_what_is_called_as_all_of_it_but_its_last(tmp_path: Path):
    files = {"cat.v1.png": PHOTO, "cat.v2.png": PHOTO, "cat.v2.json": b'{"n": 2}'}
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
            (tmp_path / name).write_bytes(data)
    for path in (tmp_path / "x.zip", tmp_path):
        assert kept([path], "n")[1] == {"cat.v1.png": [None], "cat.v2.png": [2]}


def test_what_cannot_be_read_beside_a_photograph_is_null_and_noted(tmp_path: Path):
    for number in range(7):
        (tmp_path / f"{number}.png").write_bytes(PHOTO)
    (tmp_path / "0.json").write_bytes(b"{")
    (tmp_path / "1.json").write_bytes(b'{"n": "' + b"x" * (1 << 20) + b'"}')
    (tmp_path / "2.json").mkdir()
    os.mkfifo(tmp_path / "3.json")
    (tmp_path / "4.json").symlink_to("nowhere")
    (tmp_path / "5.json").write_bytes(b'{"n": 5}')
    (tmp_path / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": f"{n}.png", "n": 10 * n}) + "\n" for n in (5, 6))
    )
    types, values, notes = kept([tmp_path], "n")
    assert (types, [each for (each,) in values.values()]) == (
        {"n": "int64"},
        [None] * 5 + [5, 60],  # the nearest counts first
    )
    assert notes[0].startswith("5 files or rows have values that cannot be read")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("0", "1"):
            archive.writestr(f"{name}.png", PHOTO)
            archive.writestr(f"{name}.json", f'{{"n": {name}}}')
    data = bytearray((tmp_path / "x.zip").read_bytes())
    data[data.index(b'{"n": 1')] ^= 1  # which its checksum finds
    (tmp_path / "x.zip").write_bytes(data)
    types, values, notes = kept([tmp_path / "x.zip"], "n")
    assert values == {"0.png": [0], "1.png": [None]}
    assert notes[0].endswith(": 1.json.")


def test_what_is_missing_or_no_json_beside_a_photograph_is_null_and_noted(tmp_path: Path):
    path = write_tar(
        tmp_path / "x.tar",
        {
            "a/1.json": b'{"caption": "far before its photograph"}',
            "a/2.png": PHOTO,
            "a/2.json": b"{",
            "a/3.left.png": PHOTO,
            "a/3.right.png": PHOTO,
            "a/3.json": b'{"caption": null, "n": 3}',
            "a/4.png": PHOTO,
            "a/5.json": b'{"caption": "no photograph"}',
            "a/6.png": PHOTO,
            "a/6.json": b'{"caption": "' + b"x" * (1 << 20) + b'"}',
            "a/1.png": PHOTO,
        },
    )
    _, values, notes = kept([path], "caption", "n")
    assert values == {
        "a/1.png": ["far before its photograph", None],
        "a/2.png": [None, None],
        "a/3.left.png": [None, 3],
        "a/3.right.png": [None, 3],
        "a/4.png": [None, None],
        "a/6.png": [None, None],
    }
    assert notes == (
        "2 files or rows have values that cannot be read or are over 1 MiB, and are null: "
        "a/2.json.",
    )


def test_a_folders_metadata_is_what_datasets_reads_and_the_deepest_counts(tmp_path: Path):
    folder = tmp_path / "photos"
    (folder / "train/cats").mkdir(parents=True)
    for name in ("train/1.png", "train/cats/2.png", "train/3.png"):
        (folder / name).write_bytes(PHOTO)
    lines = [
        {"file_name": "1.png", "caption": "one", "label": 1},
        {"file_name": "cats/2.png", "caption": "two", "label": 2},
        {"file_name": "3.png", "caption": "three", "label": 3},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "train/metadata.jsonl").write_text(text)
    reference: Any = datasets.load_dataset(
        "imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "cache")
    )
    expected = sorted((row["label"], row["caption"]) for row in reference)
    types, values, _ = kept([folder], "label", "caption")
    assert types == {"label": "int64", "caption": "string"}
    assert sorted(map(tuple, values.values())) == expected
    (folder / "train/cats/metadata.csv").write_text("file_name,caption\n2.png,a cat\n")
    assert kept([folder], "label", "caption")[1]["train/cats/2.png"] == [2, "a cat"]
    (folder / "train/metadata.jsonl").write_text(text + "{\n")
    assert kept([folder], "label")[2][0].startswith("1 file or row has values that cannot be read")


def test_columns_of_image_tables_and_lists_keep_their_types(tmp_path: Path):
    table = pa.table(
        {
            "image": pa.array([PHOTO, PHOTO, PHOTO]),
            "small": pa.array([1, None, 3], pa.int16()),
            "real": pa.array([0.5, 2.0, None], pa.float32()),
            "word": pa.array(["x", None, "ÿ"]).dictionary_encode(),
            "yes": [True, False, None],
            "box": [{"x": [1, 2]}, None, {"x": []}],
            "whole": pa.array([1.0, 2.0, 3.0]),
        }
    )
    path = tmp_path / "x.parquet"
    pq.write_table(table, path, row_group_size=2)
    names = ["small", "real", "word", "yes", "box", "whole"]
    types, values, _ = kept([path], *names)
    assert list(types.values()) == ["int64", "float64", "string", "bool", "string", "float64"]
    rows = table.select(names).to_pylist()
    for row in rows:
        row["box"] = row["box"] and json.dumps(row["box"])
    assert list(values.values()) == [list(row.values()) for row in rows]
    pq.write_table(
        table.append_column("path", [["a.png", "b.png", "c.png"]]), tmp_path / "l.parquet"
    )
    assert kept([], *names, lists=[tmp_path / "l.parquet"])[1] == dict(
        zip(("a.png", "b.png", "c.png"), values.values(), strict=True)
    )


def test_a_text_tables_columns_are_text_and_json_lines_have_types(tmp_path: Path):
    (tmp_path / "l.csv").write_bytes(b"path,label,caption\na.png,007,\xff\nb.png,,\nc.png\n")
    types, values, _ = kept([], "label", "caption", lists=[tmp_path / "l.csv"])
    assert types == {"label": "string", "caption": "string"}
    assert values == {"a.png": ["007", "\\udcff"], "b.png": [None, None], "c.png": [None, None]}
    lines = (
        b'{"path": "a.png", "n": 1}\n\n{"path": "b.png", "n": 2.5}\n{"path": "c.png", "m": [1]}\n'
    )
    (tmp_path / "l.jsonl").write_bytes(lines)
    assert kept([], "n", "m", lists=[tmp_path / "l.jsonl"])[:2] == (
        {"n": "float64", "m": "string"},
        {"a.png": [1.0, None], "b.png": [2.5, None], "c.png": [None, "[1]"]},
    )
    for bad, said in ((b"[]", "no JSON object in line 4"), (b'{"path": 1}', "no text in line 4")):
        (tmp_path / "bad.jsonl").write_bytes(b'{"path": "x"}\n' * 3 + bad)
        with pytest.raises(UsageError, match=said):
            list_inputs([], [str(tmp_path / "bad.jsonl")])


@pytest.mark.parametrize(
    ("values", "kind", "written"),
    [
        ([1, 2**60], "int64", [1, 2**60]),
        ([1, 0.5], "float64", [1.0, 0.5]),
        ([2**60 + 1, 0.5], "string", ["1152921504606846977", "0.5"]),
        ([2**64, 1], "string", ["18446744073709551616", "1"]),
        ([True, 1], "string", ["true", "1"]),
        (["x", 1], "string", ["x", "1"]),
        ([None, None], "string", [None, None]),
    ],
)
def test_a_column_of_several_kinds_has_a_type_that_loses_nothing(
    tmp_path: Path, values: list[Any], kind: str, written: list[Any]
):
    lines = [json.dumps({"path": f"{n}.png", "v": value}) for n, value in enumerate(values)]
    (tmp_path / "l.jsonl").write_text("\n".join(lines))
    assert kept([], "v", lists=[tmp_path / "l.jsonl"])[:2] == (
        {"v": kind},
        {f"{n}.png": [value] for n, value in enumerate(written)},
    )


def test_a_name_that_is_ours_or_nowhere_is_one_sentence_and_exit_code_2(tmp_path: Path):
    path = write_tar(tmp_path / "x.tar", {"1.png": PHOTO, "1.json": b'{"caption": "x", "b": 1}'})
    for names, said in (
        ("caption,width", 'keep names "width", which is a column of every feature folder.'),
        ("tap_3", 'keep names "tap_3", which is a column of every feature folder.'),
        ("caption,caption", 'keep names "caption" twice.'),
        ("caption,", 'keep names "", which is no name of a column.'),
        ("label", "What comes with them: caption, b, json."),
    ):
        argv = [str(path), "--keep", names, "--out", str(tmp_path / "out")]
        done = CliRunner().invoke(command, argv)
        assert (done.exit_code, said in " ".join(done.stderr.split())) == (2, True), done.stderr
    assert not (tmp_path / "out").exists()
    table = pa.table({"image": [PHOTO], "when": pa.array([0], pa.timestamp("ms"))})
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UsageError, match=r'has timestamp\[ms\] in "when", which is not kept'):
        list_inputs([str(tmp_path / "x.parquet")], keep=["when"])


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A folder with metadata, in which one photograph is none, and one has no metadata."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.png").write_bytes(photo(number) if number != 2 else b"no picture")
    lines = [{"file_name": f"{n}.png", "caption": f"№ {n}", "label": n} for n in (0, 1, 2, 4)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


EXPECTED = {"caption": ["№ 0", "№ 1", "№ 2", None, "№ 4"], "label": [0, 1, 2, None, 4]}


def test_kept_columns_go_through_every_way_to_a_finished_folder(
    tmp_path: Path, job: Path, checkpoint: Path
):
    keep = ["caption", "label"]
    embed(job, tmp_path / "one", checkpoint, keep=keep, rows_per_part=2)
    table = packvit.read(tmp_path / "one").table
    assert table.select(keep).to_pydict() == EXPECTED
    rows = packvit.read(tmp_path / "one")
    assert rows.kept.equals(table.select(keep))
    assert rows.good().kept.to_pydict() == {
        name: [value for place, value in enumerate(values) if place != 2]
        for name, values in EXPECTED.items()
    }
    assert table.schema.names[-2:] == keep
    assert table.schema.field("label").type == pa.int64()
    assert check_folder(tmp_path / "one").faults == []
    fresh = bytes_of(tmp_path / "one")

    (job / "2.png").write_bytes(photo(2))
    embed(job, tmp_path / "one", checkpoint, keep=keep, rows_per_part=2, retry_errors=True)
    embed(job, tmp_path / "two", checkpoint, keep=keep, rows_per_part=2)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two") != fresh
    assert packvit.read(tmp_path / "two").good().table.select(keep).to_pydict() == EXPECTED

    with pytest.raises(UsageError, match=r"(?s)keep: .*-> nothing.*kept_sha256"):
        embed(job, tmp_path / "one", checkpoint, rows_per_part=2)
    embed(job, tmp_path / "other", checkpoint, reuse=[tmp_path / "one"], rows_per_part=2)
    assert packvit.read(tmp_path / "other").kept.schema.names == []
    (job / "metadata.jsonl").write_text('{"file_name": "0.png", "caption": "x", "label": 0}\n')
    with pytest.raises(UsageError, match="kept_sha256"):
        embed(job, tmp_path / "one", checkpoint, keep=keep, rows_per_part=2)
    assert embed(job, tmp_path / "one", checkpoint, update=True).reused == 5
    changed = {"caption": ["x", *[None] * 4], "label": [0, *[None] * 4]}
    assert packvit.read(tmp_path / "one").table.select(keep).to_pydict() == changed


@pytest.mark.soak
def test_several_processes_write_the_same_kept_columns(tmp_path: Path, job: Path, checkpoint: Path):
    for processes in (1, 2):
        out = tmp_path / str(processes)
        embed(job, out, checkpoint, keep=["label"], rows_per_part=2, processes=processes)
    assert packvit.read(tmp_path / "2").table["label"].to_pylist() == EXPECTED["label"]
    assert bytes_of(tmp_path / "1") == bytes_of(tmp_path / "2")


def test_a_check_finds_kept_columns_that_the_manifest_does_not_describe(
    tmp_path: Path, job: Path, checkpoint: Path
):
    out = tmp_path / "out"
    embed(job, out, checkpoint, keep=["label"])
    path = out / "_manifest.json"
    manifest = {n: v for n, v in json.loads(path.read_text()).items() if n != "manifest_sha256"}
    for change, said in (
        ({"keep": [["label", "string"]]}, "does not have the columns"),
        ({"keep": [["label", "date"]]}, "has keep that is not a list of names and types"),
        ({"keep": [["id", "string"]]}, "has keep with a name that a kept column cannot"),
        ({"kept_sha256": "0" * 64}, "was written for other kept columns"),
    ):
        other = manifest | change
        settings = {name: value for name, value in other.items() if name not in UNTOLD}
        path.write_bytes(encode_manifest(other | {"fingerprint": fingerprint(settings)}))
        found = [fault.found for fault in check_folder(out).faults]
        assert any(said in each for each in found), found


def test_a_photograph_that_is_gone_keeps_what_came_with_it(
    tmp_path: Path, job: Path, checkpoint: Path
):
    def stop(progress: Progress) -> None:
        if progress.committed >= 2:
            raise KeyboardInterrupt

    out, lines = tmp_path / "out", (job / "metadata.jsonl").read_text()
    with pytest.raises(KeyboardInterrupt):
        embed(job, out, checkpoint, keep=["label"], rows_per_part=2, progress=stop)
    for _ in range(2):  # from what a killed job left, and from a finished folder
        (job / "4.png").unlink(missing_ok=True)
        (job / "metadata.jsonl").write_text(lines.replace("4.png", "gone.png"))
        embed(job, out, checkpoint, keep=["label"], rows_per_part=2)
        table = packvit.read(out).table
        assert table["label"].to_pylist() == EXPECTED["label"]
        assert table["status"].to_pylist()[-1] == "missing"
    assert check_folder(out).faults == []
    (job / "4.png").write_bytes(photo(4))
    (job / "metadata.jsonl").write_text(lines)
    embed(job, out, checkpoint, keep=["label"], rows_per_part=2, retry_errors=True)
    embed(job, tmp_path / "fresh", checkpoint, keep=["label"], rows_per_part=2)
    assert bytes_of(out) == bytes_of(tmp_path / "fresh")
