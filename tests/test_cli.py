import json
import subprocess
import sys

from click.testing import CliRunner

from packvit.cli import COMMANDS, main


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


def test_every_command_has_help_with_an_example():
    for name in COMMANDS:
        shown = CliRunner().invoke(main, [name, "--help"])
        assert shown.exit_code == 0
        assert f"packvit {name} " in shown.stdout.split("Examples:")[1]


def test_a_wrong_command_is_answered_in_one_sentence():
    shown = CliRunner().invoke(main, ["embd"])
    assert shown.exit_code == 2
    assert "No such command 'embd'" in shown.stderr


def test_help_does_not_wait_for_torch():
    for module in ("packvit.cli", *COMMANDS.values()):
        code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0, module


def test_python_m_packvit_is_the_command():
    command = [sys.executable, "-m", "packvit", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("packvit, version ")
