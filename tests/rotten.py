"""Folders of image files for tests: broken ones, odd ones, good ones, and what must become of each.

Everything is made here, byte by byte or with Pillow, so that no test needs a download.
"""

import os
import socket
import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

OK = "ok"
ORIENTATION = 0x0112
DIRECTORY = "directory.jpg"  # an input only where it is named: a walk goes into it
ENCODINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "jpeg.jpg": ("JPEG", {}),
    "progressive.jpg": ("JPEG", {"progressive": True}),
    "png.png": ("PNG", {}),
    "lossy.webp": ("WEBP", {}),
    "lossless.webp": ("WEBP", {"lossless": True}),
    "gif.gif": ("GIF", {}),
    "bmp.bmp": ("BMP", {}),
    "raw.tif": ("TIFF", {}),
    "lzw.tif": ("TIFF", {"compression": "tiff_lzw"}),
    "avif.avif": ("AVIF", {}),
}


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return uint8 [height, width, 3]: slopes and noise, different along either side."""
    rows, columns = np.mgrid[0:height, 0:width]
    slopes = np.stack([rows * 5, columns * 3, (rows + 2 * columns) * 2], axis=2) % 240
    noise = np.random.default_rng(seed).integers(0, 16, slopes.shape)
    return (slopes + noise).astype(np.uint8)


def encode(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    """Return the bytes of a file of Pillow's format `kind`."""
    buffer = BytesIO()
    photo = image if isinstance(image, Image.Image) else Image.fromarray(image)
    photo.save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation: int) -> bytes:
    """Return an EXIF block with nothing but the orientation."""
    block = Image.Exif()
    block[ORIENTATION] = orientation
    return block.tobytes()


