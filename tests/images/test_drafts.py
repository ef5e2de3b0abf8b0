"""`decode="fast"`: the rows of whole decoding, and pixels near it, of far too large JPEGs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from jpegs import write_mixed
from PIL import Image
from rotten import encode, exif, pixels

from packvit.config import Exact, ImageConfig
from packvit.corpus.decode.prepare import Prepared, Preprocessing, prepare
from packvit.corpus.inputs.find import list_inputs
from packvit.images.decode import decode, decode_opened, open_image
from packvit.images.drafts import MARGIN, SCALES, draft
from packvit.images.errors import ImageError
from packvit.images.patches import Cutting

HALF = (0.5, 0.5, 0.5)
IMAGES = ImageConfig(patch=2, mean=HALF, std=HALF, resample="bicubic", sizing=Exact(4, 4))
CUTTING = Cutting(IMAGES, "hwc", None, None)


def both(folder: Path) -> list[tuple[Prepared, Prepared]]:
    """Return all inputs of a folder prepared whole and as drafts, by what a worker runs."""
    exact = Preprocessing(IMAGES, "hwc", None, None, 100_000_000)
    fast = replace(exact, decode="fast")
    return [
        (prepare(source, exact, lambda pixels: None), prepare(source, fast, lambda pixels: None))
        for source in list_inputs([str(folder)])
    ]


def test_rows_are_those_of_whole_decoding_and_other_formats_keep_their_bits(tmp_path: Path):
    """Broken files of all kinds, odd ones, turned ones, grey, CMYK, progressive, cut anywhere."""
    write_mixed(tmp_path)
    image = Image.fromarray(pixels(150, 203))
    whole = {
        "baseline": encode(image, "JPEG", exif=exif(6)),
        "progressive": encode(image, "JPEG", progressive=True),
        "cmyk": encode(image.convert("CMYK"), "JPEG"),
        "grey": encode(image.convert("L"), "JPEG"),
    }
    for name, data in whole.items():
        for percent in (10, 30, 50, 70, 90, 99, 100):
            (tmp_path / f"{name}-{percent}.jpg").write_bytes(data[: len(data) * percent // 100])
        damaged = bytearray(data)
        damaged[len(data) // 2 : len(data) // 2 + 40] = bytes(range(40))
        (tmp_path / f"{name}-damaged.jpg").write_bytes(damaged)
    drafted = 0
    for exact, fast in both(tmp_path):
        assert fast.row == exact.row
        if exact.patches is None or fast.patches is None:
            assert exact.row.status != "ok"
            continue
        jpeg = exact.row.id.lower().endswith("jpg")
        larger = min(exact.row.width or 0, exact.row.height or 0) / 4
        if not jpeg or larger < 2 * MARGIN:
            assert np.array_equal(fast.patches, exact.patches), exact.row.id
            continue
        drafted += not np.array_equal(fast.patches, exact.patches)
        gap = np.abs(fast.patches.astype(int) - exact.patches).mean()
        assert gap < 20, exact.row.id  # of slopes that go over the edge of 8 bits
    assert drafted > 40


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("turn", range(1, 9))
def test_a_draft_shows_what_the_photograph_shows_where_it_shows_it(scale: int, turn: int):
    """One column more than a multiple of the scale: a draft gives it a whole column."""
    height, width = 8 * MARGIN * scale + 1, 8 * MARGIN * scale + scale + 1
    rows, columns = np.mgrid[0:height, 0:width]
    ramps = np.stack([rows * 255 / height, columns * 255 / width, 0 * rows], 2).astype(np.uint8)
    file = encode(ramps, "JPEG", quality=100, subsampling=0, exif=exif(turn))
    images = replace(IMAGES, sizing=Exact(8, 8))
    cutting = Cutting(images, "hwc", None, None)
    opened = open_image(file)
    whole = draft(opened, cutting)
    assert whole
    assert max(opened.image.size) == width // scale + 1
    exact, fast = decode(file).image, decode_opened(opened).image
    assert (whole.height, whole.width) == (exact.height, exact.width)
    found = cutting.cut(fast, whole).patches.astype(int)
    assert np.abs(found - cutting.cut(exact).patches).max() <= 3  # 8 to 13 without the box


def test_a_draft_is_the_smallest_that_leaves_the_margin():
    for larger in (1, 2 * MARGIN - 0.25, 2 * MARGIN, 4 * MARGIN, 7.5 * MARGIN, 8 * MARGIN, 99):
        side = int(4 * larger)
        opened = open_image(encode(pixels(side, side + 40), "JPEG"))
        draft(opened, CUTTING)
        expected = max(scale for scale in (1, *SCALES) if side >= 4 * MARGIN * scale or scale == 1)
        assert opened.image.size == (-(-(side + 40) // expected), -(-side // expected))


def test_an_image_that_cannot_be_resized_is_decoded_whole_and_refused_after():
    native = Cutting(replace(IMAGES, sizing=None), "hwc", "native", 1)
    narrow = Cutting(replace(IMAGES, sizing=Exact(40_000, 40_000)), "hwc", None, None)
    for cutting in (native, narrow):
        opened = open_image(encode(pixels(1, 5000), "JPEG"))
        assert draft(opened, cutting) is None
        assert opened.image.size == (5000, 1)
    with pytest.raises(ImageError, match="once resized"):
        narrow.cut(decode_opened(opened).image)
