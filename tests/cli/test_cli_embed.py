import hashlib
import json
import logging
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from features import contents
from full_disk import small_disk
from rotten import DIRECTORY, write_good, write_rotten

from packvit.cli.command import printable
from packvit.cli.embed import embed
from packvit.cli.progress import Meter, duration, plain_lines
from packvit.corpus.folder.layout import claim, read_commits, read_manifest
from packvit.corpus.progress import Progress, Shares

pytestmark = pytest.mark.usefixtures("swift")

COMMAND = [sys.executable, "-m", "packvit", "embed"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_good(folder, 12)
    return folder


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,500 inputs, enough to be interrupted."""
    folder = tmp_path_factory.mktemp("many")
    (first,) = write_good(folder, 1)
    for number in range(1499):
        os.link(folder / first, folder / f"{number:04}.jpg")
    return folder


def invoke(*argv: object) -> Result:
    return CliRunner().invoke(embed, [str(word) for word in argv])


def test_a_folder_of_which_half_is_broken_gives_a_row_for_each_and_exit_code_3(
    tmp_path: Path, checkpoint: Path
):
    photos = tmp_path / "photos"
    codes = write_rotten(photos)
    codes |= dict.fromkeys(write_good(photos, 50), "ok")
    kept = [name for name, code in codes.items() if code != "ok"][:50]
    kept += [name for name, code in codes.items() if code == "ok"][:50]
    for name in codes.keys() - set(kept):
        if name == DIRECTORY:
            (photos / name).rmdir()
        else:
            (photos / name).unlink()
    argv = [str(photos), "--model", str(checkpoint), "--out", str(tmp_path / "out")]
    ran = subprocess.run(COMMAND + argv, capture_output=True, text=True, check=False)
    assert ran.returncode == 3
    assert "Traceback" not in ran.stdout + ran.stderr
    rows = pq.read_table(tmp_path / "out").to_pylist()
    assert len(rows) == 100
    found = {row["id"]: row["status"] for row in rows}
    assert found == {os.fsencode(n).decode(errors="backslashreplace"): codes[n] for n in kept}
    lines = [line.split() for line in ran.stdout.splitlines()]
    assert [lines[0], lines[1], lines[2]] == [["inputs", "100"], ["ok", "50"], ["errors", "50"]]
    cut = list(found.values()).count("truncated")
    assert any(line[:2] == ["truncated", f"{cut},"] for line in lines)


def test_results_go_to_stdout_as_one_object_where_a_script_reads(
    tmp_path: Path, photos: Path, checkpoint: Path
):
    (photos / "notes.txt").touch()
    result = invoke(photos, "--model", checkpoint, "--out", tmp_path / "out", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    summary = json.loads(result.stdout)
    assert summary["rows"] == summary["ok"] == 12
    assert (summary["errors"], summary["ignored"]) == ({}, 1)
    assert summary["folder"] == str(tmp_path / "out")
    assert summary["fingerprint"] == (read_manifest(tmp_path / "out") or {})["fingerprint"]
    assert summary["images_per_second"] == pytest.approx(12 / summary["seconds"])


def test_errors_are_told_by_code_with_an_example(tmp_path: Path, checkpoint: Path):
    missing = tmp_path / "gone\x1b[31m.jpg"
    missing.symlink_to("nowhere")
    result = invoke(missing, "--model", checkpoint, "--out", tmp_path / "out", "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["errors"] == {"missing": {"rows": 1, "example": str(missing)}}
    result = invoke(missing, "--model", checkpoint, "--out", tmp_path / "again")
    assert "missing  1, for example" in result.stdout
    assert r"gone\x1b[31m.jpg" in result.stdout
    assert printable("\x1b[31m é") == r"\x1b[31m é"


def test_every_option_reaches_the_job(tmp_path: Path, photos: Path, checkpoint: Path):
    argv = ["--device", "cpu", "--dtype", "bfloat16", "--attention", "sdpa", "--max-patches", "20"]
    argv += ["--resize", "native", "--positions", "interpolate", "--max-pixels", "3300"]
    argv += ["--tokens", "--tap", "-1", "--tap", "0", "--dtype-out", "float32", "--workers", "1"]
    argv += ["--token-budget", "50"]
    result = invoke(photos, "--model", checkpoint, "--out", tmp_path / "out", *argv)
    manifest = read_manifest(tmp_path / "out")
    assert manifest
    assert result.exit_code == 3
    assert manifest["counts"]["errors"].keys() == {"too_many_pixels"}
    expected = {"device": "cpu", "dtype": "bfloat16", "attention": "sdpa", "token_budget": 50}
    expected |= {"positions": "interpolate", "lists": ["tokens", "tap_0", "tap_2"]}
    expected |= {"dtype_out": "float32"}
    assert {name: manifest[name] for name in expected} == expected
    assert manifest["preprocessing"]["resize"] == "native"
    assert manifest["preprocessing"]["max_patches"] == 20
    assert manifest["preprocessing"]["max_pixels"] == 3300


def test_without_a_model_one_line_says_which_one_runs_and_how_to_choose(tmp_path: Path):
    for number in range(1001):
        (tmp_path / f"{number}.jpg").touch()
    result = invoke(tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 2
    (error,) = result.stderr.splitlines()  # W9: no notice before it
    assert error.startswith(
        "Error: 1001 inputs were found, but without a chosen model at most 1000"
    )
    assert error.endswith("for example --model apple/aimv2-large-patch14-native.")
    assert not (tmp_path / "out").exists()


def test_the_embedded_model_tries_the_job_out(tmp_path: Path, photos: Path):
    result = invoke(photos, "--out", tmp_path / "out", "--device", "cpu")
    assert result.exit_code == 0
    assert result.stderr.startswith('No --model was given, so the small "tiny" model runs: 6.6')
    assert (read_manifest(tmp_path / "out") or {})["model"] == "tiny"


def test_a_mistake_is_answered_in_a_sentence_and_exit_code_2(
    tmp_path: Path, photos: Path, checkpoint: Path
):
    out, model = ("--out", tmp_path / "out"), ("--model", checkpoint)
    for argv, answer in (
        ((*out, *model), "Missing argument 'PHOTOS...'"),
        ((photos, *model), "Missing option '--out'"),
        ((photos, *out, *model, "--token-budget", "0"), "0 is not in the range x>=1"),
        ((photos, *out, *model, "--token-budget", "5"), "Raise --token-budget, or lower --max-pa"),
        ((photos, *out, *model, "--tap", "9"), "--tap asks for layer 9, but this encoder has 3"),
        ((photos, *out, *model, "--device", "toaster"), 'device "toaster" cannot be used'),
        ((photos, *out, *model, "--device", "cpu", "--attention", "fa2"), '"fa2" cannot run'),
        (
            (photos, *out, *model, "--device", "cpu", "--decode", "gpu"),
            "Use --device cuda, or --decode pil.",
        ),
        ((photos, *out, *model, "--decode", "cpu"), "'cpu' is not one of 'pil', 'fast', 'gpu'"),
        ((photos, photos, *out, *model), "Name each path once"),
        ((checkpoint, *out, *model), "No photographs were found"),
        ((tmp_path / "foto", *out, *model), f'"{tmp_path}/foto" is not there. Check the spelling'),
        ((tmp_path / "no.jpg", *out), f'"{tmp_path}/no.jpg" is not there. Check the spelling'),
        ((photos, "--out", photos, *model), "is not empty: it holds good-0000.jpg and"),
    ):
        result = invoke(*argv)
        assert (result.exit_code, result.stdout) == (2, ""), argv
        assert answer in result.stderr.splitlines()[0]
    assert not (tmp_path / "out").exists()


def test_what_libraries_log_of_a_refusal_is_no_traceback_on_the_terminal(tmp_path: Path):
    invoke(tmp_path / "gone", "--out", tmp_path / "out")
    for name in ("asyncio", "gcsfs"):  # where nobody handles it, Python writes it to stderr
        assert logging.getLogger(name).handlers


def test_another_jobs_folder_and_a_locked_one_are_refused(
    tmp_path: Path, photos: Path, checkpoint: Path
):
    argv = (photos, "--model", checkpoint, "--out", tmp_path / "out")
    with claim(tmp_path / "out"):
        result = invoke(*argv)
    assert result.exit_code == 2
    assert "Another job is writing to" in result.stderr
    assert invoke(*argv).exit_code == 0
    before = contents(tmp_path / "out")
    result = invoke(*argv, "--max-patches", "9", "--tokens")
    assert result.exit_code == 2
    assert "holds the features of another job. What differs, its -> yours:" in result.stderr
    told = [line.strip() for line in result.stderr.splitlines() if " -> " in line][1:]
    assert told == [
        "preprocessing.max_patches: 1024 -> 9",
        'lists: [] -> ["tokens"]',
    ]
    assert before == contents(tmp_path / "out")
    result = invoke(*argv, "--max-patches", "9", "--tokens", "--overwrite")
    assert result.exit_code == 0
    assert (read_manifest(tmp_path / "out") or {})["lists"] == ["tokens"]


def test_a_bad_checkpoint_is_a_failure_in_a_sentence(
    tmp_path: Path, photos: Path, checkpoint: Path
):
    bad = shutil.copytree(checkpoint, tmp_path / "bad")
    weights = bad / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for model, answer in ((bad, "not a whole safetensors"), (tmp_path / "none", "is no folder")):
        result = invoke(photos, "--model", model, "--out", tmp_path / "out")
        assert result.exit_code == 1
        assert answer in result.stderr
        assert isinstance(result.exception, SystemExit)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    with small_disk(disk, "256k"):
        yield disk


def check_whole(out: Path) -> int:
    """Assert that nothing lies in `out` but what the log vouches for; return its rows."""
    entries = read_commits(out)
    for entry in entries:
        data = (out / entry.part).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry.sha256
        assert pq.read_table(out / entry.part).num_rows == entry.rows
    names = {".lock", "_manifest.json", *(entry.part for entry in entries)}
    names |= {"_inputs.jsonl.gz"}  # of an unfinished job
    assert set(contents(out)) == names | ({"_commits.jsonl"} if entries else set())
    manifest = read_manifest(out)
    assert manifest
    assert manifest["complete"] is False
    return sum(entry.rows for entry in entries)


def test_a_full_disk_is_a_failure_in_a_sentence_and_what_was_committed_stays(
    full_disk: Path, many: Path, checkpoint: Path
):
    result = invoke(many, "--model", checkpoint, "--out", full_disk / "out", "--tokens")
    assert result.exit_code == 1
    *_, line = result.stderr.splitlines()  # before it: that the disk is too small for the job
    assert "could not be written: No space left on device. Fix that, then start the job" in line
    assert 0 < check_whole(full_disk / "out") < 1500


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, many: Path, checkpoint: Path
) -> dict[str, bytes]:
    """What `many` with tokens comes to, in a process of its own as the jobs that are stopped."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    argv = [str(many), "--model", str(checkpoint), "--out", str(out), "--tokens"]
    subprocess.run(COMMAND + argv, capture_output=True, check=True)
    return contents(out)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.soak)],
)
def test_a_stopped_job_says_what_is_written_and_the_same_command_goes_on(
    tmp_path: Path,
    many: Path,
    checkpoint: Path,
    undisturbed: dict[str, bytes],
    number: signal.Signals,
    code: int,
):
    out = tmp_path / "out"
    argv = [str(many), "--model", str(checkpoint), "--out", str(out), "--tokens"]
    with subprocess.Popen(
        COMMAND + argv,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # These tests may themselves run in a shell's background, which ignores SIGINT for them.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    ) as job:
        deadline = time.monotonic() + 60
        while len(read_commits(out)) < 2 and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        job.send_signal(number)
        stdout, stderr = job.communicate(timeout=60)
    assert (job.returncode, stdout) == (code, "")
    rows = check_whole(out)
    assert 128 <= rows < 1500
    assert stderr.splitlines()[-1].startswith(f"Stopped: {rows:,} of 1,500 rows are written to ")
    assert stderr.endswith(". The same command resumes from there.\n")
    assert "Traceback" not in stderr
    ran = subprocess.run(COMMAND + argv, capture_output=True, text=True, check=True)
    assert f"{rows:,} of 1,500 rows are written already and are kept." in ran.stderr
    assert f"{rows:,}, written before" in ran.stdout
    assert contents(out) == undisturbed


def test_a_finished_job_exits_as_it_did_when_it_is_asked_for_again(
    tmp_path: Path, checkpoint: Path
):
    (tmp_path / "bad.jpg").touch()
    argv = (tmp_path / "bad.jpg", "--model", checkpoint, "--out", tmp_path / "out")
    first, again = invoke(*argv), invoke(*argv, "--json")
    (tmp_path / "bad.jpg").unlink()  # what was there when the job began is a row of it
    gone = invoke(*argv, "--json")
    assert (first.exit_code, again.exit_code, gone.exit_code) == (3, 3, 3)
    for result in (again, gone):
        summary = json.loads(result.stdout)
        assert (summary["kept"], summary["errors"]["unidentified"]["rows"]) == (1, 1)
    assert invoke(*argv, "--overwrite").exit_code == 2
    assert read_commits(tmp_path / "out")


def test_what_is_embedded_again_is_said_on_stderr(tmp_path: Path, photos: Path, checkpoint: Path):
    argv = (photos, "--model", checkpoint, "--out", tmp_path / "out")
    assert invoke(*argv).exit_code == 0
    (tmp_path / "out" / "data/part-00000.parquet").unlink()
    result = invoke(*argv)
    assert result.exit_code == 0
    assert result.stderr == "data/part-00000.parquet is missing; it is embedded again.\n"


def test_a_job_stopped_before_it_began_says_so(tmp_path: Path, photos: Path):
    os.mkfifo(tmp_path / "config.json")  # a checkpoint that is refused, but not at once
    code = (
        "import os, signal, sys, threading; from packvit.cli import main\n"
        "def stop():\n"
        "    while 'torch' not in sys.modules: pass\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "threading.Thread(target=stop, daemon=True).start()\n"
        "main()"
    )
    argv = ["embed", str(photos), "--model", str(tmp_path), "--out", str(tmp_path / "out")]
    ran = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 143
    assert ran.stderr == "Stopped before anything was written. Run the same command again.\n"


def test_a_terminal_sees_a_bar_with_rates_and_errors(
    tmp_path: Path, photos: Path, checkpoint: Path
):
    master, slave = pty.openpty()
    argv = [str(photos), "--model", str(checkpoint), "--out", str(tmp_path / "out")]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "160"}
    with subprocess.Popen(COMMAND + argv, stdout=subprocess.DEVNULL, stderr=slave, env=environment):
        os.close(slave)
        shown = b""
        while True:
            try:
                shown += os.read(master, 65536)
            except OSError:  # the other end is closed
                break
    os.close(master)
    text = shown.decode()
    assert "12/12" in text
    for part in ("images/s", "tokens/s", "0 errors", "left"):
        assert part in text


