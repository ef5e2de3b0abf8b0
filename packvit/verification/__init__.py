"""Our encoders beside their references: what is compared, and what came of it. No torch here.

`job.py` verifies a checkpoint or a family, `comparison.py` compares outputs and `files.py` what
goes in and out of files, `references.py` runs transformers, `certificate.py` writes it all down.
"""

from dataclasses import dataclass

LIMIT = 5e-6  # scaled difference in fp32: the reference's own two attention paths differ by more
OWN_LIMIT = 2.0  # as a multiple of the reference's own distance to float64, where LIMIT is exceeded
LOWER_LIMIT = 1.2  # our error in a lower precision, as a multiple of the reference's own


class VerificationError(Exception):
    """An encoder is not what its reference is."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One comparison: the worst difference of what was compared, and the most that it may be.

    Units: in float32, of outputs, max|ours - reference| / max(1, max|reference| / 4), and where
    that exceeds `LIMIT` the reference's `own` distance to float64; in lower precision the distance
    to the float32 reference, ‖ours - reference‖ / ‖reference‖, and the reference's `own` in that
    precision; a count of tensors for weights; of normalised pixels max|ours - reference|.
    """

    what: str  # an output, "neighbours of NaN", "pixels" or "weights"
    where: str  # the images, or the files
    pack: str  # alone, among others, reordered; or none, where nothing is packed
    dtype: str
    backend: str
    worst: float
    limit: float
    own: float | None = None

    @property
    def passed(self) -> bool:
        """Whether it is within its limit, which a NaN never is."""
        return self.worst <= self.limit

    @property
    def widened(self) -> bool:
        """Whether it passed in float32 only because the reference itself is far from float64."""
        return self.passed and self.dtype == "float32" and self.own is not None

    @property
    def said(self) -> str:
        """The comparison in words."""
        how = (self.where, self.pack, self.dtype, self.backend)
        listed = ", ".join(part for part in how if part != "none")
        return f"{self.what} off by {self.worst:.1e}, where {self.limit:.1e} is allowed ({listed})"


@dataclass(frozen=True, slots=True)
class Findings:
    """All that was compared of one encoder."""

    family: str
    model: str  # a checkpoint's name, or the seed of random weights
    variant: str  # of the random models; "published" otherwise
    revision: str | None
    weights: str  # sha256, as `Checkpoint.sha256` has it
    settings: str  # sha256 of config.json and the image settings
    reference: str  # the class in transformers
    device: str
    rows: tuple[Comparison, ...]
    not_compared: tuple[str, ...]  # what, and why not
    remarks: tuple[str, ...]  # how the reference was run, and what its own error allowed

    @property
    def missed(self) -> tuple[Comparison, ...]:
        """The rows beyond their limit."""
        return tuple(row for row in self.rows if not row.passed)


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """How much is compared; float32 always, on every backend that runs here."""

    quick: bool = False
    lower: tuple[str, ...] = ("bfloat16",)
    seed: int = 0
