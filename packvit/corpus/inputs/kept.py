"""Columns that come with photographs, such as captions: their names, values and types. No torch.

While inputs are listed, an input's values are lines of JSON objects, of which the first that has a
column counts. Once all are listed, the types of the columns are known, and each input's values
become one JSON array in the order of the columns.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from packvit.corpus import UsageError
from packvit.corpus.inputs import limits

Kind = Literal["bool", "int64", "float64", "string"]
KINDS: tuple[Kind, ...] = ("bool", "int64", "float64", "string")
# What the end of a member's extension says it holds. Source: webdataset 1.0, autodecode.py.
TEXTS, NUMBERS, OBJECTS = ("txt", "text"), ("cls", "class"), ("json", "jsn")
EXACT = 2**53  # whole numbers up to here are exact as float64
MOST_AVAILABLE = 20  # names of columns in a message


@dataclass(slots=True)
class Keeping:
    """The columns to keep, and what listing met of them."""

    names: tuple[str, ...] = ()
    met: dict[str, None] = field(default_factory=dict)  # columns that are anywhere, some of them
    unread: int = 0  # files and rows whose values cannot be kept
    first_unread: str = ""

    def __bool__(self) -> bool:
        return bool(self.names)

    def meet(self, columns: Iterable[str]) -> None:
        """Note which columns a source has."""
        for name in columns if self.names else ():
            if name in self.names or len(self.met) < MOST_AVAILABLE + len(self.names):
                self.met[name] = None

    def fail(self, where: str) -> None:
        """Count a source whose values are null, since they cannot be read."""
        self.unread += 1
        self.first_unread = self.first_unread or where

    def encode(self, values: Mapping[str, Any], where: str) -> str | None:
        """Return the values of the columns to keep as a line of JSON; None if there are none."""
        chosen = {n: values[n] for n in self.names if values.get(n) is not None}
        if not chosen:
            return None
        text = json.dumps(chosen)
        if len(text) > limits.MOST_VALUES:
            self.fail(where)
            return None
        return text

    def wants_member(self, extension: str) -> bool:
        """Return whether a file of this extension beside a photograph may hold columns to keep."""
        kind = extension.rpartition(".")[2]
        if kind in TEXTS + NUMBERS:
            self.meet([extension])
            return extension in self.names
        return kind in OBJECTS

    def read(self, extension: str, data: bytes | None, where: str) -> str | None:
        """Return what a file beside a photograph holds, as a line of JSON.

        `data` is None if it cannot be read; what is no values is counted.
        """
        try:
            if data is None or len(data) > limits.MOST_VALUES:
                raise ValueError("it cannot be kept")
            values = read_member(extension, data)
        except (ValueError, RecursionError):
            self.fail(where)
            return None
        self.meet(values)
        return self.encode(values, where)

    def check_met(self) -> None:
        """Refuse a column that no source has.

        Raises: UsageError with the columns that there are.
        """
        for name in self.names:
            if name not in self.met:
                there = [*self.met][:MOST_AVAILABLE]
                raise UsageError(
                    f'keep names "{name}", which comes with none of the photographs. What comes '
                    f"with them: {', '.join(there) or 'nothing'}."
                )

    def notes(self) -> tuple[str, ...]:
        """Return what a job says of values that could not be kept."""
        if not self.unread:
            return ()
        what = "file or row has" if self.unread == 1 else "files or rows have"
        return (
            f"{self.unread:,} {what} values that cannot be read or are over "
            f"{limits.MOST_VALUES >> 20} MiB, and are null: {self.first_unread}.",
        )


def read_member(extension: str, data: bytes) -> dict[str, Any]:
    """Return the columns that such a file holds: an object's, or one called as its extension.

    Raises: ValueError or RecursionError if it is not what its extension says.
    """
    kind = extension.rpartition(".")[2]
    if kind in TEXTS:
        return {extension: data.decode("utf-8", "backslashreplace")}
    if kind in NUMBERS:
        return {extension: int(data)}
    found = read_object(data)
    return {**found, extension: found}


def read_object(line: bytes) -> dict[str, Any]:
    """Return the JSON object in a line.

    Raises: ValueError or RecursionError if there is none.
    """
    found = json.loads(line.decode("utf-8", "surrogateescape"))
    if not isinstance(found, dict):
        raise ValueError("it is no object")
    return found


def first_values(text: str | None, names: Sequence[str]) -> list[Any]:
    """Return the values of an input in the order of the columns, from lines of JSON objects."""
    values: dict[str, Any] = {}
    for line in text.split("\n") if text else ():
        values = json.loads(line) | values
    return [values.get(name) for name in names]


def kind_of(value: object) -> str:
    """Return the kind of a value: one of `KINDS`, or "large" for int64 that float64 rounds."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        if abs(value) <= EXACT:
            return "int64"
        return "large" if -(2**63) <= value < 2**63 else "string"
    return "float64" if isinstance(value, float) else "string"


def join_kinds(kinds: set[str]) -> Kind:
    """Return the type of a column with values of these kinds: text if nothing else has room."""
    if kinds == {"bool"}:
        return "bool"
    if kinds and kinds <= {"int64", "large"}:
        return "int64"
    return "float64" if kinds and kinds <= {"int64", "float64"} else "string"


def convert(value: Any, kind: Kind) -> Any:
    """Return a value as its column has it; in a column of text, JSON of what is no text."""
    if value is None or kind in ("bool", "int64"):
        return value
    if kind == "float64":
        return float(value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode()  # of bytes that are no UTF-8


def encode_row(values: Sequence[Any], kinds: Sequence[Kind]) -> str:
    """Return the JSON array of an input's values."""
    return json.dumps([convert(value, kind) for value, kind in zip(values, kinds, strict=True)])
