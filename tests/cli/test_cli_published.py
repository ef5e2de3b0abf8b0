"""`packvit verify --published`: published checkpoints, here of a hub in this process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from hub_server import Hub, Repository

from packvit.cli.verify import verify
from packvit.families import FAMILIES
from packvit.verification import published, rule
from packvit.verification.references import write_random
from packvit.verification.verify import family_names

ROOT = Path(__file__).parents[2]
COMMIT = "c" * 40
NAME, CLOSED, ABSENT = "apple/aimv2-large-patch14-224", "apple/closed", "apple/absent"


def write(folder: Path) -> Path:
    family = family_names()["aimv2"].family
    [fixed] = [variant for variant in family.reference.variants if variant.name == "fixed"]
    write_random(fixed, family, folder, seed=0)
    return folder


def repository(folder: Path) -> Repository:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return Repository({COMMIT: files}, {"main": COMMIT})


def walk(hub: Hub, home: Path, *argv: object) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own: the hub's client reads its settings once."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    ours = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "packvit", "verify", "--device", "cpu", "--quick"]
    return subprocess.run(
        [*command, *map(str, argv)],
        env=kept | ours | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_name_has_a_certificate_or_a_reason_and_the_walk_goes_on(tmp_path: Path):
    folder = tmp_path / "certificates"
    with Hub() as hub:
        hub.repositories[NAME] = repository(write(tmp_path / "model"))
        hub.repositories[CLOSED] = Repository({}, {}, gated=True)
        said = walk(hub, tmp_path / "home", "--published", folder, NAME, CLOSED, ABSENT)
        assert said.returncode == 3, said.stderr
        lines = {line.split()[0]: line for line in said.stdout.splitlines()}
        assert f"beside Aimv2VisionModel ({COMMIT[:12]})" in lines[NAME]
        assert " passed " in lines[NAME]
        assert " 0 missed" in lines[NAME]
        assert all(" not read " in lines[name] for name in (CLOSED, ABSENT))
        assert [path.name for path in folder.iterdir()] == ["apple--aimv2-large-patch14-224.json"]
        made = json.loads((folder / "apple--aimv2-large-patch14-224.json").read_text())
        assert made["passed"] is True
        assert made["models"][0]["revision"] == COMMIT

        hub.requests.clear()
        again = walk(hub, tmp_path / "home", "--published", folder, NAME, "--json")
        assert again.returncode == 0, again.stderr
        [one] = json.loads(again.stdout)
        assert (one["name"], one["state"], one["revision"]) == (NAME, "kept", COMMIT)
        assert hub.requests == []


def test_one_that_misses_is_said_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, folder = write(tmp_path / "model"), tmp_path / "certificates"
    argv = ["--published", str(folder), str(model), "--device", "cpu", "--quick"]
    with monkeypatch.context() as patch:
        patch.setattr(rule, "RMS_TIMES", 0.0)
        patch.setattr(rule, "floor_of", lambda dtype, blocks: 0.0)
        result = CliRunner().invoke(verify, argv)
    assert result.exit_code == 1
    assert " missed " in result.stdout
    [path] = folder.iterdir()
    assert json.loads(path.read_text())["passed"] is False
    result = CliRunner().invoke(verify, argv)
    assert result.exit_code == 0, result.stdout
    assert json.loads(path.read_text())["passed"] is True


def test_without_names_it_is_every_checkpoint_of_the_docs():
    listed = (ROOT / "docs" / "checkpoints.md").read_text()
    names = published.published_names()
    assert len(names) == len(set(names)) == sum(len(e.family.checkpoints) for e in FAMILIES)
    assert all(f"`{name}`" in listed for name in names)
    assert len({published.file_of(name, Path()) for name in names}) == len(names)


@pytest.mark.parametrize("version", ["packvit", "torch", "transformers"])
def test_a_certificate_of_other_versions_is_made_anew(tmp_path: Path, version: str):
    here = {name: published.machine()[name] for name in published.SAME}
    made = {
        "format": published.certificate.FORMAT,
        "passed": True,
        "machine": here,
        "models": [{"second": None}],
    }
    path, options = tmp_path / "c.json", published.VerifyOptions()
    path.write_text(json.dumps(made))
    assert published.good_certificate(path, options) == made
    assert published.good_certificate(path, published.VerifyOptions(timm=True)) is None
    path.write_text(json.dumps(made | {"machine": here | {version: "0"}}))
    assert published.good_certificate(path, options) is None
    path.write_text("{")
    assert published.good_certificate(path, options) is None
