"""`--decode gpu` on a GPU: the very parts that `--decode pil` writes, or the files are Pillow's."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jpegs import embed_with, parts, read_rows, write_mixed
from PIL import Image
from rotten import encode, exif, pixels
from small_checkpoint import write_checkpoint

import packvit
from demo.photographs import photographs
from packvit.corpus import UsageError
from packvit.corpus.encode.filling import Shard
from packvit.corpus.inputs.find import list_inputs
from packvit.corpus.inputs.sources import read
from packvit.corpus.manifest import describe_job
from packvit.corpus.progress import Effort
from packvit.corpus.runners.embedder import Job
from packvit.corpus.runners.host import Pool, run_processes
from packvit.corpus.runners.launching import start
from packvit.corpus.runners.order import Work
from packvit.corpus.settings import EmbedOptions, ModelChoice
from packvit.encoder import Encoder
from packvit.gpu.decoder import Decoded, JpegDecoder
from packvit.gpu.jpeg import JpegPlan, plan_jpeg
from packvit.images.decode import decode
from packvit.images.errors import ImageError
from packvit.images.patches import to_patches

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> Encoder:
    return packvit.load(checkpoint, device="cuda")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of all kinds, and real photographs in three subsamplings and all orientations."""
    folder = tmp_path_factory.mktemp("photos")
    write_mixed(folder)
    for number, path in enumerate(photographs()):
        image = Image.open(path).convert("RGB")
        options: dict[str, Any] = {"quality": 75 + 3 * number, "exif": exif(number + 1)}
        data = encode(image, "JPEG", subsampling=number % 3, **options)
        (folder / f"real-{number}.jpg").write_bytes(data)
    return folder


def planned(encoder: Encoder, photos: Path) -> int:
    """How many of the files there are the GPU's."""
    plans = []
    for source in list_inputs([str(photos)]):
        with suppress(ImageError):
            plans.append(plan_jpeg(read(source), encoder.images))
    return sum(isinstance(plan, JpegPlan) for plan in plans)


@pytest.mark.parametrize("token_budget", [1024, 16384])
def test_parts_are_the_same_bytes_whoever_decodes(
    tmp_path: Path, checkpoint: Path, encoder: Encoder, photos: Path, token_budget: int
):
    job: dict[str, Any] = {"model": checkpoint, "device": "cuda", "token_budget": token_budget}
    job |= {"tokens": True, "taps": (1,)}
    theirs = packvit.embed(photos, out=tmp_path / "pil", decode="pil", **job)
    ours = packvit.embed(photos, out=tmp_path / "gpu", decode="gpu", **job)
    assert len(parts(tmp_path / "pil")) > 1
    assert parts(tmp_path / "pil") == parts(tmp_path / "gpu")
    assert (theirs.errors, theirs.tokens) == (ours.errors, ours.tokens)
    assert theirs.on_gpu is None
    assert ours.on_gpu == planned(encoder, photos) > 40
    assert ours.shares.decoding > 0
    again = packvit.embed(photos, out=tmp_path / "gpu", decode="gpu", **job)
    assert again.kept_rows == again.rows
    with pytest.raises(UsageError, match=r'preprocessing\.decode: "gpu" -> "pil"'):
        packvit.embed(photos, out=tmp_path / "gpu", decode="pil", **job)


def test_a_fixed_size_with_a_crop_gives_the_same_bytes(tmp_path: Path, photos: Path):
    fixed = write_checkpoint(tmp_path / "fixed", native=False)
    for name in ("pil", "gpu"):
        packvit.embed(photos, out=tmp_path / name, model=fixed, device="cuda", decode=name)
    assert parts(tmp_path / "pil") == parts(tmp_path / "gpu")


def test_several_groups_of_pixels_in_flight_give_the_same_bytes(
    tmp_path: Path, encoder: Encoder, photos: Path
):
    embed_with(encoder, photos, tmp_path / "pil", None, token_budget=2048)
    for pixels_at_once in (1, 60_000, 200_000):
        decoder = JpegDecoder(
            encoder.images, encoder.patch_order, encoder.device, pixels_at_once=pixels_at_once
        )
        out = tmp_path / str(pixels_at_once)
        effort = embed_with(encoder, photos, out, decoder.decode, token_budget=2048)
        assert parts(tmp_path / "pil") == parts(out)
        assert effort.on_gpu > 40


def test_a_file_that_the_engine_refuses_is_handed_back_and_its_neighbours_are_right(
    encoder: Encoder,
):
    files = [encode(pixels(90 + 10 * n, 150), "JPEG", subsampling=n % 3) for n in range(5)]
    planned = [plan_jpeg(file, encoder.images) for file in files]
    plans = [plan for plan in planned if isinstance(plan, JpegPlan)]
    assert len(plans) == 5
    decoder = JpegDecoder(encoder.images, encoder.patch_order, encoder.device)
    given = list(files)
    given[1] = b"\xff\xd8\xff" + bytes(len(files[1]) - 3)
    given[3] = bytes(len(files[3]))
    decoded = decoder.decode(given, plans)
    assert decoded.failed == (1, 3)
    found = decoded.patches.cpu().split([plan.patches for plan in plans])
    for place, (file, patches) in enumerate(zip(files, found, strict=True)):
        if place in decoded.failed:
            assert not patches.any()
        else:
            right = to_patches(decode(file).image, encoder.images).patches
            assert np.array_equal(patches.numpy(), right)
    whole = decoder.decode(files, plans)  # it goes on
    assert whole.failed == ()


