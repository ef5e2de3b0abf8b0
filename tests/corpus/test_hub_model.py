"""P1: a model of the hub, by the command line: loaded, embedded with, and resumed."""

import os
import subprocess
import sys
from pathlib import Path

from hub_server import Hub, Repository
from PIL import Image
from small_checkpoint import write_checkpoint

from packvit.corpus.folder.layout import read_commits

COMMIT = "c" * 40


def test_a_model_of_the_hub_embeds_and_the_same_command_goes_on(tmp_path: Path):
    model = tmp_path / "model"
    write_checkpoint(model)
    held = {file.name: file.read_bytes() for file in model.iterdir()}
    photographs, out = tmp_path / "photographs", tmp_path / "features"
    photographs.mkdir()
    for index in range(3):
        Image.new("RGB", (30 + index, 40), (index * 80, 0, 0)).save(photographs / f"{index}.png")
    with Hub() as hub:
        hub.repositories["owner/small"] = Repository({COMMIT: held}, {"main": COMMIT})
        inherited = {name: os.environ[name] for name in os.environ if not name.startswith("HF_")}
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache")}
        command = ["embed", str(photographs), "--model", "owner/small", "--out", str(out)]

        def run() -> str:
            ran = subprocess.run(
                [sys.executable, "-m", "packvit.cli", *command],
                env=inherited | settings,
                capture_output=True,
                text=True,
                check=False,
            )
            assert ran.returncode == 0, ran.stderr
            return ran.stderr

        run()
        parts = {file: file.read_bytes() for file in out.rglob("*.parquet")}
        (commits,) = read_commits(out)
        (out / "_commits.jsonl").write_text("")  # as if it had been stopped before the first
        run()
    assert {file: file.read_bytes() for file in out.rglob("*.parquet")} == parts
    assert parts
    assert read_commits(out)[0].rows == commits.rows == 3
