"""Kinds of images that were read wrongly, or called what they are not: rows of the cases."""

import io
import itertools
import struct
import zlib
from importlib.util import find_spec

import numpy as np
import pytest
import tifffile
from heic import TURNED
from PIL import Image, PngImagePlugin
from rotten import encode, exif, pixels, png

from packvit.images import decode as images
from packvit.images.decode import decode, load_image, open_image
from packvit.images.errors import ImageError

MIB = 1_100_000
COUNTED = ((1, "minisblack", None), (3, "rgb", None), (4, "separated", None), (4, "rgb", [2]))


def outcome(data: bytes) -> tuple[str, str | None]:
    try:
        return "ok", decode(data).note
    except ImageError as error:
        return error.code, error.note


def tiff(array: np.ndarray, **options) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, array, **options)
    return out.getvalue()


def shown(channels: np.ndarray, photometric: str) -> np.ndarray:
    """Return uint8 channels as RGB on white, in numpy's words."""
    if channels.shape[2] == 1:
        return channels.repeat(3, 2)
    if channels.shape[2] == 3:
        return channels
    if photometric == "separated":
        inverted = 255 - channels.astype(int)
        return (inverted[:, :, :3] * inverted[:, :, 3:] / 255).round().astype(np.uint8)
    alpha = channels[:, :, 3:] / 255
    return (channels[:, :, :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(("channels", "photometric", "extra"), COUNTED)
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_n4_planes_give_the_pixels_that_tifffile_reads(
    bits, channels, photometric, extra, compression
):
    image = np.concatenate([pixels(70, 100), 255 - pixels(70, 100, 1)], 2)[:, :, :channels]
    stored = image.transpose(2, 0, 1).astype(f"u{bits // 8}") * (257 if bits == 16 else 1)
    cuts = [{"rowsperstrip": rows} for rows in (None, 1, 7, 32)] + [{"tile": (32, 48)}]
    for order, cut in itertools.product("<>", cuts):
        data = tiff(
            stored if channels > 1 else stored[0],
            photometric=photometric,
            planarconfig="separate" if channels > 1 else None,
            extrasamples=extra,
            byteorder=order,
            compression=compression,
            **cut,
        )
        read = tifffile.imread(io.BytesIO(data)).reshape(stored.shape).transpose(1, 2, 0)
        expected = shown((read >> (bits - 8)).astype(np.uint8), photometric)
        found = np.asarray(decode(data).image).astype(int)
        assert np.abs(found - expected).max() <= (1 if channels == 4 else 0), (order, cut)
        unloaded = load_image(Image.open(io.BytesIO(data)))
        assert np.array_equal(np.asarray(unloaded.image), found)


@pytest.mark.parametrize("kind", ["L", "I;16", "1", "P"])
@pytest.mark.parametrize("white_is_zero", [False, True])
def test_n4_one_plane_of_its_own_is_the_image(kind: str, white_is_zero: bool):
    grey = Image.fromarray(pixels(20, 30)).convert("L")
    image = grey if kind == "L" else grey.convert({"I;16": "I"}.get(kind, kind)).convert(kind)
    options = {"tiffinfo": {262: 0}} if white_is_zero and kind in "L1" else {}
    whole = encode(image, "TIFF", **options)
    with Image.open(
        io.BytesIO(encode(image, "TIFF", tiffinfo={284: 2, **options.get("tiffinfo", {})}))
    ) as planes:
        assert planes.tag_v2[284] == 2  # pyright: ignore[reportAttributeAccessIssue]
    planes = encode(image, "TIFF", tiffinfo={284: 2, **options.get("tiffinfo", {})})
    assert np.array_equal(np.asarray(decode(planes).image), np.asarray(decode(whole).image))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_n4_planes_that_are_cut_are_truncated(bits: int, compression: str | None):
    data = tiff(
        pixels(70, 100).transpose(2, 0, 1).astype(f"u{bits // 8}"),
        photometric="rgb",
        planarconfig="separate",
        rowsperstrip=16,
        compression=compression,
    )
    for cut in (1, 100, 5000):
        assert outcome(data[:-cut]) == ("truncated", None)


def bmp(masks: tuple[int, int, int, int], alpha: int, header: int = 124) -> bytes:
    """Return a BMP of 32 bits with these masks, whose alpha is the same everywhere."""
    image = pixels(48, 64)[::-1].astype(np.uint32)
    values = np.zeros(image.shape[:2], np.uint32)
    for channel, mask in zip([*image.transpose(2, 0, 1), np.uint32(alpha)], masks, strict=True):
        shift = (mask & -mask).bit_length() - 1 if mask else 0
        values |= (channel << np.uint32(shift)) & np.uint32(mask)
    data = values.astype("<u4").tobytes()
    block = struct.pack("<IiiHHIIiiII", header, 64, 48, 1, 32, 3, len(data), 2835, 2835, 0, 0)
    block = (block + struct.pack("<4I", *masks)).ljust(header, b"\0")
    start = 14 + len(block)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + block + data


MASKS = (
    (0xFF0000, 0xFF00, 0xFF, 0xFF000000),
    (0xFF, 0xFF00, 0xFF0000, 0xFF000000),
    (0xFF000000, 0xFF0000, 0xFF00, 0xFF),
)


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("header", [56, 108, 124])
def test_n5_a_bmp_without_any_alpha_is_opaque_and_one_with_some_is_not(masks, header: int):
    clear = bmp(masks, 0, header)
    assert np.array_equal(np.asarray(decode(clear).image), pixels(48, 64))
    given = load_image(Image.open(io.BytesIO(clear)))
    assert np.array_equal(np.asarray(given.image), pixels(48, 64))
    faint = np.asarray(decode(bmp(masks, 1, header)).image)
    assert faint.min() >= 253  # nearly white


def test_n5_clear_images_of_formats_that_mean_it_stay_clear():
    clear = Image.new("RGBA", (9, 7), (255, 0, 0, 0))
    for kind in ("PNG", "WEBP", "TIFF"):
        assert np.asarray(decode(encode(clear, kind)).image).min() == 255
    assert np.asarray(load_image(clear).image).min() == 255


@pytest.mark.parametrize("progressive", [False, True])
def test_n7_a_jpeg_that_was_cut_and_closed_again_passes_for_whole(progressive: bool):
    """libjpeg fills up what is missing; docs/embedding.md says that this is not detected."""
    whole = encode(pixels(400, 600), "JPEG", progressive=progressive)
    cut = whole[: len(whole) * 3 // 10]
    assert outcome(cut) == ("truncated", None)
    photo = decode(cut + b"\xff\xd9")
    assert (photo.width, photo.height, photo.note) == (600, 400, None)
    assert not np.array_equal(np.asarray(photo.image), np.asarray(decode(whole).image))


def tagged(stream: bytes, compression: int, *more: tuple[int, int]) -> bytes:
    """Return a TIFF of 64 x 64, grey unless `more` says so, whose one strip is `stream`."""
    entries = [(256, 64), (257, 64), (258, 8), (259, compression), (262, 1), (277, 1), (278, 64)]
    entries += [(273, 0), (279, len(stream))]
    tags = sorted((dict(entries) | dict(more)).items())
    start = 8 + 2 + 12 * len(tags) + 4
    places = {273: start, 513: start, 514: len(stream)}
    table = b"".join(struct.pack("<HHII", tag, 4, 1, places.get(tag, value)) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + table + bytes(4) + stream


def test_n7_an_old_jpeg_tiff_that_is_cut_is_truncated():
    data = tagged(encode(pixels(64, 64), "JPEG"), 6, (513, 0), (514, 0), (262, 6), (277, 3))
    assert outcome(data) == ("ok", None)
    for cut in (1, 2, 50, len(data) // 2):
        assert outcome(data[:-cut]) == ("truncated", None)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunks(data: bytes, *chunks: bytes, behind: bool = False) -> bytes:
    """Return a PNG with chunks before its pixels, or behind them."""
    place = len(data) - 12 if behind else 33
    return data[:place] + b"".join(chunks) + data[place:]


LARGE = {
    "zTXt": chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * MIB)),
    "iTXt": chunk(b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(b"y" * MIB)),
    "iCCP": chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(MIB))),
    "tEXt": chunk(b"tEXt", b"a\0" + b"z" * (PngImagePlugin.MAX_TEXT_MEMORY + 1)),
    "many": chunk(b"zTXt", b"b\0\0" + zlib.compress(b"x" * 1_000_000)) * 70,
    "sPLT": chunk(b"sPLT", bytes(2 * MIB)),
    "private": chunk(b"prVt", bytes(2 * MIB)),
    "strange": chunk(b"iCCP", b"profile\0\1" + b"packed in another way"),
}


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("name", LARGE)
def test_w1_a_png_with_much_text_or_a_large_profile_has_its_pixels(name: str, behind: bool):
    data = with_chunks(encode(pixels(48, 64), "PNG"), LARGE[name], behind=behind)
    photo = decode(data)
    assert np.array_equal(np.asarray(photo.image), pixels(48, 64))
    assert photo.note is None


def test_w1_exif_beyond_any_camera_s_is_not_read():
    huge = chunk(b"eXIf", exif(6).removeprefix(b"Exif\0\0") + bytes(2 * MIB))
    photo = decode(with_chunks(encode(pixels(20, 30), "PNG"), huge))
    assert (photo.width, photo.height, photo.note) == (30, 20, "EXIF unreadable")


@pytest.mark.parametrize(
    ("tag", "count", "code"),
    [(33723, 230 << 20, "out_of_memory"), (273, 9 << 20, "unsupported_format")],
)
def test_tags_of_a_tiff_that_would_fill_memory_are_refused(tag: int, count: int, code: str):
    tags = sorted([(256, 4, 1, 60), (257, 4, 1, 40), (tag, 1 if tag > 300 else 3, count, 4096)])
    table = b"".join(struct.pack("<HHII", *each) for each in tags)
    data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + table
    assert outcome(data + bytes(count * (1 if tag > 300 else 2) + 8192))[0] == code


def test_a_large_file_is_refused_where_its_decoder_copies_it(monkeypatch: pytest.MonkeyPatch):
    for kind in ("WEBP", "AVIF"):
        data = encode(pixels(20, 30), kind)
        assert outcome(data)[0] == "ok"
        with monkeypatch.context() as patch:
            patch.setattr(images, "MOST_COPIED", len(data) - 1)
            assert outcome(data) == ("out_of_memory", "over 0 MiB")


def test_w1_a_large_text_that_is_damaged_or_cut_is_found():
    data = with_chunks(encode(pixels(48, 64), "PNG"), LARGE["zTXt"])
    damaged = bytearray(data)
    damaged[100] ^= 1
    assert outcome(bytes(damaged)) == ("truncated", None)
    for cut in range(0, len(data), 97):
        assert outcome(data[:cut])[0] != "ok"


def test_w1_nothing_is_unpacked_beyond_the_limit():
    bomb = zlib.compress(bytes(100_000_000), 9)
    data = with_chunks(encode(pixels(4, 5), "PNG"), chunk(b"zTXt", b"a\0\0" + bomb) * 200)
    assert open_image(data).pixels == 20  # 20 GB, if it were


def test_w1_small_texts_stay_since_one_may_say_which_way_is_up():
    says = '<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"/>'
    small = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + says.encode())
    photo = decode(with_chunks(encode(pixels(20, 30), "PNG"), small, LARGE["zTXt"]))
    assert (photo.width, photo.height) == (20, 30)
    packed = zlib.compress(says.encode() + b" " * MIB)
    large = chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + packed)
    photo = decode(with_chunks(encode(pixels(20, 30), "PNG"), large))
    assert (photo.width, photo.height, photo.note) == (20, 30, None)
    plain = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + b" " * 70 * MIB + says.encode())
    for body, wanted in (
        (large, 30),  # EXIF comes before XMP
        (chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b" " * 2 * MIB)), 30),
        (plain, 30),
    ):
        photo = decode(with_chunks(encode(pixels(30, 20), "PNG", exif=exif(1)), body))
        assert photo.height == wanted
    unread = decode(with_chunks(encode(pixels(30, 20), "PNG"), plain))
    assert unread.note == "EXIF unreadable"
    turned = with_chunks(encode(pixels(20, 30), "PNG", exif=exif(6)), LARGE["iCCP"])
    assert (decode(turned).width, decode(turned).height) == (20, 30)