def test_what_the_engine_refuses_is_pillows_in_the_same_job(
    tmp_path: Path, encoder: Encoder, photos: Path
):
    decoder = JpegDecoder(encoder.images, encoder.patch_order, encoder.device)
    refused = 0

    def spoil(files: Sequence[bytes | np.ndarray], plans: Sequence[JpegPlan]) -> Decoded:
        nonlocal refused
        spoilt = [
            bytes(len(file)) if plan.jpeg.width % 3 == 0 else file
            for file, plan in zip(files, plans, strict=True)
        ]
        decoded = decoder.decode(spoilt, plans)
        refused += len(decoded.failed)
        return decoded

    embed_with(encoder, photos, tmp_path / "pil", None)
    effort = embed_with(encoder, photos, tmp_path / "gpu", spoil)
    assert refused > 5
    assert effort.on_gpu > 10
    assert parts(tmp_path / "pil") == parts(tmp_path / "gpu")


def test_damage_within_a_scan_changes_no_other_row_and_is_the_same_each_time(
    tmp_path: Path, encoder: Encoder
):
    folder = tmp_path / "photos"
    folder.mkdir()
    draw = np.random.default_rng(0)
    damaged = set()
    for number in range(32):
        data = bytearray(encode(pixels(200, 150 + number, number), "JPEG", quality=90))
        if number % 2:
            start = data.index(b"\xff\xda") + 14
            for place in draw.integers(start, len(data) - 2, 3):
                if 1 < data[place] < 0xFE:  # no marker comes or goes
                    data[place] ^= 1
            damaged.add(f"{number:02}.jpg")
        (folder / f"{number:02}.jpg").write_bytes(data)
    decoder = JpegDecoder(encoder.images, encoder.patch_order, encoder.device)
    for name in ("gpu", "again"):
        embed_with(encoder, folder, tmp_path / name, decoder.decode)
    embed_with(encoder, folder, tmp_path / "pil", None)
    assert parts(tmp_path / "gpu") == parts(tmp_path / "again")
    for row, right in zip(read_rows(tmp_path / "gpu"), read_rows(tmp_path / "pil"), strict=True):
        assert row["status"] == "ok"
        if row["id"] in damaged:
            row["pooled"] = right["pooled"]
        assert row == right


def test_a_pack_that_the_gpu_has_no_room_to_decode_is_halved(tmp_path: Path, encoder: Encoder):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(24):
        image = Image.fromarray(pixels(60, 80, number)).resize((3000 + number, 2000))
        (folder / f"{number:02}.jpg").write_bytes(encode(image, "JPEG", quality=80))
    options: dict[str, Any] = {"model": encoder, "max_patches": 64}
    whole = packvit.embed(folder, out=tmp_path / "pil", **options)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    room = torch.cuda.memory_reserved() + 250 * 2**20  # one takes some 28 MiB
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        summary = packvit.embed(folder, out=tmp_path / "gpu", decode="gpu", **options)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert whole.halved == 0 < summary.halved
    assert summary.ok == summary.on_gpu == 24
    for row, right in zip(read_rows(tmp_path / "gpu"), read_rows(tmp_path / "pil"), strict=True):
        assert np.abs(np.subtract(row["pooled"], right["pooled"])).max() <= 0.05  # bfloat16


def test_an_image_that_the_gpu_has_no_room_to_decode_alone_is_a_row(
    tmp_path: Path, encoder: Encoder
):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, size in {"large.jpg": (9000, 8000), "small.jpg": (90, 80)}.items():
        image = Image.new("RGB", size, "teal")
        (folder / name).write_bytes(encode(image, "JPEG"))
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    room = torch.cuda.memory_reserved() + 200 * 2**20  # it takes some 320 MiB
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        summary = packvit.embed(folder, out=tmp_path / "gpu", model=encoder, decode="gpu")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert (summary.ok, summary.errors) == (1, {"out_of_memory": 1})
    assert [row["status"] for row in read_rows(tmp_path / "gpu")] == ["out_of_memory", "ok"]


def test_an_embedder_of_its_own_process_writes_the_same_bytes(
    tmp_path: Path, checkpoint: Path, encoder: Encoder, photos: Path
):
    embed_with(encoder, photos, tmp_path / "pil", None)
    options = EmbedOptions(
        resize="native", max_patches=64, token_budget=200, workers=2, decode="gpu"
    )
    assert encoder.checkpoint
    job = Job(
        folder=str(tmp_path / "gpu"),
        options=options,
        described=describe_job(encoder, encoder.checkpoint.sha256(), options),
        positions="checkpoint",
        model=str(checkpoint),
    )
    (tmp_path / "gpu").mkdir()
    inputs = list(list_inputs([str(photos)]))
    shards = [
        Shard(number, tuple(inputs[start : start + 25]))
        for number, start in enumerate(range(0, len(inputs), 25))
    ]
    effort = Effort()
    work = Work(shards, len(shards), tmp_path / "gpu", -1, lambda rows: None, effort)
    pool = Pool([start()])
    pool.load(ModelChoice(model=checkpoint), options, ["cuda:0"])
    pool.give(job)
    list(run_processes(pool, work))
    assert parts(tmp_path / "pil") == parts(tmp_path / "gpu")
    assert effort.on_gpu > 40
