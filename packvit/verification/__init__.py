"""Compare our encoders with their reference implementations. This module imports no torch.

`verify.py` verifies a checkpoint or a family, `comparison.py` compares outputs by the rule in
`rule.py` and `files.py` what goes in and out of files. `references.py` loads the models of
transformers and `running.py` runs them; `timm_reference.py` does both with timm's, of which
`timm_models.py` builds a second reference. `second.py` compares the two references, and
`certificate.py` writes it all down.
"""

from dataclasses import dataclass


class VerificationError(Exception):
    """An encoder differs from its reference."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One comparison: how far off we are, and the most that we may be.

    Units: by `measure`. "rms" and "largest" are errors of outputs beside float64, as multiples of
    the root mean square of what float64 says, with the reference's `own` error; "bits" the largest
    difference where there may be none; "count" a number of tensors; "pixels" the largest
    difference of normalised pixels.
    """

    what: str  # an output, "neighbours of NaN", "pixels" or "weights"
    where: str  # the images, or the files
    measure: str  # rms, largest, bits, count or pixels
    pack: str  # alone, among others, reordered; or none, where nothing is packed
    dtype: str
    backend: str
    worst: float
    limit: float
    own: float | None = None

    @property
    def passed(self) -> bool:
        """Whether it is within its limit; a NaN is not."""
        return self.worst <= self.limit

    @property
    def said(self) -> str:
        """The comparison as a sentence."""
        how = (self.where, self.pack, self.dtype, self.backend)
        listed = ", ".join(part for part in how if part != "none")
        named = {"rms": " (root mean square)", "largest": " at most"}.get(self.measure, "")
        off = f"{self.what} off by {self.worst:.1e}{named}"
        return f"{off}, where {self.limit:.1e} is allowed ({listed})"


@dataclass(frozen=True, slots=True)
class Findings:
    """All comparisons of one encoder."""

    family: str
    model: str  # a checkpoint's name, or the seed of random weights
    variant: str  # of the random models; "published" otherwise
    revision: str | None
    weights: str  # sha256, as `Checkpoint.sha256` has it
    settings: str  # sha256 of config.json and the image settings
    reference: str  # the class in transformers, or timm's version and architecture
    second: str | None  # and timm's version and class, where it was asked
    device: str
    rows: tuple[Comparison, ...]
    not_compared: tuple[str, ...]  # what, and why not
    remarks: tuple[str, ...]  # how the reference was run

    @property
    def missed(self) -> tuple[Comparison, ...]:
        """The comparisons beyond their limit."""
        return tuple(row for row in self.rows if not row.passed)


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """What to compare besides float32, which is compared on every backend that runs here."""

    quick: bool = False
    lower: tuple[str, ...] = ("bfloat16",)
    seed: int = 0
    timm: bool = False  # as a second reference
