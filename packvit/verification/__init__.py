"""Compare our encoders with their reference implementations. This module imports no torch.

`verify.py` verifies a checkpoint or a family, `comparison.py` compares outputs, `files.py` compares
saved weights and preprocessing, `references.py` runs transformers, `certificate.py` records it.
"""

from dataclasses import dataclass

LIMIT = 5e-6  # scaled difference in fp32: the reference's own two attention paths differ by more
OWN_LIMIT = 2.0  # as a multiple of the reference's own distance to float64, where LIMIT is exceeded
LOWER_LIMIT = 1.2  # our error in a lower precision, as a multiple of the reference's own


class VerificationError(Exception):
    """An encoder differs from its reference."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One comparison: the worst difference found, and the limit on it.

    Units: in float32, of outputs, max|ours - reference| / max(1, max|reference| / 4), and where
    that exceeds `LIMIT` the reference's `own` distance to float64; in lower precision the distance
    to the float32 reference, ‖ours - reference‖ / ‖reference‖, and the reference's `own` in that
    precision; a count of tensors for weights; of normalised pixels max|ours - reference|.
    """

    what: str  # an output, "neighbours of NaN", "pixels" or "weights"
    where: str  # the images, or the files
    pack: str  # alone, among others, reordered; or none if nothing is packed
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
    def widened(self) -> bool:
        """Whether it passed in float32 only because the reference itself is far from float64."""
        return self.passed and self.dtype == "float32" and self.own is not None

    @property
    def said(self) -> str:
        """The comparison as a sentence."""
        how = (self.where, self.pack, self.dtype, self.backend)
        listed = ", ".join(part for part in how if part != "none")
        return f"{self.what} off by {self.worst:.1e}, where {self.limit:.1e} is allowed ({listed})"


@dataclass(frozen=True, slots=True)
class Findings:
    """All comparisons of one encoder."""

    family: str
    model: str  # a checkpoint's name, or the seed of random weights
    variant: str  # of the random models; "published" otherwise
    revision: str | None
    weights: str  # sha256, as `Checkpoint.sha256` has it
    settings: str  # sha256 of config.json and the image settings
    reference: str  # the class in transformers
    device: str
    rows: tuple[Comparison, ...]
    not_compared: tuple[str, ...]  # each with its reason
    remarks: tuple[str, ...]  # how the reference was run, and limits widened by its own error

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
