"""Every command runs each tower of a multimodal model, and each backbone that came with them."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import perception
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

import packvit
from packvit.cli import main
from packvit.verification.references import write_random
from packvit.verification.verify import family_names

TOWERS = ("qwen3_vl", "qwen2_5_vl", "qwen2_vl", "kimi_k25", "radio", "tipsv2", "perception")
# Half a second each; those that no other test verifies or measures are not kept for the soak.
SOME = [
    name if name in ("qwen2_vl", "perception") else pytest.param(name, marks=pytest.mark.soak)
    for name in TOWERS
]
Write = Callable[[str], Path]
INSTALL = "pip install 'packvit[bench]'"


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a checkpoint of a family, written once."""
    known: dict[str, Path] = {}

    def once(name: str) -> Path:
        if name in known:
            return known[name]
        family = family_names()[name].family
        known[name] = path = tmp_path_factory.mktemp(name)
        if family.reference.library == "timm":
            return perception.write(path, "core", perception.draw("core"))
        write_random(family.reference.variants[0], family, path, seed=0)
        return path

    return once


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    images.mkdir()
    for side in (64, 100):
        Image.effect_noise((side, 80), 90).convert("RGB").save(images / f"{side}.png")
    return images


def invoke(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def without_its_reference(name: str) -> bool:
    return name == "perception" and find_spec("timm") is None


@pytest.mark.parametrize("name", SOME)
def test_verify_passes_or_names_what_to_install(name: str, write: Write, tmp_path: Path):
    target = tmp_path / "certificate.json"
    done = invoke("verify", "--model", write(name), "--quick", "--certificate", target)
    if without_its_reference(name):
        assert done.exit_code == 1
        assert done.stderr.strip().endswith(INSTALL)
        assert done.stderr.count("\n") == 1
        return
    assert done.exit_code == 0, done.output
    [found] = json.loads(target.read_text())["models"]
    assert {"tokens", "taps", "neighbours of NaN", "weights"} <= {r["what"] for r in found["rows"]}


@pytest.mark.parametrize("name", SOME)
def test_bench_measures_ours_beside_the_reference(name: str, write: Write):
    done = invoke(
        *("bench", "--model", write(name), "--workload", "small", "--rounds", 2, "--device", "cpu"),
        *("--json", "-"),
    )
    if without_its_reference(name):
        assert done.exit_code == 1
        assert INSTALL in done.stderr.splitlines()[-1]
        return
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    [work] = report["workloads"]
    assert {report["baseline"], "packvit, sdpa"} <= work["results"].keys()
    assert work["wrong"] == {}


@pytest.mark.parametrize("name", TOWERS)
def test_photographs_are_embedded_and_their_features_drawn(
    name: str, write: Write, photographs: Path, tmp_path: Path
):
    folder, out = write(name), tmp_path / "features"
    done = invoke("embed", photographs, "--model", folder, "--out", out, "--device", "cpu")
    assert done.exit_code == 0, done.output
    encoder = packvit.load(folder, device="cpu")
    expected = encoder.embed(sorted(photographs.iterdir()))
    assert packvit.read(out).matrix == pytest.approx(expected, abs=2e-5)
    sheet = tmp_path / "maps.png"
    drawn = invoke("pca", photographs, "--model", folder, "--out", sheet, "--device", "cpu")
    assert drawn.exit_code == 0, drawn.output
    with Image.open(sheet) as picture:
        assert len(picture.getcolors(2**24) or []) > 100


@pytest.mark.parametrize("name", TOWERS)
def test_every_weight_of_a_block_trains(name: str, write: Write, photographs: Path):
    encoder = packvit.load(write(name), device="cpu").train()
    pack = encoder.pack(sorted(photographs.iterdir()))
    optimizer = torch.optim.SGD(encoder.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        loss = encoder(*pack).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    for name, weight in encoder.encoder.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().max() > 0 or name.endswith("qkv.bias"), name
