import json
import re
import signal
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from rotten import write_good
from small_checkpoint import write_checkpoint

import packvit
from packvit.checkpoints.layouts import LayoutName
from packvit.cli import main
from packvit.cli.embed import embed
from packvit.cli.verify import verify
from packvit.corpus.folder.layout import read_manifest
from packvit.families import AIMv2Packing
from packvit.verification import certificate, rule
from packvit.verification.references import write_random
from packvit.verification.verify import family_names

NAME = certificate.NAME


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    write_good(tmp_path / "photos", 3)
    return tmp_path / "photos"


@pytest.fixture
def no_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing but equal bits pass in float32, which no two programs reach."""
    monkeypatch.setattr(rule, "RMS_TIMES", 0.0)
    monkeypatch.setattr(rule, "floor_of", lambda dtype, blocks: 0.0)


def invoke(*argv: object) -> Result:
    return CliRunner().invoke(verify, [str(word) for word in argv])


@pytest.mark.soak
def test_every_family_passes_and_the_certificate_says_what_was_compared(tmp_path: Path):
    target = tmp_path / "all.json"
    result = invoke(
        "--family", "all", "--quick", "--device", "cpu", "--certificate", target, "--json"
    )
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert said == json.loads(target.read_text())
    assert said["passed"] is True
    assert said["machine"].keys() >= {"packvit", "torch", "transformers", "gpus", "cores"}
    covered = {(model["family"], model["variant"]) for model in said["models"]}
    for encoder in family_names().values():
        family = encoder.family
        if family.reference.library == "timm" and find_spec("timm") is None:
            continue
        assert covered >= {(family.name, variant.name) for variant in family.reference.variants}
    for model in said["models"]:
        assert len(model["weights"]) == 64
        rows = model["rows"]
        assert {row["what"] for row in rows} >= {"tokens", "taps", "neighbours of NaN", "weights"}
        assert {"alone", "among others", "reordered"} <= {row["pack"] for row in rows}
        assert {(r["dtype"], r["backend"]) for r in rows} >= {
            ("float32", "sdpa"),
            ("bfloat16", "sdpa"),
        }
        # Rounding: two programs were compared, not one with itself.
        assert any(row["worst"] > 0 for row in rows if row["what"] == "tokens")
        for row in rows:
            assert row["worst"] <= row["limit"]
            if row["measure"] in ("rms", "largest"):
                times, floor = {"rms": (1.2, 1), "largest": (2, 20)}[row["measure"]]
                assert row["limit"] >= max(times * row["own"], floor * 2**-24)
        assert model["not_compared"] or "pixels" in {row["what"] for row in rows}


def test_a_folder_gets_its_certificate_and_a_table_is_printed(checkpoint: Path):
    result = invoke("--model", checkpoint, "--quick", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.splitlines()[-1] == f"The certificate is {checkpoint / NAME}."
    lines = result.stdout.splitlines()
    assert lines[0] == f"AIMv2 published ({checkpoint}) beside Aimv2VisionModel"
    assert lines[1] == "  float32 sdpa"
    assert lines[2].split()[:3] == ["tokens", "36", "x"]
    assert re.search(r"limit \d\.\de-0\d \(the reference's own error is \d", lines[2])
    assert lines[-1].startswith("Passed: all ")
    assert lines[-1].endswith("comparisons of 1 encoder are within their limits.")
    (model,) = json.loads((checkpoint / NAME).read_text())["models"]
    assert (model["model"], model["variant"]) == (str(checkpoint), "published")


def test_the_embedded_model_is_verified_and_nothing_is_written_beside_it():
    result = invoke("--model", "tiny", "--quick", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    assert "certificate" not in result.stderr
    assert "not compared: pixels: the checkpoint has no preprocessor_config.json" in result.stdout


def test_a_miss_is_named_and_the_exit_code_is_1(checkpoint: Path, no_tolerance: None):
    result = invoke("--model", checkpoint, "--quick", "--device", "cpu")
    assert result.exit_code == 1
    assert "  MISSED tokens off by" in result.stdout
    assert "beyond their limit" in result.stdout.splitlines()[-1]
    assert json.loads((checkpoint / NAME).read_text())["passed"] is False


def test_a_mistake_is_answered_in_a_sentence_and_exit_code_2():
    for argv, answer in (
        ((), "Give one of --model, --family and --published"),
        (("--model", "tiny", "--family", "all"), "Give one of --model, --family and --published"),
        (("--family", "vgg"), 'No family is called "vgg". Choose all or one of: aimv2, siglip2,'),
        (("--family", "clip", "--revision", "main"), "--revision needs --model"),
        (("--model", "tiny", "--device", "toaster"), 'device "toaster" cannot be used'),
    ):
        result = invoke(*argv)
        assert (result.exit_code, result.stdout) == (2, "")
        assert answer in result.stderr


def test_a_bad_checkpoint_is_a_failure_in_a_sentence(checkpoint: Path, tmp_path: Path):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for model, answer in ((checkpoint, "not a whole safetensors"), (tmp_path / "x", "no folder")):
        result = invoke("--model", model, "--device", "cpu")
        assert result.exit_code == 1
        assert answer in result.stderr
        assert isinstance(result.exception, SystemExit)


def test_a_certificate_that_cannot_be_written_is_a_failure_in_a_sentence(
    checkpoint: Path, tmp_path: Path
):
    target = tmp_path / "none" / "c.json"
    result = invoke("--model", checkpoint, "--quick", "--device", "cpu", "--certificate", target)
    assert result.exit_code == 1
    assert f"{target} could not be written: No such file or directory." in result.stderr


def test_help_names_every_family_and_does_not_wait_for_torch():
    code = (
        "import sys; from packvit.cli import main; main(['verify', '--help'], "
        "standalone_mode=False); sys.exit(len({'torch', 'transformers'} & {*sys.modules}))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    words = ran.stdout.replace(",", " ").split()
    assert {*family_names(), "all"} <= {*words} | {word.rstrip(".") for word in words}


def run_embed(photos: Path, checkpoint: Path, out: Path) -> Result:
    argv = [photos, "--model", checkpoint, "--out", out, "--device", "cpu", "--verify"]
    return CliRunner().invoke(embed, [str(word) for word in argv])


def test_embed_verifies_first_and_puts_the_certificate_with_the_features(
    tmp_path: Path, photos: Path, checkpoint: Path
):
    result = run_embed(photos, checkpoint, tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    said = json.loads((tmp_path / "out" / "_certificate.json").read_text())
    manifest = read_manifest(tmp_path / "out") or {}
    assert said["passed"] is True
    assert [model["weights"] for model in said["models"]] == [manifest["weights_sha256"]]
    assert not (checkpoint / NAME).exists()


def test_embed_takes_over_the_certificate_beside_the_checkpoint(
    tmp_path: Path, photos: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    assert invoke("--model", checkpoint, "--quick", "--device", "cpu").exit_code == 0
    monkeypatch.setattr(rule, "RMS_TIMES", 0.0)  # verifying anew would fail
    monkeypatch.setattr(rule, "floor_of", lambda dtype, blocks: 0.0)
    result = run_embed(photos, checkpoint, tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    said = (tmp_path / "out" / "_certificate.json").read_text()
    assert json.loads(said) == json.loads((checkpoint / NAME).read_text())

    write_checkpoint(checkpoint, scale=2.0)  # other weights beside the same certificate
    result = run_embed(photos, checkpoint, tmp_path / "again")
    assert result.exit_code == 1
    assert not (tmp_path / "again").exists()


def test_embed_stops_at_a_miss_before_anything_is_written(
    tmp_path: Path, photos: Path, checkpoint: Path, no_tolerance: None
):
    result = run_embed(photos, checkpoint, tmp_path / "out")
    assert result.exit_code == 1
    assert f"{checkpoint} is not verified:" in result.stderr
    assert "the first being tokens off by" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("number", "code"),
    [pytest.param(signal.SIGINT, 130, marks=pytest.mark.soak), (signal.SIGTERM, 143)],
)
def test_it_can_be_stopped(number: signal.Signals, code: int):
    with subprocess.Popen(
        [sys.executable, "-m", "packvit", "verify", "--family", "all", "--quick"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    ) as job:
        assert job.stdout
        job.stdout.readline()  # the first encoder's table: it is at work
        job.send_signal(number)
        _, said = job.communicate(timeout=60)
    assert job.returncode == code
    assert said.splitlines()[-1] == "Stopped. Run the same command again to start over."
    assert "Traceback" not in said


@pytest.mark.parametrize("layout", ["original", "transformers"])
def test_lit_without_its_text_tower_is_verified_but_for_the_projection(
    tmp_path: Path, layout: LayoutName
):
    family = AIMv2Packing.family
    [lit] = [variant for variant in family.reference.variants if variant.name == "LiT"]
    write_random(lit, family, tmp_path / "lit", 0)
    packvit.load(tmp_path / "lit").save_pretrained(tmp_path / "alone", layout=layout)
    shown = CliRunner().invoke(main, ["verify", "--quick", "--model", str(tmp_path / "alone")])
    assert shown.exit_code == 0, shown.output
    assert "not compared: the projection to" in shown.stdout


def test_a_certificate_that_nobody_asked_for_and_cannot_be_written_changes_no_verdict(
    checkpoint: Path,
):
    (checkpoint / NAME).mkdir()
    shown = CliRunner().invoke(main, ["verify", "--quick", "--model", str(checkpoint)])
    assert shown.exit_code == 0
    assert "Passed: all" in shown.stdout
    assert "could not be written" in shown.stderr
