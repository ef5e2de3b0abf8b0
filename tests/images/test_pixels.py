import struct
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from rotten import encode, pixels, png, tiff

from packvit.images.decode import Photo, decode, load_image


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Blend exactly, then round to the nearest."""
    share = alpha[..., None].astype(np.int64)
    total = colours.astype(np.int64) * share + 255 * (255 - share)
    return ((2 * total + 255) // 510).astype(np.uint8)


def found(photo: Photo) -> np.ndarray:
    return np.asarray(photo.image)


def every_colour_and_alpha() -> tuple[np.ndarray, np.ndarray]:
    values, alpha = np.mgrid[0:256, 0:256].astype(np.uint8)
    return np.stack([values, 255 - values, values ^ 77], axis=2), alpha


def test_alpha_is_blended_exactly_with_white_and_hidden_colours_stay_hidden():
    colours, alpha = every_colour_and_alpha()
    expected = on_white(colours, alpha)
    photo = decode(encode(Image.fromarray(np.dstack([colours, alpha]), "RGBA"), "PNG"))
    assert photo.note == "alpha on white"
    assert np.array_equal(found(photo), expected)
    assert (expected[:, 0] == 255).all()  # under alpha 0
    assert np.array_equal(expected[:, 255], colours[:, 255])


def test_grey_with_alpha_is_blended_the_same():
    colours, alpha = every_colour_and_alpha()
    grey = np.repeat(colours[:, :, :1], 3, axis=2)
    image = Image.fromarray(np.dstack([colours[:, :, 0], alpha]), "LA")
    assert np.array_equal(found(decode(encode(image, "PNG"))), on_white(grey, alpha))
    assert np.array_equal(found(decode(encode(image, "TIFF"))), on_white(grey, alpha))


@pytest.mark.parametrize("mode", ["RGBa", "La"])
def test_premultiplied_alpha_is_blended_to_within_its_own_rounding(mode: str):
    colours, alpha = every_colour_and_alpha()
    straight = Image.fromarray(np.dstack([colours, alpha]), "RGBA")
    straight = straight if mode == "RGBa" else straight.convert("LA")
    photo = load_image(straight.convert(mode))
    expected = found(load_image(straight)).astype(int)
    assert photo.note == "alpha on white"
    assert np.abs(found(photo) - expected).max() <= 1
    assert (found(photo)[alpha == 0] == 255).all()


def test_palettes_with_alpha_are_blended_entry_by_entry():
    palette = Image.fromarray(pixels(20, 30)).quantize(16)
    alpha = np.arange(0, 256, 16, dtype=np.uint8)
    indices, table = np.asarray(palette), np.array(palette.getpalette("RGB")).reshape(-1, 3)
    expected = on_white(table[indices].astype(np.uint8), alpha[indices])
    assert np.array_equal(
        found(decode(encode(palette, "PNG", transparency=alpha.tobytes()))), expected
    )
    with_alpha = Image.merge("PA", (palette, Image.fromarray(alpha[indices])))
    with_alpha.putpalette(table.ravel().tolist())
    assert np.array_equal(found(load_image(with_alpha)), expected)


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_the_transparent_entry_of_a_palette_becomes_white(kind: str):
    palette = Image.fromarray(pixels(20, 30)).quantize(16)
    indices, table = np.asarray(palette), np.array(palette.getpalette("RGB")).reshape(-1, 3)
    expected = table[indices].astype(np.uint8)
    assert (indices == 5).any()
    expected[indices == 5] = 255
    photo = decode(encode(palette, kind, transparency=5))
    assert photo.note == "alpha on white"
    assert np.array_equal(found(photo), expected)


@pytest.mark.parametrize(
    ("depth", "colour", "row", "key", "expected"),
    [
        (8, 2, bytes([9, 8, 7, 9, 8, 6]), (9, 8, 7), [[255, 255, 255], [9, 8, 6]]),
        (8, 0, bytes([40, 41]), (40,), [[255] * 3, [41] * 3]),
        (4, 0, bytes([0x7A]), (7,), [[255] * 3, [170] * 3]),
        (2, 0, bytes([0b01100000]), (1,), [[255] * 3, [170] * 3]),
        (1, 0, bytes([0b01000000]), (0,), [[255] * 3, [255] * 3]),
        (1, 0, bytes([0b01000000]), (1,), [[0] * 3, [255] * 3]),
        (16, 0, struct.pack(">2H", 257 * 40, 257 * 40 + 1), (257 * 40,), [[255] * 3, [40] * 3]),
        (16, 2, struct.pack(">6H", 256, 512, 768, 0, 512, 768), (256, 512, 768),
         [[255] * 3, [0, 2, 3]]),
    ],
    ids=["rgb8", "grey8", "grey4", "grey2", "black", "white", "grey16", "rgb16"],
)  # fmt: skip
def test_a_transparent_colour_becomes_white_at_every_depth(
    depth: int, colour: int, row: bytes, key: tuple[int, ...], expected: list[list[int]]
):
    chunk = (b"tRNS", struct.pack(f">{len(key)}H", *key))
    photo = decode(png(2, 1, depth, colour, b"\0" + row, chunk))
    assert found(photo).tolist() == [expected]
    assert photo.note is not None
    assert photo.note.endswith("alpha on white")


def test_16_bit_greys_of_either_byte_order_are_rescaled_not_clipped():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.repeat(np.rint(values / 257).astype(np.uint8)[:, :, None], 3, axis=2)
    big = Image.frombytes("I;16B", (256, 256), values.astype(">u2").tobytes())
    little = Image.frombytes("I;16", (256, 256), values.astype("<u2").tobytes())
    files = [encode(little, "PNG"), encode(little, "TIFF"), encode(big, "TIFF")]
    files += [encode(little, "TIFF", compression="tiff_lzw")]
    photos = [decode(file) for file in files] + [load_image(big), load_image(little)]
    assert {photo.note for photo in photos} == {"16-bit grey rescaled"}
    assert all(np.array_equal(found(photo), expected) for photo in photos)


def test_12_bit_greys_reach_white_and_a_16_bit_zero_may_mean_white():
    values = np.arange(4096).reshape(64, 64)
    photo = decode(tiff(values, 12))
    assert photo.note == "12-bit grey rescaled"
    assert np.array_equal(found(photo)[:, :, 0], np.rint(values / 4095 * 255))
    wide = values * 16
    inverted = found(decode(tiff(wide, 16, white_is_zero=True)))
    assert np.array_equal(inverted[:, :, 1], 255 - np.rint(wide / 257))


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB", "HSV"])
def test_other_colour_spaces_are_converted_as_pillow_does_and_noted(mode: str):
    raw = pixels(40, 30).tobytes()[: 600 * len(Image.new(mode, (1, 1)).getbands())]
    image = Image.frombytes(mode, (30, 20), raw)
    photos = [load_image(image)]
    if mode != "HSV":  # which no file holds
        photos.append(decode(encode(image, "TIFF")))
    assert {photo.note for photo in photos} == {f"converted from {mode}"}
    assert all(np.array_equal(found(photo), np.asarray(image.convert("RGB"))) for photo in photos)


def test_a_jpeg_for_print_is_converted_as_pillow_does():
    data = encode(Image.fromarray(pixels(20, 30)).convert("CMYK"), "JPEG")
    photo = decode(data)
    assert photo.note == "converted from CMYK"
    assert np.array_equal(found(photo), np.asarray(Image.open(BytesIO(data)).convert("RGB")))


def test_an_alpha_that_hides_nothing_is_dropped_without_a_note():
    photo = decode(encode(Image.fromarray(pixels(20, 30)).convert("RGBA"), "PNG"))
    assert photo.note is None
    assert np.array_equal(found(photo), pixels(20, 30))


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGB", "RGBX"])
def test_plain_modes_are_converted_without_a_note(mode: str):
    image = Image.fromarray(pixels(20, 30)).convert(mode)
    photo = load_image(image)
    assert (photo.note, photo.image.mode) == (None, "RGB")
    assert np.array_equal(found(photo), np.asarray(image.convert("RGB")))