def png(
    width: int, height: int, depth: int, colour: int, data: bytes, *chunks: tuple[bytes, bytes]
) -> bytes:
    """Return a PNG with exactly this header and these bytes of filtered rows."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(data, 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in body
    )


def tiff(values: np.ndarray, bits: int, *, white_is_zero: bool = False) -> bytes:
    """Return a little-endian grey TIFF of one strip; 12-bit values are packed, two in 3 bytes."""
    if bits == 12:
        first, second = values.reshape(-1, 2).astype(np.uint16).T
        packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1)
        strip = packed.astype(np.uint8).tobytes()
    else:
        strip = values.astype("<u2").tobytes()
    height, width = values.shape
    entries = [(256, width), (257, height), (258, bits), (259, 1), (262, 0 if white_is_zero else 1)]
    entries += [(273, 8 + 2 + 9 * 12 + 4), (277, 1), (278, height), (279, len(strip))]
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + bytes(4) + strip


def _animation(kind: str) -> bytes:
    first, *rest = (Image.fromarray(pixels(20, 30, seed)) for seed in range(3))
    return encode(first, kind, save_all=True, append_images=rest)


def _contents() -> dict[str, tuple[str, bytes]]:
    """Return name -> (code, bytes) of every file that is just bytes."""
    photo = pixels(61, 83)
    whole = encode(photo, "JPEG")
    alpha = Image.fromarray(np.dstack([pixels(20, 30), pixels(20, 30, 1)[:, :, :1]]), "RGBA")
    palette = Image.fromarray(pixels(20, 30)).quantize(16)
    files = {
        "empty.jpg": ("unidentified", b""),
        "one-byte.jpg": ("unidentified", b"\xff"),
        "header-only.jpg": ("truncated", whole[:20]),
        "text.jpg": ("unidentified", b"This is no image.\n" * 50),
        "page.jpg": ("unidentified", b"<!DOCTYPE html><html><body>404</body></html>"),
        "drawing.jpg": ("unidentified", b'<svg xmlns="http://www.w3.org/2000/svg"/>'),
        "film.jpg": ("unsupported_format", b"\0\0\0\x18ftypisom\0\0\0\0mp42isom" + bytes(64)),
        "noise.jpg": ("unidentified", b"\xa5" + photo.tobytes()),
        "no-height.png": ("truncated", png(7, 0, 8, 2, b"")),
        "layers.jpg": ("unsupported_format", b"8BPS\0\1" + bytes(64)),
        "icon.png": ("unsupported_format", b"\0\0\1\0\1\0\x10\x10" + bytes(64)),
        "portable.jpg": ("unsupported_format", b"P6\n1 1\n255\nabc"),
        "jpeg2000.jpg": ("unsupported_format", b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(64)),
        "bomb.png": ("too_many_pixels", png(60000, 60000, 8, 2, b"")),
        "large.png": ("too_many_pixels", png(12000, 12000, 1, 0, bytes(12000 * 1501))),
        "integers.tif": ("unsupported_mode", encode(Image.new("I", (9, 7), 70000), "TIFF")),
        "floats.tif": ("unsupported_mode", encode(Image.new("F", (9, 7), 0.5), "TIFF")),
        "one-pixel.png": (OK, encode(pixels(1, 1), "PNG")),
        "one-row.png": (OK, encode(pixels(1, 5000), "PNG")),
        "one-column.jpg": (OK, encode(pixels(5000, 1), "JPEG")),
        "print.jpg": (OK, encode(Image.fromarray(photo).convert("CMYK"), "JPEG")),
        "grey.jpg": (OK, encode(Image.fromarray(photo).convert("L"), "JPEG")),
        "bilevel.png": (OK, encode(Image.fromarray(photo).convert("1"), "PNG")),
        "grey-16-bit.png": (OK, encode((photo[:, :, 0].astype(np.uint16) * 257), "PNG")),
        "grey-alpha.png": (OK, encode(alpha.convert("LA"), "PNG")),
        "alpha.png": (OK, encode(alpha, "PNG")),
        "alpha.webp": (OK, encode(alpha, "WEBP")),
        "palette-alpha.png": (OK, encode(palette, "PNG", transparency=bytes(range(0, 240, 15)))),
        "palette-key.gif": (OK, encode(palette, "GIF", transparency=3)),
        "moving.gif": (OK, _animation("GIF")),
        "moving.webp": (OK, _animation("WEBP")),
        "moving.png": (OK, _animation("PNG")),
        "pages.tif": (OK, _animation("TIFF")),
        "bad-exif.png": (OK, encode(photo, "PNG", exif=b"Exif\0\0this is no EXIF")),
        "UPPER CASE.JPG": (OK, whole),
        os.fsdecode(b"caf\xe9.jpg"): (OK, whole),
    }
    for turn in range(2, 9):
        files[f"turned-{turn}.jpg"] = (OK, encode(photo, "JPEG", exif=exif(turn)))
    for name, (kind, options) in ENCODINGS.items():
        content = encode(photo, kind, **options)
        for percent in (40, 70, 95):
            files[f"cut-{percent}-{name}"] = ("truncated", content[: len(content) * percent // 100])
    return files


def write_rotten(folder: Path) -> dict[str, str]:
    """Write broken and odd images into `folder`; return name -> the code of decoding it, or "ok".

    The odd ones decode, but a model's preprocessing may still refuse 1 x 5000 pixels.
    """
    folder.mkdir(parents=True, exist_ok=True)
    codes = {}
    for name, (code, content) in _contents().items():
        (folder / name).write_bytes(content)
        codes[name] = code
    (folder / DIRECTORY).mkdir()
    os.mkfifo(folder / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        handle = os.open(folder, os.O_RDONLY)
        try:  # through the handle: an address holds 107 bytes, and test folders are deep
            server.bind(f"/proc/self/fd/{handle}/socket.jpg")
        finally:
            os.close(handle)
    codes |= dict.fromkeys((DIRECTORY, "pipe.jpg", "socket.jpg", "device.jpg"), "not_a_file")
    (folder / "device.jpg").symlink_to("/dev/null")
    (folder / "broken-link.jpg").symlink_to("no-such-file.jpg")
    (folder / "link-loop.jpg").symlink_to("link-loop.jpg")
    codes |= dict.fromkeys(("broken-link.jpg", "link-loop.jpg"), "missing")
    # It opens, and reading fails: a broken disk, even for root.
    (folder / "unreadable.jpg").symlink_to("/proc/self/mem")
    (folder / "huge.jpg").write_bytes(b"")
    os.truncate(folder / "huge.jpg", 3 * 2**30)  # sparse: no disk is taken
    codes |= dict.fromkeys(("unreadable.jpg", "huge.jpg"), "unreadable")
    locked = folder / "locked.jpg"
    locked.write_bytes(encode(pixels(9, 9), "JPEG"))
    locked.chmod(0)
    codes[locked.name] = OK if os.access(locked, os.R_OK) else "unreadable"  # root reads it
    return codes


def write_good(folder: Path, count: int) -> list[str]:
    """Write `count` sound photographs of several sizes and formats into `folder`; return names."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = (("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"))
    names = []
    for index in range(count):
        suffix, kind = kinds[index % 3]
        name = f"good-{index:04}.{suffix}"
        side = 30 + 11 * (index % 7)
        (folder / name).write_bytes(encode(pixels(side, 120 - side, seed=index), kind))
        names.append(name)
    return names