def marked(data: bytes, frame: int, bits: int = 8) -> bytes:
    """Return a baseline JPEG whose frame header says that it is of another kind."""
    place = data.index(b"\xff\xc0")
    return (
        data[: place + 1]
        + bytes([frame])
        + data[place + 2 : place + 4]
        + bytes([bits])
        + data[place + 5 :]
    )


JPEG = encode(pixels(61, 83), "JPEG")
GREY_JPEG = encode(pixels(64, 64)[:, :, 0], "JPEG")
DEEP = pixels(20, 30).astype(np.uint16) * 257
FLAT_BMP = encode(pixels(20, 30), "BMP")
BIG_TIFF = tiff(pixels(20, 30), photometric="rgb", bigtiff=True, byteorder=">")
DNG = tiff(
    pixels(20, 30), photometric="rgb", extratags=[(50706, "B", 4, bytes([1, 4, 0, 0]), True)]
)


def banded(bands: np.ndarray) -> bytes:
    return tiff(bands, photometric="minisblack", planarconfig="contig")


def planes(channels: np.ndarray, photometric: str) -> bytes:
    stored = channels.transpose(2, 0, 1)
    return tiff(stored, photometric=photometric, planarconfig="separate")


UNREAD = {
    "13 bands": (banded(DEEP[:, :, :1].repeat(13, 2)), "mode"),
    "5 bands of 8 bits": (banded(pixels(20, 30)[:, :, :1].repeat(5, 2)), "mode"),
    "float RGB": (tiff(DEEP.astype(np.float32), photometric="rgb"), "mode"),
    "half grey": (tiff(DEEP[:, :, 0].astype(np.float16), photometric="minisblack"), "mode"),
    "double grey": (tiff(DEEP[:, :, 0].astype(np.float64), photometric="minisblack"), "mode"),
    "complex": (tiff(DEEP[:, :, 0].astype(np.complex64), photometric="minisblack"), "mode"),
    "32-bit planes": (planes(DEEP.astype(np.uint32), "rgb"), "mode"),
    "CIELAB of 16 bits": (tiff(DEEP, photometric="cielab"), "mode"),
    "ICCLAB": (tiff(pixels(20, 30), photometric="icclab"), "mode"),
    "CIELAB in planes": (planes(pixels(20, 30), "cielab"), "mode"),
    "LogLuv": (tiff(DEEP, photometric="logluv"), "mode"),
    "BigTIFF, big-endian": (BIG_TIFF, "format"),
    "DNG": (DNG, "format"),
    "colour filter array": (tiff(DEEP[:, :, 0], photometric="cfa"), "format"),
    "lossless JPEG": (marked(JPEG, 0xC3), "format"),
    "hierarchical JPEG": (marked(JPEG, 0xC5), "format"),
    "JPEG-LS": (marked(JPEG, 0xF7), "format"),
    "JPEG of 12 bits": (marked(JPEG, 0xC1, 12), "mode"),
    "lossless JPEG in a TIFF": (tagged(marked(GREY_JPEG, 0xC3), 7), "format"),
    "BMP of 2 bits": (FLAT_BMP[:28] + b"\2\0" + FLAT_BMP[30:], "format"),
    "BMP of 64 bits": (FLAT_BMP[:28] + b"\x40\0" + FLAT_BMP[30:] + bytes(20 * 30 * 5), "format"),
    "BMP with a PNG": (FLAT_BMP[:28] + b"\0\0" + b"\5" + FLAT_BMP[31:], "format"),
    "BMP of a short OS/2 header": (FLAT_BMP[:14] + b"\x10" + FLAT_BMP[15:], "format"),
    "BMP of 10 bits a channel": (bmp((0x3FF00000, 0xFFC00, 0x3FF, 0), 0), "format"),
    "BMP of 4 masks of 16 bits": (bmp((0xF00, 0xF0, 0xF, 0xF000), 0), "format"),
    "PNG of Xcode": (png(3, 3, 8, 2, b"").replace(b"IHDR", b"CgBI", 1), "format"),
    "JPEG XL": (b"\xff\x0a" + bytes(60), "format"),
    "JPEG XL in boxes": (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(60), "format"),
    "a camera's CR3": (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom" + bytes(60), "format"),
    "OpenEXR": (b"v/1\x01" + bytes(60), "format"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_w2_a_sound_image_of_a_kind_that_is_not_read_is_called_so(name: str):
    data, code = UNREAD[name]
    found = outcome(data)
    assert found[0] == f"unsupported_{code}"
    assert found[1]


@pytest.mark.parametrize("name", [name for name in UNREAD if "BMP" in name or "bands" in name])
def test_w2_and_is_truncated_where_it_is_cut(name: str):
    data, _ = UNREAD[name]
    assert outcome(data[:70])[0] == "truncated"


def test_w2_an_avif_of_a_kind_that_is_not_read_is_called_so():
    data = encode(pixels(20, 30), "AVIF")
    strange = data.replace(b"av01", b"av99")  # items of a codec that there is not
    assert outcome(strange) == ("unsupported_format", "AVIF of a kind that is not read")
    for cut in range(16, len(strange), 7):
        assert outcome(strange[:cut])[0] == "truncated"


def test_w2_a_preview_of_a_cameras_raw_file_is_no_photograph():
    grey = bytes(64 * 64)
    assert outcome(tagged(grey, 1, (254, 1), (330, 8)))[0] == "unsupported_format"
    assert outcome(tagged(grey, 1, (254, 1))) == ("ok", None)
    assert outcome(tagged(grey, 1, (330, 8))) == ("ok", None)


def test_w2_what_begins_with_two_letters_is_no_bmp():
    assert outcome(b"BMW makes cars, and motorcycles.\n" * 9) == ("unidentified", "starts like BMP")


@pytest.mark.parametrize(
    "data",
    [
        b"/* site.css */\nbody { color: red }\n",
        b"#define SIZE 3\n",
        b"Python is no image format\n",
        b"P5x",
        b"\1\0\0\0 four bytes of anything",
        b"\n\5\7\7 and more",
        b"\x01\xda\x55\x55 and more",
        b"\0\0\1\0\0\0 an icon without images",
    ],
)
def test_w2_what_begins_like_a_rare_format_is_not_taken_for_it(data: bytes):
    assert outcome(data) == ("unidentified", None)


def test_w2_images_of_rare_formats_are_still_told():
    image = Image.fromarray(pixels(16, 16))
    for kind in ("PPM", "PCX", "SGI", "ICO", "XBM", "DIB", "TGA"):
        code = ("unidentified", None) if kind == "TGA" else ("unsupported_format", kind)
        assert outcome(encode(image.convert("1") if kind == "XBM" else image, kind)) == code


def test_w3_a_heic_is_decoded_or_the_extra_that_does_it_is_named():
    if find_spec("pi_heif") is None:
        expected = ("unsupported_format", "HEIC: pip install 'packvit[heic]'")
        assert outcome(TURNED) == expected
        assert outcome(TURNED.replace(b"ftypheic", b"ftypmif1")) == expected
        return
    photo = decode(TURNED)
    assert (photo.height, photo.width, photo.note) == (40, 24, None)
    corner = np.asarray(photo.image)[:7, -7:].astype(int)
    assert np.abs(corner - (255, 0, 0)).max() < 40
    assert np.asarray(photo.image)[:7, :7, 0].max() < 200
    assert open_image(TURNED).pixels == 2 * 24 * 40
    with pytest.raises(ImageError) as caught:
        decode(TURNED, max_pixels=24 * 40 - 1)
    assert caught.value.code == "too_many_pixels"
    for cut in range(16, len(TURNED), 13):
        assert outcome(TURNED[:cut])[0] == "truncated"


def test_w3_an_avif_that_names_a_structure_first_is_still_an_avif():
    data = encode(pixels(20, 30), "AVIF")
    assert outcome(data.replace(b"ftypavif", b"ftypmif1")) == ("ok", None)
    assert Image.registered_extensions().get(".heic") is None  # Pillow is as it was
