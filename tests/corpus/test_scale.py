"""A thousand files that were made to break decoders, and a hundred thousand that are only many."""

import json
import os
import re
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rotten import encode, pixels, write_rotten
from small_checkpoint import write_checkpoint

from packvit.config import ImageConfig
from packvit.corpus.decode.prepare import Preprocessing
from packvit.corpus.decode.processes import Worker
from packvit.corpus.folder.checking import check_folder
from packvit.corpus.inputs.sources import Input

pytestmark = pytest.mark.soak

HALF = (0.5, 0.5, 0.5)
IMAGES = ImageConfig(patch=14, mean=HALF, std=HALF, resample="bicubic", sizing=None)
PREPROCESSING = Preprocessing(IMAGES, "hwc", "native", 256, 100_000_000)
MANY = 100_000
TIME_LIMIT = 1200  # seconds; in which nothing here hangs

# Prints a JSON line of rows and resident MB at every commit.
WATCHED = r"""
import json, sys
import packvit, torch
torch.set_num_threads(1)
seen = set()
def tell(progress):
    if progress.committed not in seen:
        seen.add(progress.committed)
        pages = int(open("/proc/self/statm").read().split()[1])
        print(json.dumps([progress.committed, pages * 4096 / 1e6]), flush=True)
photos, model, out = sys.argv[1:]
packvit.embed(photos, out=out, model=model, device="cpu", max_patches=1, progress=tell)
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The test images of Pillow's source distribution, and ours, by their paths."""
    folder = tmp_path_factory.mktemp("corpus")
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary"]
    download += [":all:", f"pillow=={version('pillow')}", "--dest", str(folder)]
    subprocess.run(download, check=True, timeout=TIME_LIMIT)
    (source,) = folder.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        images = [member for member in archive if "/Tests/images/" in member.name]
        archive.extractall(folder, members=images, filter="data")
    images = folder / source.name.removesuffix(".tar.gz") / "Tests" / "images"
    # An archive stands for what is in it, and a text named as a photograph is refused: a list?
    files = [path for path in images.rglob("*") if path.is_file()]
    files = [path for path in files if path.suffix not in (".tar", ".txt")]
    write_rotten(folder / "rotten")
    files += [path for path in (folder / "rotten").iterdir() if not path.is_dir()]
    assert len(files) >= 1000
    return sorted(map(str, files))


def test_pillows_own_test_images_and_ours_end_as_a_row_each(tmp_path: Path, corpus: list[str]):
    command = [sys.executable, "-m", "packvit", "embed", *corpus, "--out", str(tmp_path / "out")]
    command += ["--model", str(write_checkpoint(tmp_path / "model")), "--device", "cpu", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT)
    assert done.returncode == 3, done.stderr
    summary = json.loads(done.stdout)
    check = check_folder(tmp_path / "out")
    assert not check.faults
    assert check.rows == summary["rows"] == len(corpus)
    ids = pq.ParquetDataset(sorted((tmp_path / "out").glob("data/*.parquet"))).read()["id"]
    written = {os.fsencode(name).decode(errors="backslashreplace") for name in corpus}
    assert set(ids.to_pylist()) == written
    # What a browser shows is embedded, and what it does not is said to be of another format.
    assert summary["ok"] >= 400
    print({code: error["rows"] for code, error in summary["errors"].items()}, summary["ok"])


def test_none_of_them_takes_a_worker_more_memory_than_its_pixels_allow(corpus: list[str]):
    worker, largest, peak = Worker(), 0, 0

    def admit(pixels: int) -> None:
        nonlocal largest
        largest = max(largest, pixels)

    try:
        for path in corpus:
            worker.prepare([Input(path, path)], PREPROCESSING, admit, 60.0)
            status = Path(f"/proc/{worker.process.pid}/status").read_text()
            peak = int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024
            assert peak < 60e6 + 8 * largest, path
    finally:
        worker.end()
    print(f"{len(corpus)} files, at most {peak / 1e6:.0f} MB; the largest has {largest} pixels")


def test_memory_does_not_grow_with_the_number_of_inputs(tmp_path: Path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for first in range(0, MANY, 1000):  # a file takes no more than some ten thousand names
        data = encode(Image.fromarray(pixels(14, 14, seed=first)), "PNG")
        (photos / f"{first:06}.png").write_bytes(data)
        for number in range(first + 1, first + 1000):
            os.link(photos / f"{first:06}.png", photos / f"{number:06}.png")
    model = write_checkpoint(tmp_path / "model")
    command = [sys.executable, "-c", WATCHED, str(photos), str(model), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT, check=True)
    rows, resident = np.array([json.loads(line) for line in done.stdout.splitlines()]).T
    assert rows[-1] == MANY
    warm = rows >= MANY / 5
    slope = np.polyfit(rows[warm], resident[warm], 1)[0] * 10_000
    print(f"{slope:.3f} MB for 10,000 inputs; {resident[warm][0]:.0f} to {resident[-1]:.0f} MB")
    assert slope < 1.0
