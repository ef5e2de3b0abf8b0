"""Lists of paths, patterns and URLs, through the command and one by one."""

import glob
import gzip
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from fsspec.registry import _registry as registry
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rotten import write_good
from served import outcome

from packvit.cli.embed import embed
from packvit.corpus import UsageError
from packvit.corpus.folder.layout import read_commits
from packvit.corpus.inputs.find import list_inputs
from packvit.corpus.inputs.listing import Listing
from packvit.corpus.inputs.patterns import compile_pattern


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Four photographs under the working directory, by their paths."""
    monkeypatch.chdir(tmp_path)
    found = []
    for folder in ("photos", "photos/more"):
        found += [f"{folder}/{name}" for name in write_good(Path(folder), 2)]
    Path("photos/notes.txt").write_text("no photograph")
    return sorted(found, key=str.encode)


def ids(listing: Listing) -> list[str]:
    return [source.id for source in listing]


def run(*words: str) -> dict[str, dict[str, Any]]:
    """Run the command with the tiny model, and return the rows it wrote by id."""
    done = CliRunner().invoke(embed, [*words, "--out", "out", "--overwrite", "--device", "cpu"])
    assert done.exit_code in (0, 3), done.output
    tables = [pq.read_table(Path("out") / entry.part) for entry in read_commits(Path("out"))]
    return {row["id"]: row for row in pa.concat_tables(tables).to_pylist()}


def check_rows(rows: dict[str, dict[str, Any]], paths: list[str]) -> None:
    assert list(rows) == paths
    for name, row in rows.items():
        assert row["status"] == "ok"
        assert row["sha256"] == hashlib.sha256(Path(name).read_bytes()).hexdigest()


def test_lists_of_every_kind_give_a_row_for_each_path(photos: list[str]):
    Path("a.txt").write_bytes("\r\n".join([*photos, "", "gone.jpg"]).encode())
    Path("b.csv").write_text("\ufefflabel,path\n" + "".join(f'1,"{path}"\n' for path in photos))
    pq.write_table(pa.table({"file": photos, "label": [0] * 4}), "c.parquet")
    rows = run("--list", "a.txt")
    assert rows.pop("gone.jpg")["status"] == "missing"
    check_rows(rows, photos)
    check_rows(run("--list", "b.csv"), photos)
    check_rows(run("--list", "c.parquet", "--column", "file"), photos)


def test_lists_as_windows_and_pandas_write_them(photos: list[str]):
    text = "\r\n".join(photos)
    Path("a.txt").write_text("\ufeff" + text)
    Path("b.csv").write_text("\ufeffpath\r\n" + text)
    pq.write_table(pa.table({"path": pa.array(photos).dictionary_encode()}), "c.parquet")
    for name in ("a.txt", "b.csv", "c.parquet"):
        assert ids(list_inputs([], [name])) == photos
    for name in ("d.txt", "d.csv"):
        Path(name).write_text("path\n" + text, encoding="utf-16")
        with pytest.raises(UsageError, match=rf"The list {name} is UTF-16\. Save it as UTF-8\."):
            list_inputs([], [name])


def test_what_find_prints_with_print0_is_no_list(photos: list[str]):
    Path("a.txt").write_text("".join(f"{path}\0" for path in photos))
    with pytest.raises(UsageError, match=r"a\.txt holds a NUL byte, as no path does.*-print0"):
        list_inputs([], ["a.txt"])


def test_lists_and_paths_go_together(photos: list[str]):
    Path("a.txt").write_text(photos[0] + "\n")
    Path("b").write_text(photos[1])
    found = ids(list_inputs(["photos/more"], ["a.txt", "b"]))
    assert found == sorted({photos[0], photos[1], *(p for p in photos if "more" in p)})
    with pytest.raises(UsageError, match=rf'called "{photos[0]}"'):
        list_inputs(["photos"], ["a.txt"])


def test_a_list_takes_names_of_any_bytes_and_files_of_any_kind(photos: list[str]):
    with open(b"caf\xe9", "wb") as file:
        file.write(b"here")
    os.mkfifo("pipe.jpg")
    Path("broken.jpg").symlink_to("nowhere")
    names = [b"caf\xe9", b"pipe.jpg", b"broken.jpg", b"photos", b"a\0b.jpg", b"*.jpg"]
    Path("a.txt").write_bytes(b"\n".join(names))
    assert outcome(list_inputs([], ["a.txt"])) == {
        "caf\\xe9": b"here",
        "pipe.jpg": "not_a_file",
        "broken.jpg": "missing",
        "photos": "not_a_file",
        "a\\x00b.jpg": "missing",
        "*.jpg": "missing",
    }


def test_a_list_that_cannot_be_used_is_wrong_use_with_the_columns_there_are(photos: list[str]):
    Path("a.csv").write_text("name,label\nx.jpg,1\n")
    Path("hole.csv").write_text("path,label\n,1\n,2\n")
    Path("twice.csv").write_text("path,path\nx.jpg,1\n")
    Path("empty.txt").touch()
    Path("text.parquet").write_text("x.jpg\n")
    pq.write_table(pa.table({"name": ["x.jpg"], "path": [1]}), "a.parquet")
    for name, message in (
        ("gone.txt", "The list gone.txt cannot be read: there is no file at this path"),
        ("photos", "The list photos cannot be read: this is a folder"),
        ("a.csv", 'a.csv has no column "path" of paths. It has: name, label. Name one with --col'),
        ("twice.csv", 'twice.csv has no column "path" of paths. It has: path, path'),
        ("a.parquet", r"It has: name \(string\), path \(int64\)"),
        ("hole.csv", 'hole.csv has no "path" in any row'),
        ("text.parquet", "text.parquet cannot be read: it is not a whole Parquet file"),
        ("empty.txt", "No photographs were found in empty.txt"),
    ):
        with pytest.raises(UsageError, match=message):
            list_inputs([], [name])
    done = CliRunner().invoke(embed, ["--list", "gone.txt", "--out", "out"])
    assert done.exit_code == 2
    assert not Path("out").exists()


def test_what_is_no_list_by_its_suffix_is_refused_and_no_row_for_each_line(photos: list[str]):
    """W8"""
    Path("a.json").write_text(f'["{photos[0]}",\n"{photos[1]}"]')
    for name in (photos[0], "a.json", "http://localhost/x.XLSX?a=b"):
        with pytest.raises(UsageError, match=r"is no list by its suffix\. A list is a text with a"):
            list_inputs([], [name])
    Path("a.ndjson").write_text(f'{{"path": "{photos[0]}"}}')
    assert ids(list_inputs([], ["a.ndjson"])) == [photos[0]]


def test_a_list_that_is_compressed_is_refused(photos: list[str]):
    """W8"""
    for name in ("a.txt.gz", "a.csv"):
        Path(name).write_bytes(gzip.compress(b"path\n" + photos[0].encode()))
        with pytest.raises(UsageError, match=rf"The list {name} is compressed\. Decompress it"):
            list_inputs([], [name])


def test_a_row_of_a_table_without_a_path_is_an_error_row(photos: list[str]):
    """Rows V7 and V11 of the cases: of a list, as of the images in a table."""
    there, data = photos[0], Path(photos[0]).read_bytes()
    Path("a.csv").write_text(f"path,label\n{there},1\n,2\n")
    Path("b.jsonl").write_text(f'{{"path": "{there}"}}\n{{"path": null}}\n{{"label": 3}}\n')
    pq.write_table(pa.table({"path": [None, there, ""]}), "c.parquet")
    for name, empty in (("a.csv", "2"), ("b.jsonl", "23"), ("c.parquet", "13")):
        rows = {f"{name}/{number}": "missing" for number in empty}
        assert outcome(list_inputs([], [name])) == rows | {there: data}


def test_a_pattern_takes_the_files_that_it_matches(photos: list[str]):
    check_rows(run("photos/**/*.jpg"), [path for path in photos if path.endswith("jpg")])
    assert ids(list_inputs(["photos/*.txt"])) == ["photos/notes.txt"]
    Path("photos/[1].jpg").touch()  # a name that is there is no pattern
    assert ids(list_inputs(["photos/[1].jpg"])) == ["photos/[1].jpg"]
    for pattern in ("photos/*.gone", "nowhere/*.jpg"):
        with pytest.raises(UsageError, match=r"Nothing matches .*quote a pattern"):
            list_inputs([pattern])


TREE = ("a.jpg", "b/a.jpg", "b/c/a.jpg", "b/c/d.png", "b/e.jpg", "b]/x.jpg", "c/1.jpg", "c/-.jpg")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tree")
    for name in TREE:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).touch()
    return folder


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(parts=st.lists(st.sampled_from(("a", "**", "*", "?", "[a-c]", "[!a]", "[]]", ".jpg", "/"))))
def test_patterns_match_what_pythons_glob_does(tree: Path, parts: list[str]):
    pattern = "".join(parts)
    words = pattern.split("/")
    if "" in words or any("**" in word and word != "**" for word in words):
        return  # what glob leaves undefined
    expected = set(glob.glob(pattern, root_dir=tree, recursive=True)) & set(TREE)
    matched = compile_pattern(pattern.encode())
    assert {name for name in TREE if matched.fullmatch(name.encode())} == expected


def test_a_url_names_a_file_a_folder_a_pattern_or_an_archive(photos: list[str]):
    here = "file://" + os.getcwd()
    content = {path: Path(path).read_bytes() for path in photos}
    below = {path.removeprefix("photos/"): data for path, data in content.items()}
    listing = list_inputs([f"{here}/photos"])
    assert outcome(listing) == below
    assert ids(listing) == sorted(below, key=str.encode)
    assert listing.ignored == 1
    assert outcome(list_inputs([f"{here}/{photos[0]}"])) == {
        f"{here}/{photos[0]}": content[photos[0]]
    }
    matched = {f"{here}/{p}": d for p, d in content.items() if p.endswith(".jpg")}
    assert outcome(list_inputs([f"{here}/photos/**/*.jpg"])) == matched
    with zipfile.ZipFile("x.zip", "w") as archive:
        for path in photos:
            archive.write(path)
    assert outcome(list_inputs([f"zip://photos::{here}/x.zip"])) == below
    zipped = {f"zip://{p}::{here}/x.zip": d for p, d in content.items() if "more" in p}
    assert outcome(list_inputs([f"zip://photos/more/*::{here}/x.zip"])) == zipped
    subprocess.run(["tar", "cf", "x.tar", "--format=gnu", *photos], check=True)
    keys = {os.path.splitext(path)[0]: data for path, data in content.items()}
    assert outcome(list_inputs([f"{here}/x.tar"])) == keys
    table = pa.table({"image": [content[path] for path in photos]})
    pq.write_table(table, "x.parquet")
    numbered = {str(number): content[path] for number, path in enumerate(photos)}
    assert outcome(list_inputs([f"{here}/x.parquet"])) == numbered
    Path("a.txt").write_text(f"{here}/{photos[0]}\n")
    rows = run("--list", f"{here}/a.txt")
    assert [(name, row["status"]) for name, row in rows.items()] == [(f"{here}/{photos[0]}", "ok")]


def test_a_url_that_cannot_be_read_is_a_row_with_a_code(photos: list[str]):
    here = "file://" + os.getcwd()
    urls = {f"{here}/gone.jpg": "missing", "ftp://127.0.0.1:1/x.jpg": "unreadable"}
    urls |= {f"{here}/photos": "not_a_file", f"zip://x.jpg::{here}/gone.zip": "missing"}
    urls |= {f"zip://x.jpg::{here}/photos/notes.txt": "unreadable"}
    Path("a.txt").write_text("\n".join(urls))
    assert outcome(list_inputs([], ["a.txt"])) == urls
    for url in (f"{here}/gone.tar", f"{here}/gone.parquet"):
        with pytest.raises(UsageError, match=f'"{url}" is not there'):
            list_inputs([url])


def test_an_unknown_protocol_is_wrong_use_and_a_missing_package_is_named(
    photos: list[str], monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(UsageError, match=r"warp://x\.jpg is not read: warp:// is not an allowed"):
        list_inputs(["warp://x.jpg"])
    monkeypatch.delitem(registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as if it were not installed
    done = CliRunner().invoke(embed, ["s3://bucket/x.jpg", "--out", "out"])
    assert done.exit_code == 1
    assert "s3://bucket/x.jpg cannot be read: pip install 'packvit[s3]'" in done.stderr
    assert "Traceback" not in done.stderr
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    Path("a.txt").write_text("zip://x.jpg::file:///gone.zip\nzip://x.jpg::gs://bucket/x.zip\n")
    for path, lists in (
        ("gs://bucket/photos", []),
        ("zip://*.jpg::gs://b/x.zip", []),
        ("", ["a.txt"]),
    ):
        with pytest.raises(
            ImportError, match=r"gs://.* cannot be read: pip install 'packvit\[gs\]'$"
        ):
            list_inputs([path] if path else [], lists)


def test_what_is_no_archive_in_a_chain_is_no_unknown_protocol(
    photos: list[str], monkeypatch: pytest.MonkeyPatch
):
    def refuse(*args: object, **options: object) -> None:
        raise ValueError("no archive")  # as over gs://, where a range of it cannot be read

    monkeypatch.setattr("fsspec.core.url_to_fs", refuse)
    with pytest.raises(UsageError, match=r"cannot be read \(ValueError\)"):
        list_inputs(["zip://more::file:///notes.txt"])


def test_a_table_of_tabs_is_a_list(photos: list[str]):
    """W8"""
    Path("a.tsv").write_text("n\tpath\n" + "".join(f"1\t{name}\n" for name in photos))
    assert ids(list_inputs([], ["a.tsv"])) == sorted(photos)


@pytest.mark.parametrize(
    "argv",
    [
        ["-"],
        pytest.param(["/dev/stdin"], marks=pytest.mark.soak),
        pytest.param(["--list", "-"], marks=pytest.mark.soak),
        ["--list", "/dev/stdin"],
    ],
)
def test_a_list_is_read_from_stdin(photos: list[str], argv: list[str]):
    """W8"""
    command = [sys.executable, "-m", "packvit", "embed", *argv, "--out", "out", "--device", "cpu"]
    subprocess.run(command, input="\n".join(photos), text=True, check=True, capture_output=True)
    entries = read_commits(Path("out"))
    assert sum(entry.rows for entry in entries) == len(photos)


def test_a_text_that_is_named_as_a_photograph_is_asked_about(photos: list[str]):
    """W8"""
    Path("list.txt").write_text("\n".join(photos))
    Path("list.csv").write_text(f"n,path\n1,{photos[0]}\n")
    Path("notes").write_text("no path")
    for paths in (["list.txt"], [photos[0], "list.txt"], [photos[0], "list.csv"], ["notes"]):
        with pytest.raises(UsageError, match=rf"Did you mean --list {paths[-1]}, which"):
            list_inputs(paths)
    assert ids(list_inputs([photos[0], "notes"])) == ["notes", photos[0]]
    Path("drawing").write_text("<svg/>")
    assert ids(list_inputs(["drawing"])) == ["drawing"]
