import csv
import hashlib
import json
import re
import signal
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import packvit
from demo.photographs import photographs
from recipes import evaluate, views
from recipes.photographs import LONGEST, read_list, shrink
from recipes.pretrain import train

ROOT = Path(__file__).parents[1]
TOY = """
seed = 0
steps = 12
photographs = 6
workers = 0
most_patches = 64
learning_rate = 2e-3
warmup = 2
weight_decay = 0.05
clip = 1.0
average = 0.9
temperature = 0.05
token_temperature = 0.2
token_samples = 64
token_weight = 0.5
pixel_weight = 0.5
masked = 0.5
log_every = 1
check_every = 4
[encoder]
width = 32
layers = 2
heads = 2
mlp_width = 48
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight photographs: six to train on, two to check with."""
    folder = tmp_path_factory.mktemp("photographs")
    for number, path in enumerate(photographs()):
        target = folder / ("validation" if number > 5 else "train") / f"{number}.jpg"
        target.parent.mkdir(exist_ok=True)
        image = Image.open(path).convert("RGB")
        image.thumbnail((160, 160))
        image.save(target)
    return folder


def read_log(out: Path) -> list[dict[str, str]]:
    with (out / "log.csv").open() as file:
        return list(csv.DictReader(file))


def test_pretraining_learns_and_after_a_kill_goes_on_as_if_nothing_had_happened(
    folder: Path, tmp_path: Path
):
    (tmp_path / "toy.toml").write_text(TOY)
    settings = tomllib.loads(TOY)
    train(settings, folder, tmp_path / "whole", torch.device("cpu"))
    whole = read_log(tmp_path / "whole")
    losses = [float(row["loss"]) for row in whole]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.2

    command = [sys.executable, "-m", "recipes.pretrain", tmp_path / "toy.toml", folder]
    with subprocess.Popen(
        [*command, "--out", tmp_path / "killed", "--device", "cpu"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdout
        for line in running.stdout:  # the checkpoint is of step 4
            if "step 6 " in line:
                break
        running.send_signal(signal.SIGKILL)
    assert running.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model").exists()
    train(settings, folder, tmp_path / "killed", torch.device("cpu"))
    resumed = read_log(tmp_path / "killed")
    assert [row["step"] for row in resumed] == [str(step) for step in range(1, 13)]
    assert [float(row["loss"]) for row in resumed] == pytest.approx(losses, abs=2e-3)

    photo = [folder / "validation" / "6.jpg"]
    ends = []
    for name in ("whole", "killed"):
        encoder = packvit.load(tmp_path / name / "model", device="cpu")
        pack = encoder.pack(photo)
        ends.append(encoder(pack.hidden_states, pack.grid_thw))
    torch.testing.assert_close(ends[0], ends[1], atol=0.05, rtol=0)


def test_the_patches_of_a_crop_know_their_place_in_the_photograph(folder: Path):
    photos = views.read_photographs(folder / "train", torch.device("cpu"))
    sizes = [(photo.shape[1], photo.shape[2]) for photo in photos]
    plan = views.Plans(sizes, seed=0, count=6, patch=14, most=256)[0]
    whole, crops, where = views.cut_batch(photos, plan, 14)
    assert (
        {box.mirrored for box in plan.wholes}
        == {box.mirrored for box in plan.crops}
        == {
            True,
            False,
        }
    )
    brightness = [view.patches.mean(1) for view in (whole, crops)]
    alike = [
        np.corrcoef(brightness[0][where[crops.view == i]], brightness[1][crops.view == i])[0, 1]
        for i in range(len(plan.crops))
    ]
    assert np.median(alike) > 0.8


def test_crops_are_of_the_sizes_that_are_told():
    photo = Image.new("RGB", (300, 200))
    crops = evaluate.draw_crops(photo, np.random.default_rng(0))
    assert len(crops) == 20
    for crop in crops:
        assert 0.09 < crop.width * crop.height / photo.width / photo.height < 0.41
        assert 0.49 < crop.width / crop.height < 2.05


def test_histograms_are_those_of_numpy(folder: Path):
    photo = Image.open(folder / "train" / "1.jpg")
    counted, _ = np.histogramdd(
        np.asarray(photo).reshape(-1, 3), bins=(8, 8, 8), range=[(0, 256)] * 3
    )
    found = evaluate.histogram("RGB")(photo)
    np.testing.assert_allclose(found, counted.ravel() / counted.sum(), atol=1e-7)


def test_the_interval_is_that_of_the_mean():
    values = np.random.default_rng(1).random(400)
    mean, low, high = evaluate.interval(values)
    margin = 1.96 * values.std() / 20
    assert (low, mean, high) == pytest.approx(
        (values.mean() - margin, values.mean(), values.mean() + margin), abs=0.1 * margin
    )


def test_a_crop_is_found_by_what_it_shares_with_its_photograph():
    draw = np.random.default_rng(0)
    photos = draw.normal(size=(5, 8))
    crops = np.repeat(photos, evaluate.CROPS, axis=0) + 0.01 * draw.normal(size=(100, 8))
    assert evaluate.hits(evaluate.cosine(crops, photos)).all()
    crops[0] = photos[3]
    assert evaluate.hits(evaluate.cosine(crops, photos)).sum() == 99


def test_the_embedded_encoder_finds_photographs_that_it_was_not_trained_on(folder: Path):
    photos = [*evaluate.read_images(folder / "train"), *evaluate.read_images(folder / "validation")]
    encoder = packvit.load("tiny", device="cpu")
    fresh = evaluate.untrained(encoder)
    assert fresh.config == encoder.config
    trained, untrained = (evaluate.Trial(each, photos).figures() for each in (encoder, fresh))
    # The motorcycle is there twice, seen from the left and from the right.
    assert min(trained.values()) > 0.8
    assert max(untrained.values()) < 0.7


def test_the_model_card_gives_the_figures_that_were_measured():
    report = json.loads((ROOT / "benchmarks" / "results" / "tiny-retrieval.json").read_text())
    card = (ROOT / "packvit" / "models" / "tiny" / "README.md").read_text()
    for kind in ("plain", "edited"):
        for mean, low, high in report[kind]["retrieval@1"].values():
            assert f"{100 * mean:.1f} % ({100 * low:.1f} to {100 * high:.1f})" in card


def test_training_and_test_photographs_come_from_different_packages():
    rows = read_list()
    packages = {
        split: {row.package for row in rows if row.split == split}
        for split in ("train", "validation", "test")
    }
    assert sum(len(names) for names in packages.values()) == len(set.union(*packages.values()))
    assert sum(row.split == "test" for row in rows) >= 60
    assert len({row.sha256 for row in rows}) == len(rows)
    assert all(row.licence and re.fullmatch(r"[0-9a-f]{64}", row.sha256) for row in rows)


def test_listed_photographs_are_the_files_of_the_packages():
    for row in read_list():
        if row.registry == "pypi":
            library, _, inside = row.path.partition("/")
            spec = find_spec(library)
            assert spec
            assert spec.submodule_search_locations
            data = (Path(spec.submodule_search_locations[0]) / inside).read_bytes()
            assert hashlib.sha256(data).hexdigest() == row.sha256, row.path
            assert max(shrink(data).size) <= LONGEST
