"""Verify published checkpoints one after another: a certificate each, in one folder."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from packvit.checkpoints.errors import CheckpointError
from packvit.families import FAMILIES
from packvit.verification import VerifyOptions, certificate
from packvit.verification.machine import machine
from packvit.verification.verify import verify_checkpoint

SAME = ("packvit", "torch", "transformers")  # versions by which a certificate is as good as new


@dataclass(frozen=True, slots=True)
class Verified:
    """What came of one checkpoint."""

    name: str
    state: Literal[
        "passed", "missed", "kept", "not read"
    ]  # kept: passed before, with these versions
    comparisons: int = 0
    missed: int = 0
    references: str = ""
    revision: str | None = None
    note: str = ""  # why it could not be read


def published_names() -> tuple[str, ...]:
    """Return every checkpoint that docs/checkpoints.md lists."""
    return tuple(name for encoder in FAMILIES for name in encoder.family.checkpoints)


def file_of(name: str, folder: Path) -> Path:
    """Return where the certificate of a checkpoint is kept."""
    return folder / f"{name.strip('/').replace('/', '--')}.json"


def verify_published(
    names: Sequence[str], folder: Path, options: VerifyOptions, device: str | None
) -> Iterator[Verified]:
    """Yield what comes of each checkpoint as soon as it is known; its certificate is written then.

    One that passed before with these versions is kept: a walk that was stopped goes on.

    Raises: ImportError without transformers; OSError if a certificate cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = file_of(name, folder)
        if found := good_certificate(path, options):
            yield described(name, found, "kept")
            continue
        try:
            findings = verify_checkpoint(name, options, device=device)
        except CheckpointError as error:
            yield Verified(name, "not read", note=str(error).splitlines()[0])
            continue
        made = certificate.certify([findings])
        certificate.write(path, made)
        yield described(name, made, "missed" if findings.missed else "passed")


def good_certificate(path: Path, options: VerifyOptions) -> dict[str, Any] | None:
    """Return a certificate that need not be made again, or None."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    here = machine()
    made = found.get("machine", {}) if isinstance(found, dict) else {}
    if any(made.get(name) != here[name] for name in SAME):
        return None
    if found.get("format") != certificate.FORMAT or found.get("passed") is not True:
        return None
    (model,) = found["models"]
    return None if options.timm and model["second"] is None else found


def described(
    name: str, made: dict[str, Any], state: Literal["passed", "missed", "kept"]
) -> Verified:
    """Return a certificate's content in a line."""
    (model,) = made["models"]
    rows, both = model["rows"], [model["reference"], model["second"]]
    missed = sum(not row["passed"] for row in rows)
    references = " and ".join(reference for reference in both if reference)
    return Verified(name, state, len(rows), missed, references, model["revision"])