def test_elsewhere_progress_is_plain_lines(capsys: pytest.CaptureFixture[str]):
    meter = Meter()
    meter.draw = plain_lines(meter, pause=0.0)
    meter.tell(Progress(4000))
    meter.start -= 100
    shares = Shares(decoding=0.5, encoding=0.98, fill=0.97)
    meter.tell(Progress(4000, settled=1000, errors=1, tokens=200_000, shares=shares))
    meter.tell(Progress(4000, settled=2000, errors=1000))  # without a pack, as for `packvit pca`
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == "0 of 4,000 images, 0 errors"
    assert third.endswith(", 20.0 images/s, 0 tokens/s, 1,000 errors, 2 min left")
    assert second == (
        "1,000 of 4,000 images, 10.0 images/s, 2,000 tokens/s, 1 error, "
        "decoding 50%, encoding 98%, packs 97% full, 5 min left"
    )
    assert [duration(s) for s in (0.04, 9.96, 89.0, 90.0, 12345.0)] == [
        "0.0 s",
        "10 s",
        "89 s",
        "2 min",
        "3 h 26 min",
    ]


def test_help_shows_examples_and_waits_for_nothing_that_is_slow_to_import():
    result = invoke("--help")
    assert "packvit embed photos --out features --model apple/aimv2" in result.stdout
    code = (
        "import sys, packvit.cli.embed; sys.exit('torch' in sys.modules or 'rich' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
