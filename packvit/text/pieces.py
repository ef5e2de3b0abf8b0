"""Words to ids by a sentencepiece model, as transformers' SiglipTokenizer and Tipsv2Tokenizer do.

Source: transformers 5.17, models/siglip and tipsv2, `tokenization_*.py`.
"""

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Side = Literal["left", "right"]

META = "\u2581"  # what sentencepiece writes for a space


@dataclass(frozen=True, slots=True)
class Filling:
    """How texts get one length: cut at `longest`, and filled up to it with `pad` where padded."""

    longest: int
    pad: int | None  # None: texts keep their lengths
    side: Side = "right"  # where it is filled

    def fill(self, ids: list[int]) -> list[int]:
        """Return ids filled up to the one length."""
        if self.pad is None:
            return ids
        missing = [self.pad] * (self.longest - len(ids))
        return ids + missing if self.side == "right" else missing + ids


@dataclass(frozen=True, slots=True)
class PieceTokenizer:
    """SigLIP's: lower case and no punctuation, then sentencepiece, and one token that ends a text.

    A special token in the text stands for itself.
    """

    model: Any
    special: Mapping[str, int]
    end: str
    unknown: str
    lower: bool
    filling: Filling

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        return [self.filling.fill(self.ids(text)) for text in texts]

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text, cut to the longest length."""
        parts = re.split(f"({any_of(self.special)})", META + text.replace(META, " "))
        found: list[int] = []
        for place, part in enumerate(parts):
            if place % 2:
                alone = found == [self.model.piece_to_id(META)]
                found = [*([] if alone and place == 1 else found), self.special[part]]
            elif part:
                found += self.pieces(part)
        found, end = found[: self.filling.longest - 1], self.special[self.end]
        return found if found[-1:] == [end] else [*found, end]

    def pieces(self, text: str) -> list[int]:
        """Return the ids of a text without special tokens.

        Sentencepiece drops a space at the beginning, so something stands before it.
        """
        text = text.lower() if self.lower else text
        text = text.translate(str.maketrans("", "", string.punctuation))
        text = re.sub(r"\s+", " ", text).strip()
        before = len(self.model.encode(self.unknown))
        return self.model.encode(self.unknown + text)[before:]


@dataclass(frozen=True, slots=True)
class LowerPieceTokenizer:
    """TIPSv2's: lower case, then sentencepiece; nothing ends a text, and an empty one has no ids.

    A special token in the text stands for itself.
    """

    model: Any
    special: Mapping[str, int]
    filling: Filling

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        return [self.filling.fill(self.ids(text)[: self.filling.longest]) for text in texts]

    def ids(self, text: str) -> list[int]:
        """Return all ids of a text."""
        found: list[int] = []
        for place, part in enumerate(re.split(f"({any_of(self.special)})", text)):
            found += [self.special[part]] if place % 2 else self.model.encode(part.lower())
        return found


def any_of(special: Mapping[str, int]) -> str:
    """Return the pattern of special tokens, the longest first."""
    return "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
