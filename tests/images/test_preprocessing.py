from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
import sklearn.datasets
import torch
from PIL import Image
from rotten import pixels
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from packvit.checkpoints.image_settings import image_config_from
from packvit.checkpoints.processors import FILTERS
from packvit.config import Exact, Filter, ImageConfig, MostPatches, PatchOrder, ShortestEdge, Sizing
from packvit.images.decode import load_image
from packvit.images.patches import cut_patches, to_patches

HALF = (0.5, 0.5, 0.5)
RAW: dict[str, Any] = {"do_rescale": False, "do_normalize": False}
SKIMAGE = Path(skimage.__file__).parent / "data"
SKLEARN = Path(sklearn.datasets.__file__).parent / "images"
PHOTOGRAPHS = [SKIMAGE / name for name in ("astronaut.png", "chelsea.png", "coffee.png")]
PHOTOGRAPHS += [SKIMAGE / "rocket.jpg", SKLEARN / "china.jpg", SKLEARN / "flower.jpg"]


def config(sizing: Sizing | None, patch: int = 14, resample: Filter = "bicubic") -> ImageConfig:
    return ImageConfig(patch, HALF, HALF, resample, sizing)


def images() -> list[Image.Image]:
    """Return photographs, and noise of all shapes, none of them square."""
    draw = np.random.default_rng(7)
    sizes = [(1, 90), (90, 1), (13, 200), *(tuple(draw.integers(5, 400, 2)) for _ in range(12))]
    noise = [
        Image.fromarray(pixels(*map(int, size), seed=index)) for index, size in enumerate(sizes)
    ]
    return [load_image(path).image for path in PHOTOGRAPHS] + noise


def unfold(pixel_values: torch.Tensor, patch: int) -> np.ndarray:
    """Cut [3, height, width] as a convolution would: [T, P], each patch channel first."""
    values = pixel_values.double()[None]
    return torch.nn.functional.unfold(values, patch, stride=patch)[0].T.numpy()


def assert_same(processor: Any, wanted: ImageConfig) -> None:
    for image in images():
        theirs = processor(image, return_tensors="pt")["pixel_values"][0]
        ours = to_patches(image, wanted, patch_order="chw")
        side = wanted.patch
        assert (ours.rows, ours.columns) == (theirs.shape[1] // side, theirs.shape[2] // side)
        assert np.array_equal(ours.patches, unfold(theirs, side))


@pytest.mark.parametrize("number", FILTERS)
def test_shortest_edge_and_crop_are_clips_pixel_for_pixel(number: int):
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 59}, crop_size={"height": 42, "width": 56}, resample=number, **RAW
    )
    assert_same(processor, config(ShortestEdge(59, (42, 56)), resample=FILTERS[number]))


def test_dinov2s_preprocessing_is_pixel_for_pixel_its_references():
    processor = BitImageProcessorPil(size={"shortest_edge": 256}, **RAW)
    assert_same(processor, config(ShortestEdge(256, (224, 224))))


def test_siglips_fixed_size_is_pixel_for_pixel_its_references_remainder_and_all():
    processor = SiglipImageProcessorPil(size={"height": 384, "width": 384}, **RAW)
    assert_same(processor, config(Exact(384, 384)))
    assert to_patches(images()[0], config(Exact(384, 384))).patches.shape == (27 * 27, 588)


def test_aimv2_natives_own_preprocessing_keeps_pixels_and_drops_remainders():
    processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False, **RAW)
    for image in images():
        if min(image.size) < 14:
            continue
        theirs = processor(image, return_tensors="pt")["pixel_values"][0]
        ours = to_patches(image, config(None), resize="checkpoint", patch_order="chw")
        assert np.array_equal(ours.patches, unfold(theirs, 14))


@pytest.mark.parametrize("most", [1, 64, 256, 1000])
def test_naflex_patches_are_its_references_value_for_value(most: int):
    processor = Siglip2ImageProcessorPil(max_num_patches=most)
    raw = Siglip2ImageProcessorPil(max_num_patches=most, **RAW)
    for image in images():
        ours = to_patches(image, config(MostPatches(most), 16, "bilinear"))
        theirs = raw(image, return_tensors="np")
        assert theirs["spatial_shapes"].tolist() == [[ours.rows, ours.columns]]
        assert np.array_equal(ours.patches, theirs["pixel_values"][0][: len(ours.patches)])
        normalised = processor(image, return_tensors="np")["pixel_values"][0][: len(ours.patches)]
        np.testing.assert_allclose(ours.patches / 127.5 - 1, normalised, atol=1e-6)


def test_native_patches_are_the_whole_image_resized():
    for image in images():
        ours = to_patches(image, config(None), max_patches=100)
        whole = image.resize((ours.columns * 14, ours.rows * 14), Image.Resampling.BICUBIC)
        assert len(ours.patches) <= 100
        assert np.array_equal(ours.patches, cut_patches(np.asarray(whole), 14))


