"""Read the weights and the nodes of an ONNX file, which is a protocol buffer: no package needed.

Source: the wire format, protobuf.dev/programming-guides/encoding; the fields, onnx 1.23,
onnx/onnx.proto.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

VARINT, EIGHT_BYTES, LENGTH, FOUR_BYTES = 0, 1, 2, 5  # wire types
GRAPH = 7  # of a model
NODE, INITIALIZER = 1, 5  # of a graph
INPUT, NAME, OPERATOR = 1, 3, 4  # of a node
DIMS, DATA_TYPE, TENSOR_NAME, RAW_DATA = 1, 2, 8, 9  # of a tensor
FLOAT = 1  # of data types


class Node(NamedTuple):
    """One operation."""

    name: str
    operator: str
    inputs: tuple[str, ...]


class Graph(NamedTuple):
    """A file's operations, and its tensors of float32 by their names."""

    nodes: tuple[Node, ...]
    tensors: dict[str, NDArray[np.float32]]


def read_graph(path: Path) -> Graph:
    """Return what is in a file; tensors of other kinds are left out.

    Raises: ValueError for bytes that are no protocol buffer.
    """
    nodes: list[Node] = []
    tensors: dict[str, NDArray[np.float32]] = {}
    for field, graph in fields(memoryview(path.read_bytes())):
        if field != GRAPH or isinstance(graph, int):
            continue
        for kind, message in fields(graph):
            if kind == NODE and not isinstance(message, int):
                nodes.append(read_node(message))
            elif kind == INITIALIZER and not isinstance(message, int):
                tensors |= read_tensor(message)
    return Graph(tuple(nodes), tensors)


def read_node(message: memoryview) -> Node:
    """Return one operation."""
    words: dict[int, list[str]] = {INPUT: [], NAME: [""], OPERATOR: [""]}
    for field, value in fields(message):
        if field in words and not isinstance(value, int):
            words[field].append(str(value, "utf-8"))
    return Node(words[NAME][-1], words[OPERATOR][-1], tuple(words[INPUT]))


def read_tensor(message: memoryview) -> dict[str, NDArray[np.float32]]:
    """Return one tensor by its name, or nothing for one that is not of raw float32."""
    shape: list[int] = []
    name, kind, raw = "", 0, memoryview(b"")
    for field, value in fields(message):
        if isinstance(value, int):
            shape += [value] if field == DIMS else []
            kind = value if field == DATA_TYPE else kind
        elif field == DIMS:  # all in one
            shape += list(varints(value))
        elif field == TENSOR_NAME:
            name = str(value, "utf-8")
        elif field == RAW_DATA:
            raw = value
    if kind != FLOAT or not raw:
        return {}
    return {name: np.frombuffer(raw, "<f4").reshape(shape)}


def fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield the number and the value of each field: a number, or bytes.

    Raises: ValueError for bytes that are no protocol buffer.
    """
    place = 0
    while place < len(message):
        key, place = varint(message, place)
        field, kind = divmod(key, 8)
        if kind == VARINT:
            value, place = varint(message, place)
            yield field, value
            continue
        if kind == LENGTH:
            length, place = varint(message, place)
        elif kind in (EIGHT_BYTES, FOUR_BYTES):
            length = 8 if kind == EIGHT_BYTES else 4
        else:
            raise ValueError(f"The file holds wire type {kind}, so it is no ONNX file.")
        if place + length > len(message):
            raise ValueError("The file ends within a field. Fetch it again.")
        yield field, message[place : place + length]
        place += length


def varint(message: memoryview, place: int) -> tuple[int, int]:
    """Return a number written in seven bits a byte, and the place behind it."""
    value = 0
    for count, byte in enumerate(message[place : place + 10]):
        value |= (byte & 127) << 7 * count
        if byte < 128:
            return value, place + count + 1
    raise ValueError("The file ends within a number. Fetch it again.")


def varints(message: memoryview) -> Iterator[int]:
    """Yield numbers that are written one behind the other."""
    place = 0
    while place < len(message):
        value, place = varint(message, place)
        yield value
