"""What the tests of `--decode gpu` share: JPEGs of all kinds, and the job with any decoder."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image
from rotten import encode, exif, pixels, write_good, write_rotten

from packvit.corpus.decode.prepare import Decode
from packvit.corpus.encode.context import DecodeJpegs, EmbedContext
from packvit.corpus.encode.filling import Shard
from packvit.corpus.encode.shard import run_shards
from packvit.corpus.folder.rows import Row
from packvit.corpus.inputs.find import list_inputs
from packvit.corpus.progress import Effort
from packvit.corpus.settings import EmbedOptions
from packvit.encoder import Encoder


def write_mixed(folder: Path) -> None:
    """Write broken files, odd ones, other formats, and JPEGs that a GPU decodes or has to refuse.

    Those that it decodes are called jpeg-NN.jpg, among others.
    """
    write_rotten(folder)
    write_good(folder, 12)
    for number in range(24):
        image = Image.fromarray(pixels(90 + 7 * number, 200 - 5 * number, number))
        kind: dict[str, Any] = {"subsampling": number % 3, "quality": 60 + number}
        kind |= {"exif": exif(number % 8 + 1)} if number % 2 else {}
        kind |= {"restart_marker_blocks": 4} if number % 5 == 0 else {}
        image = image.convert("L") if number % 6 == 5 else image
        (folder / f"jpeg-{number:02}.jpg").write_bytes(encode(image, "JPEG", **kind))
    image = Image.fromarray(pixels(120, 90))
    others: dict[str, dict[str, Any]] = {
        "progressive.jpg": {"progressive": True},
        "stored-as-rgb.jpg": {"keep_rgb": True},
        "unreadable-exif.jpg": {"exif": b"Exif\0\0nonsense"},
    }
    for name, kind in others.items():
        (folder / name).write_bytes(encode(image, "JPEG", **kind))
    frames = {"save_all": True, "append_images": [image]}
    (folder / "two-frames.jpg").write_bytes(encode(image, "MPO", **frames))
    (folder / "narrow.jpg").write_bytes(encode(pixels(60, 4), "JPEG"))


def embed_with(
    encoder: Encoder,
    photos: Path,
    out: Path,
    decode_jpegs: DecodeJpegs | None,
    *,
    token_budget: int = 200,
) -> Effort:
    """Embed photographs in shards of 25, as the job does."""
    decode: Decode = "pil" if decode_jpegs is None else "gpu"
    options = EmbedOptions(
        resize="native", max_patches=64, token_budget=token_budget, workers=2, decode=decode
    )
    out.mkdir()
    inputs = list(list_inputs([str(photos)]))
    shards = [
        Shard(number, tuple(inputs[start : start + 25]))
        for number, start in enumerate(range(0, len(inputs), 25))
    ]
    effort, settled = Effort(), list[Row]()
    with options.decoders() as decoders:
        context = EmbedContext(encoder, options, decoders, decode_jpegs)
        entries = list(run_shards(context, shards, out, settled.extend, effort=effort))
    assert [entry.rows for entry in entries] == [len(shard.inputs) for shard in shards]
    assert sorted(row.id for row in settled) == sorted(source.id for source in inputs)
    return effort


def parts(out: Path) -> dict[str, bytes]:
    return {f"data/{path.name}": path.read_bytes() for path in sorted(out.glob("data/*.parquet"))}


def read_rows(out: Path) -> list[dict[str, Any]]:
    return [row for name in parts(out) for row in pq.read_table(out / name).to_pylist()]
