import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import reference
import torch
from click.testing import CliRunner, Result
from hub_server import Hub, Repository
from safetensors.torch import load_file, save_file
from small_checkpoint import write_checkpoint

from packvit.cli.convert import convert

WEIGHTS = "model.safetensors"
OLD, NEW = "a" * 40, "b" * 40  # commits


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SigLIP with three tensors of a text tower beside it."""
    folder = tmp_path_factory.mktemp("siglip")
    reference.build("siglip").save_pretrained(folder)
    tensors = {f"vision_model.{n}": t for n, t in load_file(folder / WEIGHTS).items()}
    text = ("text_model.head.weight", "text_model.head.bias", "logit_scale")
    save_file(tensors | {name: torch.ones(1) for name in text}, folder / WEIGHTS)
    return folder


def invoke(*argv: object) -> Result:
    return CliRunner().invoke(convert, [str(word) for word in argv])


def test_one_line_says_what_was_written(tmp_path: Path, checkpoint: Path):
    result = invoke(checkpoint, tmp_path / "out", "--layout", "original")
    assert (result.exit_code, result.stderr) == (0, "")
    expected = reference.to_apple(load_file(checkpoint / WEIGHTS))
    found = load_file(tmp_path / "out" / WEIGHTS)
    assert all(torch.equal(found[name], expected[name]) for name in found.keys() | expected.keys())
    size = (tmp_path / "out" / WEIGHTS).stat().st_size
    out = tmp_path / "out"
    assert result.stdout == f"{len(expected)} tensors, {size:,} bytes, in layout original: {out}\n"


def test_what_is_left_behind_is_said_in_one_line_on_stderr(tmp_path: Path, siglip: Path):
    result = invoke(siglip, tmp_path / "out", "--layout", "transformers", "--json")
    assert result.exit_code == 0
    assert result.stderr == "skipped: 3 tensors of logit_scale, text_model\n"
    assert json.loads(result.stdout) == {
        "folder": str(tmp_path / "out"),
        "layout": "transformers",
        "tensors": len(load_file(tmp_path / "out" / WEIGHTS)),
        "bytes": (tmp_path / "out" / WEIGHTS).stat().st_size,
        "skipped": ["logit_scale", "text_model.head.bias", "text_model.head.weight"],
    }


def test_a_mistake_is_answered_in_a_sentence_and_exit_code_2(
    tmp_path: Path, checkpoint: Path, siglip: Path
):
    out = tmp_path / "out"
    for argv, answer in (
        ((checkpoint, out), "Missing option '--layout'"),
        ((checkpoint, out, "--layout", "timm"), "'timm' is not one of 'transformers', 'original'"),
        ((checkpoint, "--layout", "original"), "Missing argument 'FOLDER'"),
        (
            (siglip, out, "--layout", "original"),
            'SigLIP has no layout "original". Choose one of: "transformers".',
        ),
        ((siglip, checkpoint, "--layout", "transformers"), "is not empty: it holds config.json"),
    ):
        result = invoke(*argv)
        assert (result.exit_code, result.stdout) == (2, ""), argv
        assert answer in result.stderr.replace("\n", " "), result.stderr
    assert not out.exists()


def test_a_bad_checkpoint_is_a_failure_in_a_sentence(tmp_path: Path, checkpoint: Path):
    lost = tmp_path / "lost"
    lost.mkdir()
    (lost / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    tensors = load_file(checkpoint / WEIGHTS)
    del tensors["encoder.layers.1.attention.k_proj.weight"]
    save_file(tensors, lost / WEIGHTS)
    text = tmp_path / "text"
    text.mkdir()
    (text / "config.json").write_text('{"model_type": "bert"}')
    save_file({"x": torch.ones(1)}, text / WEIGHTS)
    for argv, answer in (
        ((lost,), "missing: encoder.layers.1.attention.k_proj.weight"),
        ((text,), 'is of model type "bert", which packvit does not run'),
        ((tmp_path / "none",), "There is no folder"),
        ((checkpoint, "--revision", "main"), "a folder has no revisions"),
    ):
        result = invoke(*argv, tmp_path / "out", "--layout", "original")
        assert (result.exit_code, result.stdout) == (1, ""), argv
        assert answer in result.stderr
        assert isinstance(result.exception, SystemExit)
    assert not (tmp_path / "out").exists()


def test_a_model_of_the_hub_is_converted_at_its_revision(tmp_path: Path, checkpoint: Path):
    old = {name: (checkpoint / name).read_bytes() for name in ("config.json", WEIGHTS)}
    other = write_checkpoint(tmp_path / "other", scale=2)
    new = {name: (other / name).read_bytes() for name in ("config.json", WEIGHTS)}
    argv = [sys.executable, "-m", "packvit", "convert", "owner/name", str(tmp_path / "out")]
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING")) and not name.lower().endswith("_proxy")
    }
    with Hub() as hub:
        hub.repositories["owner/name"] = Repository({OLD: old, NEW: new}, {"main": NEW, "v1": OLD})
        done = subprocess.run(
            [*argv, "--layout", "transformers", "--revision", "v1"],
            check=False,
            capture_output=True,
            text=True,
            env=kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hub")},
        )
    assert done.returncode == 0, done.stderr
    found, first = (load_file(folder / WEIGHTS) for folder in (tmp_path / "out", checkpoint))
    assert all(torch.equal(found[name], first[name]) for name in found.keys() | first.keys())
