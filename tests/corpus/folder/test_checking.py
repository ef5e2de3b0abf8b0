import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from rotten import write_good
from small_checkpoint import write_checkpoint

import packvit
from packvit.cli.check import check
from packvit.corpus import UsageError
from packvit.corpus.folder.checking import Check, check_folder
from packvit.corpus.folder.layout import (
    commit,
    encode_certificate,
    read_commits,
    read_manifest,
    write_commits,
    write_manifest,
)
from packvit.corpus.job import embed
from packvit.encoder import Encoder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished job of 70 inputs, one an error, in two parts, with matrix and certificate."""
    folder = tmp_path_factory.mktemp("finished")
    (first, *_) = write_good(folder / "photos", 9)
    for number in range(60):
        os.link(folder / "photos" / first, folder / "photos" / f"{number:03}.jpg")
    (folder / "photos" / "bad.jpg").touch()
    encoder = packvit.load(write_checkpoint(folder / "checkpoint"), device="cpu")
    photos, out = folder / "photos", folder / "out"
    embed(photos, out=out, model=encoder, tokens=True, max_patches=9, format="npy")
    certificate = encode_certificate({"verdict": "equal", "rows": [1, 2, 3]})
    (folder / "out" / "_certificate.json").write_bytes(certificate)
    manifest = read_manifest(folder / "out")
    assert manifest
    manifest["certificate_sha256"] = hashlib.sha256(certificate).hexdigest()
    write_manifest(folder / "out", manifest)
    return folder / "out"


@pytest.fixture
def out(tmp_path: Path, finished: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "out")


def told(found: Check) -> list[str]:
    return [f"{fault.file} {fault.found}" for fault in found.faults]


def invoke(*argv: object) -> Result:
    return CliRunner().invoke(check, [str(word) for word in argv])


def test_a_finished_folder_is_whole_and_counted(out: Path):
    found = check_folder(out)
    counts = (read_manifest(out) or {})["counts"]
    assert found.faults == []
    assert (found.parts, found.rows, found.errors) == (2, 70, {"unidentified": 1})
    assert found.tokens == counts["tokens"] > 0
    result = invoke(out)
    assert result.exit_code == 0
    assert "2 whole parts with 70 rows, 1 of them errors" in result.stdout
    assert result.stdout.endswith("tokens; all is well\n")


def test_each_of_200_flipped_bits_in_any_file_is_found(out: Path):
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.stat().st_size)
    assert [str(path.relative_to(out)) for path in files] == [
        "_certificate.json",
        "_commits.jsonl",
        "_exports/ids.jsonl",
        "_exports/pooled.npy",
        "_manifest.json",
        "data/part-00000.parquet",
        "data/part-00001.parquet",
    ]
    draw, found = random.Random(0), 0
    for trial in range(200):
        path = files[trial % len(files)]  # small files as often as large ones
        whole = path.read_bytes()
        data = bytearray(whole)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        faults = check_folder(out).faults
        found += bool(faults)
        assert all(fault.mend for fault in faults)
        path.write_bytes(whole)
    assert found == 200
    assert check_folder(out).faults == []


def remove_line(out: Path) -> None:
    write_commits(out, read_commits(out)[:1])


def swap_lines(out: Path) -> None:
    lines = (out / "_commits.jsonl").read_bytes().splitlines(keepends=True)
    (out / "_commits.jsonl").write_bytes(b"".join(lines[::-1]))


def claim_incomplete(out: Path) -> None:
    write_manifest(out, (read_manifest(out) or {}) | {"complete": False, "counts": None})


def miscount(out: Path) -> None:
    manifest = read_manifest(out) or {}
    write_manifest(out, manifest | {"counts": manifest["counts"] | {"ok": 70}})


def forge(out: Path) -> None:
    manifest = read_manifest(out) or {}
    write_manifest(out, manifest | {"token_budget": 1})


def cut(out: Path) -> None:
    (out / "data/part-00000.parquet").write_bytes(
        (out / "data/part-00000.parquet").read_bytes()[:-5]
    )


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (
            lambda out: (out / "data/part-00001.parquet").unlink(),
            "data/part-00001.parquet is missing.",
        ),
        (cut, "data/part-00000.parquet has "),
        (
            remove_line,
            "_commits.jsonl lists 1 of 2 parts: data/part-00001.parquet is the first that",
        ),
        (
            remove_line,
            "data/part-00001.parquet is not in _commits.jsonl, so readers must not use it.",
        ),
        (swap_lines, "_commits.jsonl line 2 (data/part-00000.parquet) is out of order."),
        (claim_incomplete, "_manifest.json says that the job is not complete."),
        (miscount, "_manifest.json counts "),
        (forge, '_manifest.json is not in format "packvit features 2", or its fingerprint'),
        (lambda out: (out / "_manifest.json").unlink(), "_manifest.json is missing."),
        (
            lambda out: (out / "_manifest.json").write_text("{"),
            "_manifest.json is damaged: it is no",
        ),
        (lambda out: (out / "_certificate.json").unlink(), "_certificate.json is missing."),
        (lambda out: (out / "._commits.jsonl.tmp").touch(), "._commits.jsonl.tmp is a temporary"),
    ],
)
def test_what_is_wrong_is_named(out: Path, damage: Callable[[Path], None], fault: str):
    damage(out)
    assert any(text.startswith(fault) for text in told(check_folder(out)))


def rewrite(out: Path, edit: Callable[[pa.Table], pa.Table]) -> list[str]:
    """Commit an edited first part as if a faulty job had written it so; return what is found."""
    table = edit(pq.read_table(out / "data/part-00000.parquet"))
    write_commits(out, read_commits(out)[1:])
    commit(out, 0, table, mends=True)
    return told(check_folder(out))


def replace(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), table.schema.field(name), column)


def test_rows_that_are_committed_and_wrong_are_found(tmp_path: Path, finished: Path):
    def nan(table: pa.Table) -> pa.Table:
        column = table["pooled"].combine_chunks()
        values = np.array(column.values)
        values[33] = np.nan
        vectors = pa.FixedSizeListArray.from_arrays(
            pa.array(values), type=column.type, mask=column.is_null()
        )
        return replace(table, "pooled", vectors)

    def twice(table: pa.Table) -> pa.Table:
        ids = table["id"].to_pylist()
        return replace(table, "id", pa.array([ids[1], *ids[1:]]))

    def other(table: pa.Table) -> pa.Table:
        ids = table["id"].to_pylist()
        return replace(table, "id", pa.array([ids[1], ids[0], *ids[2:]]))

    def accuse(table: pa.Table) -> pa.Table:
        return replace(table, "status", pa.array(["timeout", *table["status"].to_pylist()[1:]]))

    for place, (edit, fault) in enumerate(
        (
            (nan, "data/part-00000.parquet holds pooled with NaN or infinity in a row that is ok."),
            (twice, "data/part-00000.parquet names an input twice."),
            (other, "_manifest.json lists other inputs than the rows, or in another order."),
            (accuse, "holds pooled where a row is an error, or none where it is ok."),
            (accuse, "holds a row whose stage does not match its status."),
            (lambda t: t.slice(1), "data/part-00000.parquet holds 63 rows, not 64."),
            (lambda t: t.drop_columns(["note"]), "does not have the columns that the manifest"),
        )
    ):
        out = shutil.copytree(finished, tmp_path / str(place))
        found = rewrite(out, edit)
        assert any(fault in text for text in found), (fault, found)


def test_faults_are_printed_with_how_to_mend_them_and_as_json(out: Path):
    (out / "data/part-00000.parquet").unlink()
    result = invoke(out)
    assert result.exit_code == 1
    first, second, *_ = result.stdout.splitlines()
    assert first == "data/part-00000.parquet is missing."
    assert second == "  Run the same embed command again: it keeps the parts that are whole."
    assert result.stdout.endswith("tokens; 1 fault\n")
    result = invoke(out, "--json")
    assert result.exit_code == 1
    page = json.loads(result.stdout)
    assert (page["whole"], page["parts"], page["faults"][0]["file"]) == (
        (False, 1, "data/part-00000.parquet")
    )


def test_what_is_no_feature_folder_is_wrong_use(tmp_path: Path):
    (tmp_path / "manifest.json").write_text('{"manifest_version": 3}')
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UsageError, match="is not a feature folder"):
            check_folder(folder)
        result = invoke(folder)
        assert result.exit_code == 2
        assert "Name the folder that was given to embed as --out." in result.stderr


def test_a_folder_in_the_place_of_a_file_is_said_in_a_sentence(out: Path):
    (out / "_commits.jsonl").unlink()
    (out / "_commits.jsonl").mkdir()
    result = invoke(out)
    assert result.exit_code == 1
    assert f"{out}/_commits.jsonl could not be read: Is a directory." in result.stderr


def test_a_folder_whose_name_is_not_utf_8_goes_on_and_is_checked_like_any(
    tmp_path: Path, encoder: Encoder
):
    write_good(tmp_path / "photos", 3)
    out = Path(os.fsdecode(os.fsencode(tmp_path) + b"/f\xe9"))
    embed(tmp_path / "photos", out=out, model=encoder)
    assert embed(tmp_path / "photos", out=out, model=encoder, format="npy").kept_rows == 3
    assert check_folder(out).faults == []


def test_checking_does_not_load_torch(out: Path):
    code = (
        "import sys; from packvit.cli.check import check\n"
        "check(sys.argv[1:], standalone_mode=False); sys.exit('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, b"")
