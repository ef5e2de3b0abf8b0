"""Queries: words, photographs, and sums of both, as vectors of a folder's own space."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

import numpy as np

from packvit.corpus import UsageError
from packvit.corpus.inputs.suffixes import is_photograph
from packvit.images.decode import Source
from packvit.images.errors import CODES, ImageError
from packvit.retrieval.folders import Vectors
from packvit.retrieval.models import embed_photographs, embed_words, word_column

WEIGHT = re.compile(r"(\d+(?:\.\d+)?):\s*(?=\S)")
SIGNS = {"+": 1.0, "-": -1.0}

Asked = Source | Sequence[Source]


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """Words or a photograph, and its weight in a sum."""

    weight: float
    words: str | None = None
    photo: Source | None = None


@dataclass(frozen=True, slots=True)
class Query:
    """A sum of terms, and how it was typed."""

    typed: str
    terms: tuple[Term, ...] = field(repr=False)

    @property
    def photos(self) -> list[Source]:
        """The photographs in the sum."""
        return [term.photo for term in self.terms if term.photo is not None]


def read_queries(asked: Asked) -> list[Query]:
    """Return the queries that were asked: each word, path or image begins one.

    One that begins with "+ " or "- ", or stands after such a sign alone, is a term of the query
    before it; "2:" before a term is its weight. The path of a file is a photograph, any other text
    is words; bytes, PIL images and arrays are photographs.

    Raises: UsageError for a sign without a term, or a name of a photograph that is not there.
    """
    alone = isinstance(asked, (str, bytes)) or not isinstance(asked, Sequence)
    listed: Sequence[Source] = [asked] if alone else asked  # pyright: ignore[reportAssignmentType] # told apart above
    found: list[Query] = []
    sign = ""
    for one in listed:
        name = show(one)
        if isinstance(one, str) and not sign:
            sign, one = part_sign(one)
            if not one:
                continue
        weight = 1.0
        if isinstance(one, str) and (matched := WEIGHT.match(one)):
            weight, one = float(matched[1]), one[matched.end() :]
        term = read_term(one, SIGNS.get(sign, 1.0) * weight)
        name = name if not sign or name.startswith(sign) else f"{sign} {name}"
        if sign and found:
            before = found.pop()
            found.append(Query(f"{before.typed} {name}", (*before.terms, term)))
        else:
            found.append(Query(name, (term,)))
        sign = ""
    if sign:
        raise UsageError(f'Nothing stands behind the "{sign}" of the query. Add words or a path.')
    if not found:
        raise UsageError("No query was given. Give words, or the path of a photograph.")
    return found


def part_sign(text: str) -> tuple[str, str]:
    """Return the sign that a text begins with, or "", and the rest."""
    sign, _, rest = text.partition(" ")
    return (sign, rest.strip()) if sign in SIGNS else ("", text)


def read_term(one: Source, weight: float) -> Term:
    """Return a term: a photograph where there is a file, else words.

    Raises: UsageError for nothing, a folder, or a photograph's name where there is no file.
    """
    if not isinstance(one, str):
        return Term(weight, photo=one)
    if not one.strip():
        raise UsageError("A query is empty. Give words, or the path of a photograph.")
    if os.path.isfile(one):
        return Term(weight, photo=one)
    if os.sep in one and os.path.lexists(one):
        kind = "a folder" if os.path.isdir(one) else "no file"
        raise UsageError(f"{one} is {kind}. Give words, or the path of a photograph.")
    if is_photograph(os.fsencode(one)) and " " not in one:
        raise UsageError(
            f"{one} is called like a photograph, but there is no such file. Check the path."
        )
    return Term(weight, words=one)


def show(one: Source) -> str:
    """Return how a query is named: as typed, or by what it is."""
    if isinstance(one, (str, os.PathLike)):
        return os.fspath(one) if isinstance(one, str) else PurePath(one).name
    return "image"


def choose_column(queries: Sequence[Query], folder: Vectors) -> str:
    """Return the column in which queries are compared: that of words, where there are any.

    Raises: UsageError if the folder's model knows no words.
    """
    if any(term.words is not None for query in queries for term in query.terms):
        return word_column(folder)
    return "pooled"


def embed_queries(
    queries: Sequence[Query], vectors: Vectors, model: str | None, device: str | None
) -> np.ndarray:
    """Return the queries as vectors: the weighted sum of the unit vectors of their terms.

    Shapes: Q queries -> float32 [Q, D].
    Raises: UsageError for a model of other weights than the folder's, or for words that it cannot
    read; BrokenQuery for a photograph that cannot be used; CheckpointError.
    """
    terms = [term for query in queries for term in query.terms]
    photos = [(place, term.photo) for place, term in enumerate(terms) if term.photo is not None]
    words = [(place, term.words) for place, term in enumerate(terms) if term.words is not None]
    found = np.zeros((len(terms), vectors.width), np.float32)
    if photos:
        try:
            made = embed_photographs([photo for _, photo in photos], vectors, model, device)
        except ImageError as error:
            raise refuse(photos[error.index or 0][1], error) from error
        found[[place for place, _ in photos]] = made
    if words:
        made = embed_words([text for _, text in words], vectors, model, device)
        found[[place for place, _ in words]] = made
    weights = np.array([term.weight for term in terms], np.float32)
    found *= (weights / np.maximum(np.linalg.norm(found, axis=1), 1e-30))[:, None]
    owners = np.repeat(np.arange(len(queries)), [len(query.terms) for query in queries])
    sums = np.zeros((len(queries), vectors.width), np.float32)
    np.add.at(sums, owners, found)
    return sums


class BrokenQuery(ValueError):
    """A photograph of a query cannot be used; the message says which and why."""


def refuse(photo: Source, error: ImageError) -> BrokenQuery:
    """Return the error for a photograph that cannot be a query."""
    why = CODES[error.code] + (f" ({error.note})" if error.note else "")
    return BrokenQuery(f"{show(photo)} cannot be a query: {error.code}: {why}.")
