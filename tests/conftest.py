import math
import os
from functools import partial
from pathlib import Path

import pytest
import torch

import packvit
from packvit.cli import progress
from packvit.encoder import Encoder

# Models this small wait for each other's threads: on a busy machine, ten times as long. So do
# those of the processes that tests start, whose bits must be the same besides.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture
def swift(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no job take so long, on a busy machine either, that it tells how far it is."""
    monkeypatch.setattr(progress, "plain_lines", partial(progress.plain_lines, pause=math.inf))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small AIMv2 that no test changes."""
    from small_checkpoint import write_checkpoint  # imports transformers, which takes seconds

    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def encoder(checkpoint: Path) -> Encoder:
    return packvit.load(checkpoint, device="cpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="run the tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skips = {}
    if not torch.cuda.is_available():
        skips["gpu"] = pytest.mark.skip(reason="needs a CUDA device")
    if not config.getoption("--soak"):
        skips["soak"] = pytest.mark.skip(reason="takes minutes: run by `make soak`")
    for item in items:
        for name, skip in skips.items():
            if item.get_closest_marker(name):
                item.add_marker(skip)
