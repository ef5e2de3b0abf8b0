"""docs/adding-a-family.md, followed to the letter on a copy of the repository without TIPSv2."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "adding-a-family.md").read_text()
TABLE = Path("packvit/families/__init__.py")
CHANGED = (Path("packvit/checkpoints/processors.py"), TABLE, TABLE)  # by the page's diffs, in order
FAMILY = Path("packvit/families/tipsv2.py")
TEST = Path("tests/families/test_tipsv2.py")
VERIFY = "verify --family tipsv2"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.S | re.M)


def replace_once(text: str, before: str, after: str) -> str:
    assert text.count(before) == 1
    return text.replace(before, after)


def run(copy: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *argv]
    return subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The repository without the family, and then with everything that the page says to write."""
    rubbish = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "packvit", tmp_path / "packvit", ignore=rubbish)
    (tmp_path / TEST).parent.mkdir(parents=True)
    for file in (
        "pyproject.toml",
        *(f"tests/{name}.py" for name in ("conftest", "reference", "judged")),
    ):
        shutil.copy(ROOT / file, tmp_path / file)
    (tmp_path / FAMILY).unlink()
    for path, diff in zip(CHANGED, blocks("diff"), strict=True):
        changed = tmp_path / path
        known, *added = diff.splitlines(keepends=True)
        assert {known[0], *(line[0] for line in added)} == {" ", "+"}
        new = known[1:] + "".join(line[1:] for line in added)
        without = replace_once(changed.read_text(), new, known[1:])
        changed.write_text(replace_once(without, known[1:], new))
    test, *family = blocks("python")
    (tmp_path / TEST).write_text(test)
    (tmp_path / FAMILY).write_text("\n\n".join(family))
    return tmp_path


@pytest.mark.soak
def test_who_follows_the_page_has_a_family_that_equals_its_reference(copy: Path):
    assert (copy / FAMILY).read_text() == (ROOT / FAMILY).read_text()
    assert len((copy / FAMILY).read_text().splitlines()) <= 150
    for tool in (["ruff", "format", "--check", "-q"], ["ruff", "check", "-q"]):
        told = run(copy, *tool, str(FAMILY), str(TEST))
        assert told.returncode == 0, told.stdout
    tested = run(copy, "pytest", "-q", "-p", "no:cacheprovider", str(TEST))
    assert tested.returncode == 0, tested.stdout
    assert "5 passed" in tested.stdout


@pytest.mark.soak
def test_what_was_followed_passes_verification(copy: Path):
    assert f"packvit {VERIFY}\n" in PAGE
    verified = run(copy, "packvit", *VERIFY.split(), "--device", "cpu")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert "of 2 encoders are within their limits" in verified.stdout
