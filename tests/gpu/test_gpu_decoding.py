"""JPEGs decoded on the GPU are bit for bit what Pillow makes of them, or they are refused."""

import io
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from jpeg_planes import upright_rgb
from PIL import Image

from demo.photographs import photographs
from packvit.config import Exact, Filter, ImageConfig, PatchOrder, ShortestEdge
from packvit.gpu.decoder import JpegDecoder, check_pillow, groups, lay_out, planes_to_patches
from packvit.gpu.jpeg import SAMPLINGS, Jpeg, JpegPlan, Refusal, Sampling, plan_jpeg, read_jpeg
from packvit.gpu.nvjpeg import NvJpeg, places
from packvit.gpu.reference import resize
from packvit.gpu.resampling import FILTERS
from packvit.images.decode import decode
from packvit.images.patches import cut_patches, to_patches
from packvit.images.resize import SizePlan, resize_plan

FILTER_NAMES: list[Filter] = ["box", "bilinear", "hamming", "bicubic", "lanczos"]
TURNS = [None, *Image.Transpose]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def photo(seed: int, height: int, width: int) -> Image.Image:
    """Noise over a gradient: hard edges, soft slopes and saturated corners."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(0, 255, height)[:, None, None] * np.linspace(0, 1, width)[None, :, None]
    noise = rng.integers(-60, 60, (height, width, 3))
    pixels = np.clip(slope + noise, 0, 255).astype(np.uint8)
    pixels[: height // 3, : width // 3] = rng.choice([0, 255], 3)
    return Image.fromarray(pixels)


def jpeg(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def config(**changes: Any) -> ImageConfig:
    half = (0.5, 0.5, 0.5)
    return ImageConfig(**{"patch": 14, "mean": half, "std": half, "resample": "bicubic"} | changes)


def read(data: bytes) -> Jpeg:
    found = read_jpeg(data)
    assert isinstance(found, Jpeg), found
    return found


@pytest.mark.parametrize("resample", FILTER_NAMES)
def test_resizing_is_pillows_to_the_last_bit(resample: Filter):
    assert resample in FILTERS
    rng = np.random.default_rng(1)
    for trial in range(60):
        height, width, after_height, after_width = (int(n) for n in rng.integers(1, 160, 4))
        if trial % 5 == 0:
            after_width = width  # a pass that is left out
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        if trial % 2:
            pixels = np.where(pixels > 127, 255, 0).astype(np.uint8)  # overshoots are clipped
        size = (after_width, after_height)
        theirs = Image.fromarray(pixels).resize(size, Image.Resampling[resample.upper()])
        ours = resize(pixels, SizePlan(after_height, after_width, None, 1, 1), resample)
        assert np.array_equal(ours, np.asarray(theirs)), (height, width, size)


def test_the_installed_pillow_resizes_as_we_do():
    check_pillow()


def planes_of(data: bytes) -> list[np.ndarray]:
    """The planes of a 4:2:0, 4:4:4 or grey JPEG by Pillow; half-size chroma needs no filter."""
    found = read(data)
    full = Image.open(io.BytesIO(data))
    if found.sampling is None:
        return [np.asarray(full)]
    full.draft("YCbCr", full.size)
    luma, *chroma = np.moveaxis(np.asarray(full), 2, 0)
    if found.sampling == (2, 2):
        half = Image.open(io.BytesIO(data))
        half.draft("YCbCr", (full.width // 2, full.height // 2))
        _, *chroma = np.moveaxis(np.asarray(half), 2, 0)
    assert all(plane.shape == found.chroma for plane in chroma)
    return [luma, *chroma]


@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2}, {}])
def test_planes_become_pillows_pixels(options: dict[str, int]):
    images = [Image.open(path).convert("RGB") for path in photographs()[:3]]
    images += [photo(seed, 40 + seed, 33 + seed // 2) for seed in range(4)]
    for image in images:
        image = image if options else image.convert("L")
        for orientation in (1, 6, 7) if image.width < 99 else (1,):
            exif = Image.Exif()
            exif[0x0112] = orientation
            data = jpeg(image, quality=90, exif=exif, **options)
            theirs = np.asarray(decode(data).image)
            assert np.array_equal(upright_rgb(planes_of(data), read(data)), theirs)


@pytest.mark.parametrize("down", [8, 16])
def test_chroma_that_is_halved_across_becomes_pillows_pixels(down: int):
    """Chroma of one value a block is known without decoding: it shows in the block's middle."""
    rng = np.random.default_rng(2)
    blocks = rng.integers(64, 192, (3, 5, 3), dtype=np.uint8)
    blocks[..., 0] = 128
    pixels = blocks.repeat(down, 0).repeat(16, 1)[:, :-3]
    image = Image.fromarray(pixels, "YCbCr").convert("RGB")
    data = jpeg(image, quality=95, subsampling=1 if down == 8 else 2)
    found = read(data)
    assert found.sampling == (2, down // 8)
    whole = Image.open(io.BytesIO(data))
    whole.draft("YCbCr", whole.size)
    values = np.asarray(whole)
    rows, columns = np.arange(found.chroma[0]) // 8, np.arange(found.chroma[1]) // 8
    planes = [values[..., 0]]
    planes += [values[down // 2 :: down, 8::16, c][rows][:, columns] for c in (1, 2)]
    theirs = np.asarray(decode(data).image)
    assert np.array_equal(upright_rgb(planes, found), theirs)


def invented(seed: int, sampling: Sampling | None, turn: Image.Transpose | None) -> Jpeg:
    rng = np.random.default_rng(seed)
    height, width = (int(side) for side in rng.integers(20, 75, 2))
    return Jpeg(height, width, sampling, turn, 0)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("order", ["hwc", "chw"])
def test_kernels_agree_with_the_reference_on_a_gpu(order: PatchOrder):
    check_kernels(order)


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton, and TRITON_INTERPRET=1")
@pytest.mark.parametrize("order", ["hwc", "chw"])
def test_kernels_agree_with_the_reference_in_the_interpreter(order: PatchOrder):
    check_kernels(order)


def check_kernels(order: PatchOrder) -> None:
    """All samplings, turns, filters and both orders of passes, many images a launch."""
    rng = np.random.default_rng(3)
    for number, sizing in enumerate(
        (None, Exact(28, 42), Exact(60, 19), ShortestEdge(32, (28, 30)), Exact(9, 64))
    ):
        images = config(patch=7, sizing=sizing, resample=FILTER_NAMES[number])
        jpegs = [
            invented(
                seed, (*SAMPLINGS, (1, 2), None)[seed % 5], TURNS[(seed + number) % len(TURNS)]
            )
            for seed in range(8)
        ]
        plans = [JpegPlan(found, resize_plan(*found.upright, images)) for found in jpegs]
        layout, size = lay_out(plans)
        memory = rng.integers(0, 256, size, dtype=np.uint8)
        expected = []
        for plan, where in zip(plans, layout, strict=True):
            found = plan.jpeg
            shapes = [(found.height, found.width), found.chroma, found.chroma]
            planes = [
                memory[start : start + rows * pitch].reshape(rows, pitch)[:, :columns]
                for (start, pitch), (rows, columns) in zip(where, shapes, strict=False)
            ]
            pixels = resize(upright_rgb(planes, found), plan.size, images.resample)
            expected.append(cut_patches(pixels, images.patch, order))
        whole = np.concatenate(expected)
        out = torch.empty(whole.shape, dtype=torch.uint8, device=DEVICE)
        held = torch.from_numpy(memory).to(DEVICE)
        planes_to_patches(held, layout, plans, images, order, out)
        assert np.array_equal(out.cpu().numpy(), whole)


def test_a_plan_says_what_the_host_would_make():
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = jpeg(photo(5, 150, 97), exif=exif)
        plan = plan_jpeg(data, config())
        assert isinstance(plan, JpegPlan)
        image = decode(data).image
        cut = to_patches(image, config())
        assert plan.jpeg.upright == (image.height, image.width)
        assert (plan.size.rows, plan.size.columns) == (cut.rows, cut.columns)
        assert plan.patches == len(cut.patches)


def refusal(data: bytes, **options: Any) -> str | None:
    found = plan_jpeg(data, config(), **options)
    return found.reason if isinstance(found, Refusal) else None


def test_all_that_would_not_be_exact_is_refused():
    image = photo(6, 64, 80)
    data = jpeg(image)
    assert refusal(data) is None
    png = io.BytesIO()
    image.save(png, "PNG")
    assert refusal(png.getvalue()) == "not a JPEG"
    assert refusal(b"") == "not a JPEG"
    assert refusal(jpeg(image, progressive=True)) == "not baseline"
    assert refusal(jpeg(image.convert("CMYK"))) == "colours other than YCbCr or grey"
    assert refusal(jpeg(image, keep_rgb=True)) == "colours other than YCbCr or grey"
    assert refusal(jpeg(photo(7, 64, 4))) == "too narrow"
    assert refusal(jpeg(image, exif=b"Exif\0\0nonsense")) == "EXIF unreadable"
    assert refusal(data, max_pixels=99) == "refused by its header"
    frames = io.BytesIO()
    image.save(frames, "MPO", save_all=True, append_images=[image])
    assert refusal(frames.getvalue()) == "several frames"
    frame = data.index(b"\xff\xc0")
    for offset, value, reason in (
        (1, 0xC9, "not baseline"),  # arithmetic
        (4, 12, "not 8 bits"),
        (11, 0x41, "uncommon subsampling"),
        (11, 0x12, "uncommon subsampling"),
        (10, 7, "uncommon structure"),  # a component that the scan does not name
    ):
        changed = bytearray(data)
        changed[frame + offset] = value
        assert refusal(bytes(changed)) == reason
    assert isinstance(plan_jpeg(data, config(resample="nearest")), Refusal)


def test_a_cut_file_never_passes_for_whole():
    data = jpeg(photo(8, 90, 70), quality=80)
    for end in range(len(data)):
        assert refusal(data[:end]) is not None, end
    assert refusal(data + b"behind the end") is None  # Pillow does not look there either


def test_a_missing_restart_marker_is_noticed():
    data = jpeg(photo(9, 90, 170), restart_marker_blocks=3)
    assert refusal(data) is None
    place = data.index(b"\xff\xd2")
    assert refusal(data[:place] + data[place + 2 :]) == "restart markers missing"
    end = data.index(b"\xff\xd7")
    assert refusal(data[:end] + b"\xff\xd9") == "restart markers missing"


def test_the_hosts_half_never_imports_torch():
    words = "import sys, packvit.gpu.jpeg; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", words], check=False).returncode == 0


def test_groups_hold_at_most_so_many_pixels_and_leave_none_out():
    def one(side: int) -> JpegPlan:
        return JpegPlan(Jpeg(side, side, None, None, 0), SizePlan(14, 14, None, 1, 1))

    huge, large = one(20_000), one(10_000)
    assert list(groups([])) == []
    assert list(groups([large, huge, large, large, one(9)])) == [(0, 1), (1, 2), (2, 3), (3, 5)]
    assert list(groups([one(9)] * 5, 2 * 81)) == [(0, 2), (2, 4), (4, 5)]


def test_what_is_missing_is_said_in_one_sentence():
    with pytest.raises(RuntimeError, match=r"needs a CUDA device, but the encoder is on cpu\."):
        JpegDecoder(config(), "hwc", torch.device("cpu"))
    if find_spec("triton") is None:
        with pytest.raises(ImportError, match="Install: pip install triton"):
            JpegDecoder(config(), "hwc", torch.device("cuda"))
    if not list(places()):
        with pytest.raises(ImportError, match=r"Install: pip install 'packvit\[gpu-decode\]'"):
            NvJpeg()


def test_options_that_contradict_each_other_are_a_mistake_not_a_refusal():
    with pytest.raises(ValueError, match="max_patches is 9"):
        plan_jpeg(jpeg(photo(1, 40, 40)), config(sizing=Exact(28, 28)), max_patches=9)


def files_of_all_kinds() -> list[bytes]:
    """Real photographs and noise: qualities, subsamplings, turns, odd sizes, restart markers."""
    images = [Image.open(path).convert("RGB") for path in photographs()]
    images += [photo(seed, 61 + 37 * seed, 45 + 50 * seed) for seed in range(4)]
    files = []
    for number, image in enumerate(images):
        height, width = image.height - number % 3, image.width - number % 2
        image = image.crop((0, 0, width, height))
        for place, quality in enumerate((20, 75, 95)):
            exif = Image.Exif()
            exif[0x0112] = (number + place) % 8 + 1
            for subsampling in (0, 1, 2):
                options: dict[str, Any] = {"restart_marker_rows": 1} if number % 4 == 0 else {}
                options |= {"quality": quality, "subsampling": subsampling}
                files.append(jpeg(image, exif=exif, **options))
            files.append(jpeg(image.convert("L"), quality=quality, exif=exif))
    return files


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("sizing", [None, Exact(224, 224), ShortestEdge(256, (224, 224))])
def test_patches_from_the_gpu_are_pillows_to_the_last_bit(sizing: Any):
    images = config(sizing=sizing)
    files = files_of_all_kinds()
    plans = [plan for file in files if isinstance(plan := plan_jpeg(file, images), JpegPlan)]
    assert len(plans) == len(files)
    decoded = JpegDecoder(images, "hwc", torch.device("cuda")).decode(files, plans)
    assert decoded.failed == ()
    found = decoded.patches.cpu().split([plan.patches for plan in plans])
    for place, (file, ours) in enumerate(zip(files, found, strict=True)):
        theirs = to_patches(decode(file).image, images).patches
        assert np.array_equal(ours.numpy(), theirs), (place, plans[place])
