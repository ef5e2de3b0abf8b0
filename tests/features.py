"""Feature folders for tests: what they hold, and the same in the first format."""

from dataclasses import replace
from pathlib import Path

from packvit.corpus.folder.layout import read_commits, read_manifest, write_commits, write_manifest
from packvit.corpus.folder.names import CURRENT, FIRST


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file in a folder and the folders below, by its path there."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def to_first_format(folder: Path) -> Path:
    """Turn a feature folder into what the first format was; return it."""
    manifest, entries = read_manifest(folder), read_commits(folder)
    assert manifest
    for path in (*(folder / "data").iterdir(), *folder.glob("_exports/*")):
        path.rename(folder / path.name)
    for path in (folder / "data", folder / "_exports"):
        if path.exists():
            path.rmdir()
    (folder / CURRENT.manifest).rename(folder / FIRST.manifest)
    (folder / CURRENT.commits).rename(folder / FIRST.commits)
    if (folder / CURRENT.certificate).exists():
        (folder / CURRENT.certificate).rename(folder / FIRST.certificate)
    write_commits(folder, [replace(e, part=e.part.removeprefix("data/")) for e in entries])
    exports = {Path(name).name: record for name, record in manifest["exports"].items()}
    write_manifest(folder, manifest | {"format": FIRST.format, "exports": exports})
    return folder
