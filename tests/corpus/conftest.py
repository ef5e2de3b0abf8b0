from pathlib import Path

import pytest
from small_checkpoint import write_checkpoint

import packvit
from packvit.encoder import Encoder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def encoder(checkpoint: Path) -> Encoder:
    return packvit.load(checkpoint, device="cpu")
