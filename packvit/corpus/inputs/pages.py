"""What the pages of a Parquet file's column take to unpack, by their headers. No torch.

A page is unpacked whole, however few of its rows are wanted.

Source: Apache Parquet's parquet.thrift (PageHeader), and Thrift's compact protocol.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

from packvit.corpus.inputs import limits
from packvit.images.errors import ImageError

NUMBER_KINDS = (4, 5, 6)  # whole numbers of 16, 32 and 64 bits
BOOLS, BYTE, DOUBLE, BINARY, LISTS, STRUCT = (1, 2), 3, 7, 8, (9, 10), 12
KIND, UNPACKED, PACKED = 1, 2, 3  # fields of a page's header
DICTIONARY = 2  # a kind of page
COUNTED = (5, 8)  # what a page of values is described by, of version 1 and 2
MOST_HEADER = 16 << 20  # bytes that Arrow reads of a header
MOST_DEPTH = 8


def check_footer(file: Any) -> None:
    """Refuse an open table whose footer would fill memory: Arrow takes 16 times its bytes.

    Raises: ImageError unreadable.
    """
    length = file.seek(0, os.SEEK_END)
    file.seek(max(0, length - 8))
    told = int.from_bytes(file.read(4), "little")
    if limits.MOST_FOOTER < told < length:
        raise ImageError("unreadable", "list")
    file.seek(0)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the pages of some columns of a row group take. Units: bytes; rows."""

    largest: int  # unpacked
    readable: int | None = None  # rows before the first page that is too large, if there is one


def measure(path: str | None, facts: Any, columns: Sequence[str]) -> Sizes:
    """Return what the pages of a row group take; only a local file's headers are looked at.

    What is damaged is left for Arrow to find.
    """
    found = []
    for number in range(facts.num_columns):
        chunk = facts.column(number)
        if chunk.path_in_schema not in columns:
            continue
        told = max(0, chunk.total_uncompressed_size)
        if max(0, chunk.total_compressed_size) + told <= limits.MOST_KEPT:
            found.append(Sizes(told))
        elif path is not None:
            with open(path, "rb") as file, suppress(EOFError, ValueError, OverflowError, OSError):
                found.append(measure_pages(file, chunk))
    ends = [each.readable for each in found if each.readable is not None]
    return Sizes(max((each.largest for each in found), default=0), min(ends, default=None))


def measure_pages(file: BinaryIO, chunk: Any) -> Sizes:
    """Return what the pages of a column take, up to the first that is too large.

    Arrow holds a page packed and unpacked, and then a dictionary's values twice.

    Raises: EOFError or ValueError for a damaged header.
    """
    starts = [chunk.data_page_offset, chunk.dictionary_page_offset]
    place = min(start for start in starts if start is not None)
    end, rows, largest = place + chunk.total_compressed_size, 0, 0
    while place < end:
        file.seek(place)
        header = read_struct(file, 0)
        kind, unpacked, packed = (header.get(field) for field in (KIND, UNPACKED, PACKED))
        if not (isinstance(unpacked, int) and isinstance(packed, int)) or packed < 0:
            raise ValueError("a damaged header")
        if file.tell() - place > MOST_HEADER:
            raise ValueError("a damaged header")
        beside = 0 if chunk.compression == "UNCOMPRESSED" else packed
        if unpacked + max(beside, unpacked if kind == DICTIONARY else 0) > limits.MOST_OF_PAGE:
            return Sizes(largest, rows)
        largest = max(largest, unpacked)
        for field in COUNTED:
            counts = header.get(field)
            rows += counts.get(1, 0) if isinstance(counts, dict) else 0
        place = file.tell() + packed
    return Sizes(largest)


def read_struct(file: BinaryIO, depth: int) -> dict[int, Any]:
    """Return the whole numbers and structs of a Thrift struct by their fields; others are passed.

    Raises: EOFError or ValueError for a damaged one.
    """
    if depth > MOST_DEPTH:
        raise ValueError("nested too deep")
    found: dict[int, Any] = {}
    field = 0
    while head := read_byte(file):
        field = field + (head >> 4) if head >> 4 else read_number(file)
        value = read_value(file, head & 15, depth)
        if value is not None:
            found[field] = value
    return found


def read_value(file: BinaryIO, kind: int, depth: int) -> Any:
    """Return a whole number or a struct; None for what is passed over."""
    if kind in NUMBER_KINDS:
        return read_number(file)
    if kind == STRUCT:
        return read_struct(file, depth + 1)
    if kind == BINARY:
        length = read_length(file)
        if length > MOST_HEADER:
            raise ValueError("a damaged header")
        file.seek(length, 1)
    elif kind in LISTS:
        head = read_byte(file)
        count = head >> 4 if head >> 4 < 15 else read_length(file)
        for _ in range(count):
            if head & 15 in BOOLS:
                read_byte(file)
            else:
                read_value(file, head & 15, depth + 1)
    elif kind in (BYTE, DOUBLE):
        file.seek(1 if kind == BYTE else 8, 1)
    elif kind not in BOOLS:  # whose value is in their kind
        raise ValueError("no such kind")
    return None


def read_byte(file: BinaryIO) -> int:
    """Return the next byte."""
    data = file.read(1)
    if not data:
        raise EOFError
    return data[0]


def read_length(file: BinaryIO) -> int:
    """Return a whole number that is not negative: seven bits a byte, the lowest first."""
    value = 0
    for shift in range(0, 70, 7):
        byte = read_byte(file)
        value |= (byte & 127) << shift
        if byte < 128:
            return value
    raise ValueError("too long")


def read_number(file: BinaryIO) -> int:
    """Return a whole number whose lowest bit is its sign."""
    value = read_length(file)
    return (value >> 1) ^ -(value & 1)
