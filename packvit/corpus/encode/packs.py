"""Encode a pack of prepared images; split it where memory is short.

`submit` starts a pack and `collect` waits for its results: in between the device computes, and the
host does other work.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from packvit.corpus.decode.prepare import Prepared
from packvit.corpus.folder.parts import DtypeOut
from packvit.corpus.folder.rows import Row
from packvit.corpus.settings import EmbedOptions
from packvit.encoder import Encoder
from packvit.out_of_memory import suppressed


@dataclass(frozen=True, slots=True, eq=False)
class OnDevice:
    """An image that was decoded on the device: its row, and its patches [rows * columns, P]."""

    row: Row
    patches: Tensor


Ready = Prepared | OnDevice  # an image whose patches are there, or an error
# Returns the images of a pack with their patches, or None if these do not fit in memory.
MakeReady = Callable[[Sequence[Prepared]], Sequence[Ready] | None]


@dataclass(frozen=True, slots=True)
class Encoded:
    """The features of one image: vectors {name: [D]}, lists {name: [tokens, D]}.

    Both are empty for an error.
    """

    row: Row
    vectors: dict[str, np.ndarray] = field(default_factory=dict)
    lists: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class PendingPack:
    """A submitted pack: host tensors that are filled once the event `end` has passed.

    `end` is None if they are filled already. `rows` are those of all images, `lengths` their
    tokens: 0 for an error, which is not encoded.

    Shapes: vectors [N, D] and lists [T, D] under each name; finite and fits under each name, [N] of
    vectors and [T] of lists.
    """

    rows: tuple[Row, ...]
    lengths: tuple[int, ...]
    vectors: dict[str, Tensor]
    lists: dict[str, Tensor]
    finite: dict[str, Tensor]  # whether all numbers of a vector, or of a token, are finite
    fits: dict[str, Tensor]  # whether they still are in the dtype that is written
    start: torch.cuda.Event | None
    end: torch.cuda.Event | None
    seconds: float  # that submitting took: all of the work on a CPU


@torch.inference_mode()
def submit(encoder: Encoder, images: Sequence[Ready], options: EmbedOptions) -> PendingPack:
    """Start to encode images as one pack; on a GPU, do not wait for it.

    Raises: what `is_out_of_memory` tells if they do not fit.
    """
    began = time.perf_counter()
    rows = tuple(image.row for image in images)
    good = [image for image in images if image.patches is not None]
    if not good:
        return PendingPack(
            rows,
            (0,) * len(rows),
            {},
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
        merged=encoder.merger is not None,
        projected=options.text_space == "projected",
    )
    vectors = {"pooled": replace(features, projected=None).vectors()}
    vectors |= {} if features.projected is None else {"projected": features.vectors()}
    lists = {"tokens": features.tokens} if options.tokens else {}
    lists |= {f"tap_{layer}": features.taps[layer] for layer in options.taps}
    kept = {name: t.to(getattr(torch, options.vector_dtype)) for name, t in vectors.items()}
    stored = {name: t.to(getattr(torch, options.dtype_out)) for name, t in lists.items()}
    pending = PendingPack(
        rows=rows,
        lengths=tuple(0 if image.patches is None else image.row.patches for image in images),
        vectors={name: to_host(found) for name, found in kept.items()},
        lists={name: to_host(tokens) for name, tokens in stored.items()},
        finite={n: to_host(t.isfinite().all(1)) for n, t in (vectors | lists).items()},
        fits={n: to_host(t.isfinite().all(1)) for n, t in (kept | stored).items()},
        start=start,
        end=end,
        seconds=time.perf_counter() - began,
    )
    if end is not None:
        end.record(torch.cuda.current_stream(encoder.device))
    return pending


def lay(images: Sequence[Ready], device: torch.device) -> Tensor:
    """Concatenate the patches of images on the device; those on the host are sent in one copy.

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
    """Copy a tensor to the host; from a GPU to pinned memory, without waiting."""
    return tensor.to("cpu", non_blocking=True)


