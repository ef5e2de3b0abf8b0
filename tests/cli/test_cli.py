import json
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from packaging.version import Version
from PIL import Image
from torch.nn.attention import SDPBackend

from packvit.bench import MODELS
from packvit.cli import COMMANDS, main
from packvit.cli.command import in_options
from packvit.cli.embed import embed
from packvit.cli.models import SHORT
from packvit.families import FAMILIES
from packvit.version import TESTED, is_newer


def test_info_lists_backends_with_their_obstacles_and_families():
    shown = CliRunner().invoke(main, ["info"])
    assert shown.exit_code == 0
    assert "sdpa   one SDPA call per distinct length" in shown.stdout
    assert "(not tested by us; choose it by name)" in shown.stdout
    found = json.loads(CliRunner().invoke(main, ["info", "--json"]).stdout)
    assert [backend["name"] for backend in found["backends"]] == [
        "fa4",
        "fa3",
        "fa2",
        "torch",
        "sdpa",
    ]
    assert found["backends"][-1]["obstacle"] is None
    assert "apple/aimv2-large-patch14-native" in found["families"][0]["checkpoints"]
    for family in found["families"]:
        assert f"{family['class']} " in shown.stdout


def test_info_names_the_kernel_of_a_call_and_what_is_newer_than_tested(
    monkeypatch: pytest.MonkeyPatch,
):
    """P4"""
    found = json.loads(CliRunner().invoke(main, ["info", "--json"]).stdout)
    heads = torch.zeros(1, 1, 256, 128, device="cpu")
    if found["auto"] == "sdpa":
        taken = SDPBackend(
            torch._fused_sdp_choice(heads, heads, heads)  # pyright: ignore[reportPrivateImportUsage]
        ).name
        assert found["kernel"].startswith(taken.lower().replace("_", " "))
    assert found["newer_than_tested"] == {
        package: {"installed": metadata.version(package), "tested": tested}
        for package, tested in TESTED.items()
        if find_spec(package.replace("pillow", "PIL")) and package != "flash-attn-4"
        and Version(".".join(metadata.version(package).split(".")[:2])) > Version(tested)
    }  # fmt: skip
    monkeypatch.setitem(TESTED, "torch", "2.10")
    shown = CliRunner().invoke(main, ["info"]).stdout
    assert f"torch {metadata.version('torch')} is newer than 2.10, the newest that" in shown


@pytest.mark.parametrize(
    ("version", "tested", "newer"),
    [
        ("2.13.9", "2.13", False),
        ("2.14.0", "2.13", True),
        ("3.0", "2.13", True),
        ("2.9.1", "2.13", False),
        ("4.0.0b36", "4.0.0b36", False),
        ("4.0.0b37", "4.0.0b36", True),
        ("4.0.0", "4.0.0b36", True),
        ("2.13.0+cpu", "2.13", False),
    ],
)
def test_a_version_is_newer_in_the_numbers_that_the_tested_one_has(
    version: str, tested: str, newer: bool
):
    """P4"""
    assert is_newer(version, tested) == newer


def test_every_command_has_help_with_an_example():
    for name in COMMANDS:
        shown = CliRunner().invoke(main, [name, "--help"])
        assert shown.exit_code == 0
        assert f"packvit {name} " in shown.stdout.split("Examples:")[1]


def test_a_wrong_command_is_answered_in_one_sentence():
    shown = CliRunner().invoke(main, ["embd"])
    assert shown.exit_code == 2
    assert shown.stderr.startswith("Error: No such command 'embd'. Did you mean embed?\n")  # W8


def test_help_is_shown_for_the_short_option_too():
    """W8"""
    for name in (None, *COMMANDS):
        shown = CliRunner().invoke(main, [*([name] if name else []), "-h"])
        assert shown.exit_code == 0, (name, shown.output)
        assert "-h, --help" in shown.stdout


@pytest.mark.parametrize("argv", [["embed", "x"], ["pca", "x"], ["verify"], ["bench"]])
def test_a_misspelt_model_is_answered_by_the_known_name_that_is_near(
    argv: list[str], tmp_path: Path
):
    """W8"""
    out = ["--out", str(tmp_path / "x.png")] if len(argv) > 1 else []
    (tmp_path / "x").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "x" / "x.jpg")
    words = [argv[0], *(str(tmp_path / word) for word in argv[1:]), *out]
    for model, meant in (("Tiny", "tiny"), ("aimv2_large", "aimv2-large")):
        shown = CliRunner().invoke(main, [*words, "--model", model])
        assert shown.exit_code == 1
        (error,) = shown.stderr.splitlines()
        assert error.startswith("Error: ")
        assert f"Did you mean {meant}" in error


def test_short_names_of_models_are_one_set_and_each_is_published():
    """W8"""
    published = {name for encoder in FAMILIES for name in encoder.family.checkpoints}
    assert set(SHORT) == set(MODELS)
    assert set(SHORT.values()) <= published


def test_messages_name_options_as_they_are_typed():
    """W9"""
    for said, typed in (
        ("token_budget is 0, but must be 1.", "--token-budget is 0, but must be 1."),
        ('Use `device="cuda"`, or `decode="pil"`.', "Use --device cuda, or --decode pil."),
        ('ask for resize="native".', "ask for --resize native."),
        ("start over with `overwrite`, or", "start over with --overwrite, or"),
        ("taps asks for layer 9", "--tap asks for layer 9"),
        ("/max_pixels/token_budget.jpg has max_patches.", "/max_pixels/token_budget.jpg has "
         "--max-patches."),
        ("It cannot be read. The model is small.", "It cannot be read. The model is small."),
    ):  # fmt: skip
        assert in_options(said, embed) == typed


def test_help_does_not_wait_for_torch():
    for module in ("packvit.cli", *COMMANDS.values()):
        code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0, module


def test_python_m_packvit_is_the_command():
    command = [sys.executable, "-m", "packvit", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("packvit, version ")


def test_warmup_says_where_to_run_it_when_there_is_no_gpu():
    shown = CliRunner().invoke(main, ["warmup", "tiny", "--device", "cpu"])
    assert shown.exit_code == 2
    assert "The model is on cpu, where no kernel is compiled." in shown.stderr
