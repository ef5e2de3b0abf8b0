"""What a job takes, computed again from the recorded results by other formulas."""

import json
from datetime import timedelta
from pathlib import Path

import pytest

from benchmarks.howlarge import estimate

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def figures(images: float, gpus: int, per_machine: int, price: float) -> dict[str, str]:
    return {what: much for what, much, _ in estimate(images, gpus, per_machine, price)}


def number(text: str) -> float:
    return float(text.split()[0].replace(",", ""))


@pytest.mark.parametrize(("images", "gpus"), [(1e9, 64), (3e8, 8)])
def test_hours_money_and_bytes_are_those_of_the_recorded_rates(images: float, gpus: int):
    feeding, scaling, sizes = (
        json.loads((RESULTS / f"{name}.json").read_text())
        for name in ("feeding-h100", "scaling-h200", "howlarge-cpu")
    )
    one, two = (
        job["steady_images_per_second"] for job in scaling["jobs"][:2]
    )  # one GPU, and two of a host
    found = figures(images, gpus, 8, 3.0)
    job = feeding["results"]["job, gpu"]["images_per_second"]
    embedding = timedelta(seconds=images / gpus / job * (2 * one / two)) / timedelta(hours=1)
    listing = timedelta(microseconds=images * sizes["list_seconds_each"] * 1e6) / timedelta(hours=1)
    assert number(found["hours of embedding"]) == pytest.approx(embedding, rel=0.01)
    assert number(found["hours of listing before"]) == pytest.approx(listing, rel=0.01)
    assert number(found["money"]) == pytest.approx(3 * gpus * (embedding + listing), rel=0.01)
    assert number(found["bytes written"]) == pytest.approx(
        images * sizes["row_bytes"] / 1e12, rel=0.01
    )
    assert number(found["objects in a bucket"]) == pytest.approx(images / 512, rel=0.01)


def test_what_was_measured_is_near_what_a_row_holds():
    sizes = json.loads((RESULTS / "howlarge-cpu.json").read_text())
    assert 4 * 1024 + 32 < sizes["row_bytes"] < 4 * 1024 + 120  # floats, a digest, and the rest
