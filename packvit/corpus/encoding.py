"""A pack of prepared images to what the encoder says of each, also where memory is short.

A pack is launched and landed: between the two the device computes, and the host does other work.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from packvit.corpus.parts import DtypeOut
from packvit.corpus.preparing import Prepared
from packvit.corpus.rows import Row
from packvit.corpus.settings import Options
from packvit.encoder import Encoder
from packvit.packed import to_device

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


@dataclass(frozen=True, slots=True)
class Encoded:
    """What the encoder says of one image: pooled [D] float32, lists {name: [tokens, D]}."""

    row: Row
    pooled: np.ndarray
    lists: dict[str, np.ndarray]


@dataclass(frozen=True, slots=True, eq=False)
class Flight:
    """A pack under way: host tensors that are filled once `end` has come, at once if it is None.

    Shapes: pooled [N, D]; lists [T, D] under each name; finite, fits [T] under each name.
    """

    rows: tuple[Row, ...]
    lengths: tuple[int, ...]  # tokens of each image
    pooled: Tensor
    lists: dict[str, Tensor]
    finite: dict[str, Tensor]  # whether all of a token's numbers are
    fits: dict[str, Tensor]  # whether they still are in the type that is stored
    start: torch.cuda.Event | None
    end: torch.cuda.Event | None
    seconds: float  # of launching: all of the work, where nothing is under way


@torch.inference_mode()
def launch(encoder: Encoder, images: Sequence[Prepared], options: Options) -> Flight:
    """Begin to encode images as one pack; on a GPU, without waiting for it.

    Raises: torch.OutOfMemoryError or MemoryError if they do not fit.
    """
    began, on_gpu = time.perf_counter(), encoder.device.type == "cuda"
    cut = [image.patches for image in images if image.patches is not None]
    lengths = tuple(len(patches) for patches in cut)
    pack = torch.empty((sum(lengths), cut[0].shape[1]), dtype=torch.uint8, pin_memory=on_gpu)
    np.concatenate(cut, out=pack.numpy())
    start = end = None
    if on_gpu:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(torch.cuda.current_stream(encoder.device))
    features = encoder.encode(
        pack.to(encoder.device, non_blocking=True),
        torch.tensor([[1, image.row.rows, image.row.columns] for image in images]),
        taps=options.taps,
    )
    pooled = features.pooled
    pooled = image_means(features.tokens, lengths) if pooled is None else pooled.float()
    lists = {"tokens": features.tokens} if options.tokens else {}
    lists |= {f"tap_{layer}": features.taps[layer] for layer in options.taps}
    stored = {name: t.to(getattr(torch, options.dtype_out)) for name, t in lists.items()}
    flight = Flight(
        rows=tuple(image.row for image in images),
        lengths=lengths,
        pooled=to_host(pooled),
        lists={name: to_host(tokens) for name, tokens in stored.items()},
        finite={name: to_host(t.isfinite().all(1)) for name, t in lists.items()},
        fits={name: to_host(t.isfinite().all(1)) for name, t in stored.items()},
        start=start,
        end=end,
        seconds=time.perf_counter() - began,
    )
    if end is not None:
        end.record(torch.cuda.current_stream(encoder.device))
    return flight


def to_host(tensor: Tensor) -> Tensor:
    """Copy a tensor to the host, to pinned memory and without waiting where it is on a GPU."""
    return tensor.to("cpu", non_blocking=True)


def land(flight: Flight, dtype_out: DtypeOut) -> tuple[list[Encoded], float]:
    """Wait for a flight and take it apart, and return the seconds that its encoding took.

    A row whose features are not all finite numbers becomes an error.
    """
    seconds = flight.seconds
    if flight.start and flight.end:
        flight.end.synchronize()
        seconds = flight.start.elapsed_time(flight.end) / 1e3
    starts = list(accumulate(flight.lengths[:-1], initial=0))
    vectors = flight.pooled.numpy()
    finite = np.logical_and.reduce(np.isfinite(vectors), 1)
    fits = np.ones(len(starts), bool)
    arrays: dict[str, list[np.ndarray]] = {}
    for name, tokens in flight.lists.items():
        finite &= np.logical_and.reduceat(flight.finite[name].numpy(), starts)
        fits &= np.logical_and.reduceat(flight.fits[name].numpy(), starts)
        # Kept for a whole part: copied from pinned memory, which the next packs need.
        values = tokens.numpy().copy() if flight.end else tokens.numpy()
        arrays[name] = np.split(values, starts[1:])
    encoded = [
        Encoded(
            settle(row, bool(finite[i]), bool(fits[i]), dtype_out),
            vectors[i],
            {name: parts[i] for name, parts in arrays.items()},
        )
        for i, row in enumerate(flight.rows)
    ]
    return encoded, seconds


def encode_halved(
    encoder: Encoder, images: Sequence[Prepared], options: Options
) -> tuple[list[Encoded], float, int]:
    """Encode images one after another in as many packs as memory needs; nothing else is under way.

    What does not fit is halved, in its order, and tried again; an image that does not fit by itself
    becomes an error. Returns also the seconds it took and how many packs were made of it.
    """
    try:
        return *land(launch(encoder, images, options), options.dtype_out), 1
    except OUT_OF_MEMORY:
        pass  # the exception, and the tensors that its frames hold, must go first
    if encoder.device.type == "cuda":
        torch.cuda.empty_cache()
    if len(images) == 1:
        row = replace(images[0].row, status="out_of_memory", stage="encode", note=None)
        return [Encoded(row, np.zeros(0, np.float32), {})], 0.0, 1
    middle = len(images) // 2
    left = encode_halved(encoder, images[:middle], options)
    right = encode_halved(encoder, images[middle:], options)
    return left[0] + right[0], left[1] + right[1], left[2] + right[2]


def image_means(tokens: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the mean of each image's tokens in fp32, in one call that adds in a fixed order.

    `index_add` would add in whatever order a GPU's threads arrive.

    Shapes: tokens [T, D], lengths N host ints that sum to T -> [N, D].
    """
    counts = to_device(np.array(lengths), tokens.device)
    return torch.segment_reduce(tokens.float(), "mean", lengths=counts, unsafe=True)


def settle(row: Row, finite: bool, fits: bool, dtype_out: DtypeOut) -> Row:
    """Return the row as it is, or as the error that its features make it."""
    if not finite:
        return replace(row, status="non_finite", stage="encode", note=None)
    if not fits:
        return replace(row, status="overflow", stage="encode", note=f"beyond {dtype_out}")
    return row
