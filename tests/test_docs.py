"""The docs say what the code does today: blocks run, generated pages are fresh, links lead on."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from demo.photographs import photographs

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
EXECUTED = (
    "README.md",
    "start.md",
    "models.md",
    "gpu-decoding.md",
    "embedding.md",
    "pictures.md",
    "search.md",
    "coming-from-research-code.md",
    "training.md",
)


GENERATED = ("cli.md", "reference.md", "checkpoints.md")  # whole pages
WRITTEN = sorted(page for page in (ROOT / "docs").glob("*.md") if page.name not in GENERATED)
REGIONS = re.compile(r"<!-- ([\w-]+): [^>]*-->\n.*?<!-- /\1 -->", re.S)
FENCED = re.compile(r"^```.*?^```", re.S | re.M)


@pytest.mark.parametrize("name", EXECUTED)
def test_every_python_block_runs_and_prints_what_stands_below_it(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    [page] = [page for page in PAGES if page.name == name]
    shown = r"^```python\n(.*?)^```\n(?:\n```\n(.*?)^```\n)?"
    blocks = re.findall(shown, page.read_text(), re.S | re.M)
    (tmp_path / "photos").mkdir()
    for path in photographs():
        shutil.copy(path, tmp_path / "photos")
    shutil.copy(tmp_path / "photos" / "chelsea.png", tmp_path / "cat.jpg")
    shutil.copy(tmp_path / "photos" / "china.jpg", tmp_path / "street.png")
    monkeypatch.chdir(tmp_path)
    import packvit

    packvit.embed(["photos"], model="tiny", out="features")  # what the shell command before wrote
    assert blocks
    for block, printed in blocks:
        capsys.readouterr()
        exec(compile(block, "docs", "exec"), {})
        assert not printed or capsys.readouterr().out == printed


def test_the_front_page_and_the_docs_stay_short():
    """Issue 15: README in 150 lines, 11,000 words of prose; code and output do not count."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    texts = [page.read_text() for page in (ROOT / "README.md", *WRITTEN)]
    assert sum(len(FENCED.sub("", REGIONS.sub("", text)).split()) for text in texts) <= 11_000


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_every_page_written_by_hand_opens_with_an_example(page: Path):
    assert re.match(r"# [^\n]+\n\n```", page.read_text())


@pytest.mark.soak
def test_the_walk_through_embedding_does_as_it_says(tmp_path: Path):
    page = (ROOT / "docs" / "embedding.md").read_text()
    walk = page.partition("## A walk")[2].partition("\n## ")[0]
    blocks = dict.fromkeys(("bash", ""), "")
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", walk, re.S | re.M):
        blocks[language] += block
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-c", f"set -eu\n{blocks['bash']}"],
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = {" ".join(line.split()) for line in (done.stdout + done.stderr).splitlines()}
    shown = {" ".join(line.split()) for line in blocks[""].splitlines()} - {"..."}
    # How many were written when the job was killed is for the clock to say.
    for word in ("kept", "are written already"):
        assert any(word in line for line in said)
        shown = {line for line in shown if word not in line}
    assert shown <= said, done.stderr


def test_generated_pages_are_fresh():
    # In a process of its own: the types checked in this one change how signatures print.
    command = [sys.executable, "-m", "docs.generate", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_package_is_in_the_architecture():
    page = (ROOT / "ARCHITECTURE.md").read_text()
    for path in (ROOT / "packvit").iterdir():
        if path.name.startswith("__") or path.name in ("py.typed", "models"):
            continue
        name = f"{path.name}/" if path.is_dir() else path.name
        assert f"`{name}`" in page, name
