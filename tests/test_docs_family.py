"""docs/adding-a-family.md, followed to the letter on a copy of the repository."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "adding-a-family.md").read_text()
TABLE = Path("packvit/families/__init__.py")
FAMILY = Path("packvit/families/ijepa.py")
TEST = Path("tests/families/test_ijepa.py")
VERIFY = "verify --family ijepa"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.S | re.M)


def insert(text: str, diff: str) -> str:
    """Put the line that opens with + behind the line before it, which must stand there once."""
    before, added = diff.splitlines(keepends=True)
    assert (before[0], added[0]) == (" ", "+")
    assert text.count(before[1:]) == 1
    return text.replace(before[1:], before[1:] + added[1:])


def run(copy: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *argv]
    return subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The repository, with everything in it that the page says to write."""
    rubbish = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "packvit", tmp_path / "packvit", ignore=rubbish)
    (tmp_path / TEST).parent.mkdir(parents=True)
    for file in (
        "pyproject.toml",
        *(f"tests/{name}.py" for name in ("conftest", "reference", "judged")),
    ):
        shutil.copy(ROOT / file, tmp_path / file)
    test, *family = blocks("python")
    (tmp_path / TEST).write_text(test)
    (tmp_path / FAMILY).write_text("\n\n".join(family))
    table = (tmp_path / TABLE).read_text()
    for diff in blocks("diff"):
        table = insert(table, diff)
    (tmp_path / TABLE).write_text(table)
    return tmp_path


def test_who_follows_the_page_has_a_family_that_equals_its_reference(copy: Path):
    assert len((copy / FAMILY).read_text().splitlines()) <= 150
    for tool in (["ruff", "format", "--check", "-q"], ["ruff", "check", "-q"]):
        told = run(copy, *tool, str(FAMILY), str(TEST))
        assert told.returncode == 0, told.stdout
    tested = run(copy, "pytest", "-q", "-p", "no:cacheprovider", str(TEST))
    assert tested.returncode == 0, tested.stdout
    assert "6 passed" in tested.stdout


@pytest.mark.soak
def test_what_was_followed_passes_verification(copy: Path):
    assert f"packvit {VERIFY}\n" in PAGE
    verified = run(copy, "packvit", *VERIFY.split(), "--device", "cpu")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert "of 2 encoders are within their limits" in verified.stdout
