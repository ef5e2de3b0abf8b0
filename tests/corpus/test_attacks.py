"""No attack on memory takes a worker, or the process that lists, 500 MiB."""

from collections.abc import Iterator
from pathlib import Path

import attacks
import pytest
from peaks import measure

import packvit

pytestmark = pytest.mark.soak

MOST = 500 << 20
FILES = {name: (kind, write) for kind, make in attacks.KINDS.items() for name, write in make()}


@pytest.fixture(scope="module")
def tiny() -> packvit.Encoder:
    return packvit.load("tiny", device="cpu")


@pytest.fixture(scope="module")
def usual(tiny: packvit.Encoder, tmp_path_factory: pytest.TempPathFactory) -> int:
    """What a small photograph takes a worker."""
    path = tmp_path_factory.mktemp("usual") / "a.jpg"
    path.write_bytes(attacks.photo())
    return measure(str(path), tiny).worker


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    yield from attacks.serve()


@pytest.mark.parametrize("name", FILES)
def test_no_attack_fills_memory(tmp_path: Path, tiny: packvit.Encoder, usual: int, name: str):
    kind, write = FILES[name]
    write(tmp_path / name)
    peak = measure(str(tmp_path / name), tiny)
    own = peak.pixels + ((tmp_path / name).stat().st_size if kind == "images" else 0)
    print(f"{name}: worker {peak.worker - usual - own >> 20}, listing {peak.listing >> 20} MiB")
    assert peak.worker - usual - own < MOST
    assert peak.listing < MOST
    assert peak.statuses  # no input vanishes


@pytest.mark.parametrize("name", attacks.BODIES)
def test_no_server_fills_memory(tiny: packvit.Encoder, usual: int, server: str, name: str):
    peak = measure(f"{server}/{name}", tiny, seconds=20.0)
    assert peak.worker - usual < MOST
    assert peak.listing < MOST
    assert peak.statuses
    assert "ok" not in peak.statuses
