"""A pack of prepared images to what the encoder says of each, also where memory is short.

A pack is launched and landed: between the two the device computes, and the host does other work.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from packvit.corpus.decode.prepare import Prepared
from packvit.corpus.folder.parts import DtypeOut
from packvit.corpus.folder.rows import Row
from packvit.corpus.settings import Options
from packvit.encoder import Encoder
from packvit.packs.features import image_means

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


@dataclass(frozen=True, slots=True, eq=False)
class OnDevice:
    """An image that was decoded on the device: its row, and its patches [rows * columns, P]."""

    row: Row
    patches: Tensor


Fed = Prepared | OnDevice  # whose patches are there, if it is no error
# Returns all images of a pack fed, or None if memory has no room for their patches.
Feed = Callable[[Sequence[Prepared]], Sequence[Fed] | None]


@dataclass(frozen=True, slots=True)
class Encoded:
    """What the encoder says of one image: pooled [D] float32, lists {name: [tokens, D]}.

    Of an error it says nothing.
    """

    row: Row
    pooled: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    lists: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Flight:
    """A pack under way: host tensors that are filled once `end` has come, at once if it is None.

    `rows` are those of all images, and `lengths` their tokens: 0 of an error, which is not in it.

    Shapes: pooled [N, D]; lists [T, D] under each name; finite, fits [T] under each name.
    """

    rows: tuple[Row, ...]
    lengths: tuple[int, ...]
    pooled: Tensor
    lists: dict[str, Tensor]
    finite: dict[str, Tensor]  # whether all of a token's numbers are
    fits: dict[str, Tensor]  # whether they still are in the type that is stored
    start: torch.cuda.Event | None
    end: torch.cuda.Event | None
    seconds: float  # of launching: all of the work, where nothing is under way


@torch.inference_mode()
def launch(encoder: Encoder, images: Sequence[Fed], options: Options) -> Flight:
    """Begin to encode images as one pack; on a GPU, without waiting for it.

    Raises: torch.OutOfMemoryError or MemoryError if they do not fit.
    """
    began = time.perf_counter()
    rows = tuple(image.row for image in images)
    good = [image for image in images if image.patches is not None]
    if not good:
        return Flight(
            rows,
            (0,) * len(rows),
            torch.empty(0, 0, dtype=torch.float32, device="cpu"),
            {},
            {},
            {},
            None,
            None,
            0.0,
        )
    start = end = None
    if encoder.device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(torch.cuda.current_stream(encoder.device))
    features = encoder.encode(
        lay(good, encoder.device),
        torch.tensor(
            [[1, image.row.rows, image.row.columns] for image in good],
            dtype=torch.int64,
            device="cpu",
        ),
        taps=options.taps,
    )
    lengths = [image.row.patches for image in good]
    pooled = features.pooled
    pooled = image_means(features.tokens, lengths) if pooled is None else pooled.float()
    lists = {"tokens": features.tokens} if options.tokens else {}
    lists |= {f"tap_{layer}": features.taps[layer] for layer in options.taps}
    stored = {name: t.to(getattr(torch, options.dtype_out)) for name, t in lists.items()}
    flight = Flight(
        rows=rows,
        lengths=tuple(0 if image.patches is None else image.row.patches for image in images),
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


def lay(images: Sequence[Fed], device: torch.device) -> Tensor:
    """Lay the patches of images end to end on the device; those on the host go over in one copy.

    Shapes: [T, P].
    """
    cut = [image.patches for image in images if image.patches is not None]
    on_host = [patches for patches in cut if isinstance(patches, np.ndarray)]
    if not on_host:
        return torch.cat([patches for patches in cut if isinstance(patches, Tensor)])
    sent = torch.empty(
        (sum(map(len, on_host)), on_host[0].shape[1]),
        dtype=torch.uint8,
        device="cpu",
        pin_memory=device.type == "cuda",
    )
    np.concatenate(on_host, out=sent.numpy())
    sent = sent.to(device, non_blocking=True)
    if len(on_host) == len(cut):
        return sent
    arriving = iter(sent.split([len(patches) for patches in on_host]))
    return torch.cat([each if isinstance(each, Tensor) else next(arriving) for each in cut])


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
    rows = [row for row, tokens in zip(flight.rows, flight.lengths, strict=True) if tokens]
    if not rows:
        return [Encoded(row) for row in flight.rows], seconds
    lengths = [tokens for tokens in flight.lengths if tokens]
    starts = list(accumulate(lengths[:-1], initial=0))
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
    encoded = iter(
        Encoded(
            settle(row, bool(finite[i]), bool(fits[i]), dtype_out),
            vectors[i],
            {name: parts[i] for name, parts in arrays.items()},
        )
        for i, row in enumerate(rows)
    )
    both = zip(flight.rows, flight.lengths, strict=True)
    return [next(encoded) if tokens else Encoded(row) for row, tokens in both], seconds


def as_they_are(images: Sequence[Prepared]) -> Sequence[Fed]:
    """Feed images whose patches are there."""
    return images


def encode_halved(
    encoder: Encoder, images: Sequence[Prepared], options: Options, feed: Feed = as_they_are
) -> tuple[list[Encoded], float, int]:
    """Encode images one after another in as many packs as memory needs; nothing else is under way.

    What does not fit is halved, in its order, and tried again; an image that does not fit by itself
    becomes an error. Returns also the seconds it took and how many packs were made of it.
    """
    whole = encode_whole(encoder, images, options, feed)
    if whole is not None:
        return *whole, 1
    if encoder.graphs is not None:
        encoder.graphs.forget()  # whose memory it may want
    if encoder.device.type == "cuda":
        torch.cuda.empty_cache()
    if len(images) == 1:
        row = replace(images[0].row, status="out_of_memory", stage="encode", note=None)
        return [Encoded(row)], 0.0, 1
    middle = len(images) // 2
    left = encode_halved(encoder, images[:middle], options, feed)
    right = encode_halved(encoder, images[middle:], options, feed)
    return left[0] + right[0], left[1] + right[1], left[2] + right[2]


def encode_whole(
    encoder: Encoder, images: Sequence[Prepared], options: Options, feed: Feed
) -> tuple[list[Encoded], float] | None:
    """Encode images as one pack, and return the seconds it took too; None if they do not fit.

    A function of its own: its tensors, and those in the frames of an exception, must go before
    anything else is tried.
    """
    with suppress(*OUT_OF_MEMORY):
        fed = feed(images)
        if fed is not None:
            return land(launch(encoder, fed, options), options.dtype_out)
    return None


def settle(row: Row, finite: bool, fits: bool, dtype_out: DtypeOut) -> Row:
    """Return the row as it is, or as the error that its features make it."""
    if not finite:
        return replace(row, status="non_finite", stage="encode", note=None)
    if not fits:
        return replace(row, status="overflow", stage="encode", note=f"beyond {dtype_out}")
    return row