def collect(pending: PendingPack, dtype_out: DtypeOut) -> tuple[list[Encoded], float]:
    """Wait for a pending pack; return the features of its images and the seconds it took.

    A row whose features are not all finite numbers becomes an error.
    """
    seconds = pending.seconds
    if pending.start and pending.end:
        pending.end.synchronize()
        seconds = pending.start.elapsed_time(pending.end) / 1e3
    rows = [row for row, tokens in zip(pending.rows, pending.lengths, strict=True) if tokens]
    if not rows:
        return [Encoded(row) for row in pending.rows], seconds
    lengths = [tokens for tokens in pending.lengths if tokens]
    starts = list(accumulate(lengths[:-1], initial=0))
    vectors = {name: found.numpy() for name, found in pending.vectors.items()}
    finite, fits = (np.ones(len(starts), bool) for _ in range(2))
    for name in vectors:
        finite &= pending.finite[name].numpy()
        fits &= pending.fits[name].numpy()
    arrays: dict[str, list[np.ndarray]] = {}
    for name, tokens in pending.lists.items():
        finite &= np.logical_and.reduceat(pending.finite[name].numpy(), starts)
        fits &= np.logical_and.reduceat(pending.fits[name].numpy(), starts)
        # Kept until the part is whole: copied out of pinned memory, which the next packs need.
        values = tokens.numpy().copy() if pending.end else tokens.numpy()
        arrays[name] = np.split(values, starts[1:])
    encoded = iter(
        Encoded(
            settle(row, bool(finite[i]), bool(fits[i]), dtype_out),
            {name: found[i] for name, found in vectors.items()},
            {name: parts[i] for name, parts in arrays.items()},
        )
        for i, row in enumerate(rows)
    )
    both = zip(pending.rows, pending.lengths, strict=True)
    return [next(encoded) if tokens else Encoded(row) for row, tokens in both], seconds


def as_they_are(images: Sequence[Prepared]) -> Sequence[Ready]:
    """Return images that already have their patches."""
    return images


def encode_halved(
    encoder: Encoder,
    images: Sequence[Prepared],
    options: EmbedOptions,
    make_ready: MakeReady = as_they_are,
) -> tuple[list[Encoded], float, int]:
    """Encode images in as many packs as memory allows; no other pack may be in flight.

    A pack that does not fit is split in two, in order, and tried again; a single image that does
    not fit becomes an error. Returns also the seconds it took and the number of packs.
    """
    whole = encode_whole(encoder, images, options, make_ready)
    if whole is not None:
        return *whole, 1
    if encoder.fast is not None:
        encoder.fast.forget()  # to free the memory of its graphs
    if encoder.device.type == "cuda":
        torch.cuda.empty_cache()
    if len(images) == 1:
        row = replace(images[0].row, status="out_of_memory", stage="encode", note=None)
        return [Encoded(row)], 0.0, 1
    middle = len(images) // 2
    left = encode_halved(encoder, images[:middle], options, make_ready)
    right = encode_halved(encoder, images[middle:], options, make_ready)
    return left[0] + right[0], left[1] + right[1], left[2] + right[2]


def encode_whole(
    encoder: Encoder, images: Sequence[Prepared], options: EmbedOptions, make_ready: MakeReady
) -> tuple[list[Encoded], float] | None:
    """Return the features of images encoded as one pack and the seconds it took, or None.

    None if they do not fit. A function of its own, so that its tensors, and those held by the
    frames of an exception, are freed before another attempt.
    """
    with suppressed():
        ready = make_ready(images)
        if ready is not None:
            return collect(submit(encoder, ready, options), options.dtype_out)
    return None


def settle(row: Row, finite: bool, fits: bool, dtype_out: DtypeOut) -> Row:
    """Return the row, as an error if its features are not finite or overflow dtype_out."""
    if not finite:
        return replace(row, status="non_finite", stage="encode", note=None)
    if not fits:
        return replace(row, status="overflow", stage="encode", note=f"beyond {dtype_out}")
    return row
