"""The certificate of a verification: a JSON file next to the checkpoint or the features."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import Any

from packvit.atomic import write_whole
from packvit.checkpoints.errors import CheckpointError
from packvit.checkpoints.files import Checkpoint
from packvit.checkpoints.folders import read_json
from packvit.verification import Comparison, Findings
from packvit.verification.machine import machine
from packvit.verification.rule import FLOOR, LARGEST_FLOOR, LARGEST_TIMES, RMS_TIMES
from packvit.version import version_of

FORMAT = "packvit certificate 2"
NAME = "packvit-certificate.json"  # beside a checkpoint


def certify(findings: Sequence[Findings]) -> dict[str, Any]:
    """Return the certificate of findings, whether they passed or not."""
    return {
        "format": FORMAT,
        "passed": all(not found.missed for found in findings),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "limits": {
            "rms": f"at most {RMS_TIMES} times the reference's own, beside float64",
            "largest": f"at most {LARGEST_TIMES} times the reference's own, beside float64",
            "floor": "or, if that is more, rms of roundoff * sqrt(1 + blocks) times "
            f"{ {str(dtype).removeprefix('torch.'): x for dtype, x in FLOOR.items()} }, and "
            f"largest of {LARGEST_FLOOR} times that",
        },
        "machine": machine(),
        "models": [as_object(found) for found in findings],
    }


def as_object(found: Findings) -> dict[str, Any]:
    """Return one model's findings as JSON values; a NaN or infinity is null."""
    return asdict(found) | {"rows": [row_object(row) for row in found.rows]}


def row_object(row: Comparison) -> dict[str, Any]:
    """Return one comparison as JSON values."""
    numbers = {name: getattr(row, name) for name in ("worst", "limit", "own")}
    said = {name: x if x is not None and isfinite(x) else None for name, x in numbers.items()}
    return asdict(row) | said | {"passed": row.passed}


def write(path: Path, found: Mapping[str, Any]) -> None:
    """Write a certificate atomically.

    Raises: OSError if it cannot be written.
    """
    write_whole(path, (json.dumps(found, indent=1, allow_nan=False) + "\n").encode())


def settings_digest(checkpoint: Checkpoint) -> str:
    """Return a digest of config.json and the image settings, which the weights' digest omits."""
    text = json.dumps([checkpoint.config, checkpoint.preprocessor], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def read_beside(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return the certificate in the checkpoint's folder, or None if none can be read."""
    if not checkpoint.files:
        return None
    try:
        return read_json(checkpoint.files[0].parent, NAME)
    except (OSError, CheckpointError):
        return None


def why_not(
    found: Mapping[str, Any],
    checkpoint: Checkpoint,
    weights: str,
    *,
    device: str,
    dtype: str,
    backend: str,
) -> str | None:
    """Return why a certificate does not apply to a job, or None if it does.

    `weights` is the checkpoint's `sha256()`. The certificate must come from this version of
    packvit and torch, have passed, and cover the job's device, dtype and attention backend.
    """
    if found.get("format") != FORMAT:
        return "it is in another format"
    if found.get("passed") is not True:
        return "its verification failed"
    made = found.get("machine", {})
    for name in ("packvit", "torch"):
        if made.get(name) != (version := version_of(name)):
            return f"it was made with {name} {made.get(name)}, and this is {version}"
    same = [model for model in found.get("models", []) if model.get("weights") == weights]
    if not same:
        return "it is for other weights"
    same = [model for model in same if model.get("settings") == settings_digest(checkpoint)]
    if not same:
        return "it is for another config.json or other image settings"
    for model in same:
        if model.get("device") == device and any(
            (row.get("dtype"), row.get("backend")) == (dtype, backend) for row in model["rows"]
        ):
            return None
    return f"it does not cover {dtype} on {device} by the attention backend {backend}"
