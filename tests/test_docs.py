"""The docs say what the code does today: blocks run, generated pages are fresh, links lead on."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import rotten

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
EXECUTED = (
    "README.md",
    "embedding.md",
    "pictures.md",
    "coming-from-research-code.md",
    "training.md",
)


@pytest.mark.parametrize("name", EXECUTED)
def test_every_python_block_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    [page] = [page for page in PAGES if page.name == name]
    code = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M)
    names = rotten.write_good(tmp_path / "photos", 3)
    (tmp_path / "cat.jpg").write_bytes((tmp_path / "photos" / names[0]).read_bytes())
    (tmp_path / "street.png").write_bytes((tmp_path / "photos" / names[1]).read_bytes())
    monkeypatch.chdir(tmp_path)
    import packvit

    packvit.embed(["photos"], model="tiny", out="features")  # what the shell command before wrote
    assert code
    for block in code:
        exec(compile(block, "docs", "exec"), {})


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


def test_every_room_stands_in_the_architecture():
    told = (ROOT / "ARCHITECTURE.md").read_text()
    for path in (ROOT / "packvit").iterdir():
        if path.name.startswith("__") or path.name in ("py.typed", "models"):
            continue
        name = f"{path.name}/" if path.is_dir() else path.name
        assert f"`{name}`" in told, name