def test_patches_read_in_raster_order_in_either_order_of_values():
    photo = pixels(3 * 4 + 3, 5 * 4 + 1)
    orders: dict[PatchOrder, tuple[int, int, int]] = {"hwc": (0, 1, 2), "chw": (2, 0, 1)}
    for order, axes in orders.items():
        found = cut_patches(photo, 4, order)
        expected = [
            photo[4 * row : 4 * row + 4, 4 * column : 4 * column + 4].transpose(axes).ravel()
            for row in range(3)
            for column in range(5)
        ]
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("size", [(14, 14), (14, 70), (70, 14), (28, 42)])
def test_patches_are_contiguous_writable_and_nobody_elses(size: tuple[int, int]):
    photo = pixels(*size)
    orders: tuple[PatchOrder, ...] = ("hwc", "chw")
    for order in orders:
        patches = cut_patches(photo, 14, order)
        assert patches.flags.c_contiguous
        assert patches.flags.writeable
        assert not np.shares_memory(patches, photo)
    assert to_patches(Image.fromarray(photo), config(None)).patches.flags.writeable


def test_pixels_that_are_not_raw_rgb_are_refused_in_words():
    with pytest.raises(ValueError, match=r"pixels are float32 \[28, 28, 3\], but must be uint8"):
        cut_patches(np.zeros((28, 28, 3), np.float32), 14)
    with pytest.raises(ValueError, match=r"uint8 \[3, 28, 28\], but must be uint8 \[height"):
        cut_patches(np.zeros((3, 28, 28), np.uint8), 14)
    with pytest.raises(ValueError, match=r"mode L, not RGB\. Pass it through load_image"):
        to_patches(Image.new("L", (28, 28)), config(None))


CLIP = {
    "crop_size": 224,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 224,
}
CROP = {"crop_size": {"height": 224, "width": 224}, "do_center_crop": True, "do_resize": True}
FIXED = ShortestEdge(100, (98, 98))


@pytest.mark.parametrize(
    ("preprocessor", "default", "expected"),
    [
        (CLIP, None, ShortestEdge(224, (224, 224))),
        (CROP | {"size": {"shortest_edge": 256}}, None, ShortestEdge(256, (224, 224))),
        (CROP | {"size": {"shortest_edge": 256, "longest_edge": None}, "do_center_crop": False},
         FIXED, ShortestEdge(256)),
        (CROP | {"size": {"height": 256, "width": 240}}, None, Exact(256, 240, (224, 224))),
        ({"do_resize": True, "size": {"height": 384, "width": 384}}, FIXED, Exact(384, 384)),
        ({"do_resize": False, "do_center_crop": False, "size": 224}, FIXED, None),
        ({"do_resize": True, "do_center_crop": None, "crop_size": None, "size": 300}, None,
         ShortestEdge(300)),
        ({"do_resize": True, "size": 300}, FIXED, ShortestEdge(300, (98, 98))),
        ({"do_center_crop": False}, FIXED, ShortestEdge(100)),
        ({"resample": 2}, FIXED, FIXED),
        ({}, None, None),
        ({}, MostPatches(81), MostPatches(81)),
        ({"do_resize": True, "max_num_patches": 729, "patch_size": 14}, None, MostPatches(729)),
        ({"image_processor_type": "Siglip2ImageProcessor"}, MostPatches(81), MostPatches(256)),
        ({"image_processor_type": "Siglip2ImageProcessorFast"}, FIXED, MostPatches(256)),
    ],
)  # fmt: skip
def test_the_size_is_read_from_every_published_spelling(
    preprocessor: dict[str, Any], default: Sizing | None, expected: Sizing | None
):
    assert image_config_from(preprocessor, config(default)).sizing == expected


def test_statistics_and_filter_are_read_and_what_is_left_out_is_the_default():
    default = config(FIXED, resample="lanczos")
    assert image_config_from(None, default) == default
    read = image_config_from(CLIP | {"rescale_factor": 0.00392156862745098}, default)
    assert read.mean == (0.48145466, 0.4578275, 0.40821073)
    assert read.std == (0.26862954, 0.26130258, 0.27577711)
    assert (read.patch, read.resample) == (14, "bicubic")
    assert image_config_from({"image_mean": None}, default) == default


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"do_normalize": False}, "do_normalize False, but our encoders always"),
        ({"do_rescale": False}, "do_rescale False, but our encoders always"),
        ({"rescale_factor": 1 / 127.5}, r"rescale_factor 0\.0078.*, but our encoders scale"),
        ({"patch_size": 16}, "patch_size 16, but the model's patches are 14 pixels"),
        ({"image_mean": [0.5]}, r"image_mean \[0\.5\], but RGB has 3 channels"),
        ({"resample": 9}, r"resample 9, but Pillow's filters are 0 \(nearest\), 1 \(lanczos\)"),
        ({"do_resize": False}, "do_center_crop without do_resize"),
        ({"size": {"longest_edge": 384}}, r"size \{'longest_edge': 384\}, but only a number"),
        ({"crop_size": {"shortest_edge": 3}}, r"crop_size \{'shortest_edge': 3\}\. Give a number"),
    ],
)
def test_preprocessing_that_we_could_only_imitate_wrongly_is_refused(
    wrong: dict[str, Any], words: str
):
    with pytest.raises(ValueError, match=words):
        image_config_from(CLIP | wrong, config(FIXED))


def test_a_resize_without_any_size_is_refused():
    with pytest.raises(ValueError, match=r"do_resize, but no size\. Add a size"):
        image_config_from({"do_resize": True}, config(None))
