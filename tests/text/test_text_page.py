"""The page "Text and images" does as it says, with a checkpoint of random weights."""

import re
from pathlib import Path

import numpy as np
import pytest
import two_towers
from PIL import Image
from transformers import CLIPImageProcessorPil

PAGE = Path(__file__).parents[2] / "docs" / "text.md"


def test_every_block_of_the_page_prints_what_stands_below_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    two_towers.build("clip").save_pretrained(tmp_path / "clip")
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 70}, crop_size={"height": 70, "width": 70}
    )
    images.save_pretrained(tmp_path / "clip")
    two_towers.write_clip_tokenizer(tmp_path / "clip")
    for name in ("cat.jpg", "street.png"):
        Image.fromarray(np.full((90, 80, 3), 99, np.uint8)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```\n\n```\n(.*?)^```", PAGE.read_text(), re.S | re.M)
    assert len(blocks) == 2
    for block, printed in blocks:
        capsys.readouterr()
        exec(block.replace("openai/clip-vit-base-patch32", "./clip"), {})
        assert capsys.readouterr().out == printed
