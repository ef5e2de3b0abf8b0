"""The page "Search your photographs" does as it says, with a checkpoint of random weights."""

import re
import shlex
from pathlib import Path

import pytest
import two_towers
from click.testing import CliRunner
from PIL import Image
from transformers import SiglipImageProcessorPil

from demo.photographs import photographs
from packvit.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "search.md"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the page takes for granted: photographs in folders of labels, and a model."""
    two_towers.build("siglip").save_pretrained(tmp_path / "model")
    SiglipImageProcessorPil(size={"height": 70, "width": 70}).save_pretrained(tmp_path / "model")
    two_towers.write_gemma_tokenizer(tmp_path / "model")
    for target in ("photos", "val/cat", "val/dog", "train/cat", "train/dog"):
        (tmp_path / target).mkdir(parents=True)
        for path in photographs()[3:7]:
            with Image.open(path) as opened:
                opened.convert("RGB").resize((90, 80)).save(
                    tmp_path / target / path.with_suffix(".png").name
                )
    for name in ("beach.jpg", "cat.jpg"):
        (tmp_path / name).write_bytes((tmp_path / "photos" / "china.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    for split in ("val", "train"):
        run("packvit", "embed", split, "--model", "./model", "--out", f"{split}-features")
    return tmp_path


def run(*words: str) -> str:
    assert words[0] == "packvit"
    found = CliRunner().invoke(main, words[1:])
    assert found.exit_code == 0, (words, found.stderr)
    return found.stdout


def test_every_command_of_the_page_runs(folder: Path, capsys: pytest.CaptureFixture[str]):
    page = PAGE.read_text().replace("google/siglip2-base-patch16-224", "./model")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.S | re.M)
    lines = [line for kind, block in blocks if not kind for line in block.splitlines()]
    printed = {
        line: run(*shlex.split(line.split(" | ")[0].split(" > ")[0], comments=True))
        for line in lines
        if line.startswith("packvit")
    }
    assert len(printed) == 10
    assert (folder / "found.jpg").stat().st_size > 10_000
    assert (folder / "labels.parquet").exists()
    [piped] = (text for line, text in printed.items() if " -f |" in line)
    assert all(Path(path).is_file() for path in piped.splitlines())
    assert len(piped.splitlines()) == 4
    [block] = (block for kind, block in blocks if kind == "python")
    exec(block, {})
    assert re.fullmatch(r"([01]\.\d\d \w+\.png\n){3}", capsys.readouterr().out)
