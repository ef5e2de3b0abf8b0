"""From a shard's inputs to its committed part: the unit of work, whoever hands it out.

`run_shard` is what a runner calls. The table it commits is a function of the shard's inputs, the
encoder and the options alone: packs are planned from the images' sizes, in the order of the inputs,
so the same shard gives the same bytes again on the same machine.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from packvit.config import ImageConfig, PatchOrder
from packvit.corpus.folder import Commit, commit
from packvit.corpus.inputs import Input
from packvit.corpus.parts import DtypeOut, build_table
from packvit.corpus.rows import Row
from packvit.corpus.settings import Options
from packvit.encoder import Encoder
from packvit.images import ImageError, decode, read_file
from packvit.packing import plan_packs
from packvit.preprocessing import to_patches

AHEAD = 2  # images decoded ahead for each thread: enough to keep it busy, few enough to hold


@dataclass(frozen=True, slots=True)
class Shard:
    """Inputs that become one part: its number, and its rows in their order."""

    number: int
    inputs: tuple[Input, ...]


@dataclass(frozen=True, slots=True)
class Prepared:
    """An input's row, and its patches [rows * columns, P] where it is not an error."""

    row: Row
    patches: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """What the encoder says of one image: pooled [D] float32, lists {name: [tokens, D]}."""

    row: Row
    pooled: np.ndarray
    lists: dict[str, np.ndarray]


# Called with the rows that are settled since the last call.
Watch = Callable[[Sequence[Row]], None]


def run_shard(
    encoder: Encoder,
    shard: Shard,
    folder: Path,
    options: Options,
    watch: Watch,
    *,
    mends: bool = False,
) -> Commit:
    """Embed a shard, commit its part to `folder`, and return its line of the log.

    The commit runs in a thread of its own. Interrupts reach the main thread alone, which then
    waits for it, so that none can cut it in half. `mends`: the log has later parts already.

    Raises: WriteError if the disk does not take it.
    """
    table = embed_shard(encoder, shard.inputs, options, watch)
    with ThreadPoolExecutor(1, "packvit-commit") as writer:
        return writer.submit(commit, folder, shard.number, table, mends=mends).result()


def embed_shard(
    encoder: Encoder, inputs: Sequence[Input], options: Options, watch: Watch
) -> pa.Table:
    """Return the table of `inputs`: a row for each, in their order, whatever became of it."""
    rows: list[Row] = []
    places: list[int] = []  # which row each image is that could be decoded
    patches: dict[int, np.ndarray] = {}  # of the rows that wait for their pack
    outputs = options.outputs(encoder.config.width)
    pooled = np.zeros((len(inputs), outputs.width), np.float32)
    lists: dict[str, list[np.ndarray | None]] = {n: [None] * len(inputs) for n in outputs.lists}

    def lengths() -> Iterator[int]:
        for place, prepared in enumerate(prepare_all(encoder, inputs, options)):
            rows.append(prepared.row)
            if prepared.patches is None:
                watch([prepared.row])
                continue
            places.append(place)
            patches[place] = prepared.patches
            # Where nothing bounds an image, one beyond the budget fills a pack by itself.
            yield min(len(prepared.patches), options.token_budget)

    for pack in plan_packs(lengths(), options.token_budget):
        chosen = [places[image] for image in pack]
        images = [Prepared(rows[place], patches.pop(place)) for place in chosen]
        for place, encoded in zip(chosen, encode_pack(encoder, images, options), strict=True):
            rows[place], pooled[place] = encoded.row, encoded.pooled
            if encoded.row.status == "ok":
                for name, values in encoded.lists.items():
                    lists[name][place] = values
        watch([rows[place] for place in chosen])
    assert [row.id for row in rows] == [source.id for source in inputs]
    return build_table(outputs, rows, pooled, lists)


def prepare_all(encoder: Encoder, inputs: Sequence[Input], options: Options) -> Iterator[Prepared]:
    """Yield all inputs prepared, in their order, a few decoded ahead of the one asked for."""
    ahead: deque[Future[Prepared]] = deque()
    with decoders(options.threads) as pool:
        for source in inputs:
            ahead.append(pool.submit(prepare, source, encoder.images, encoder.patch_order, options))
            if len(ahead) > AHEAD * options.threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


@contextmanager
def decoders(threads: int) -> Iterator[Executor]:
    """Run decode threads; Pillow lets go of the interpreter while it decodes and resizes.

    Left early, they finish the images they hold and begin no other.
    """
    pool = ThreadPoolExecutor(threads, "packvit-decode")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def prepare(source: Input, images: ImageConfig, order: PatchOrder, options: Options) -> Prepared:
    """Read, decode, resize and cut one input; whatever is wrong with it ends in its row."""
    row = Row(source.id)
    if source.error:
        code, stage = source.error
        return Prepared(replace(row, status=code, stage=stage))
    try:
        data = read_file(source.path)
        row = replace(row, sha256=hashlib.sha256(data).hexdigest())
        photo = decode(data, max_pixels=options.max_pixels)
        row = replace(row, note=photo.note, width=photo.width, height=photo.height)
        cut = to_patches(
            photo.image,
            images,
            resize=options.resize,
            max_patches=options.max_patches,
            patch_order=order,
        )
    except ImageError as error:
        return Prepared(replace(row, status=error.code, stage=error.stage, note=error.note))
    except MemoryError:
        stage = "read" if row.sha256 is None else "decode" if row.width is None else "resize"
        return Prepared(replace(row, status="out_of_memory", stage=stage, note=None))
    except Exception as error:
        error.add_note(f"While preparing the input {source.id!r}")
        raise
    return Prepared(replace(row, frames=1, rows=cut.rows, columns=cut.columns), cut.patches)


@torch.inference_mode()
def encode_pack(encoder: Encoder, images: Sequence[Prepared], options: Options) -> list[Encoded]:
    """Encode images as one pack, and take the result apart on the host.

    A row whose features are not all finite numbers becomes an error.
    """
    cut = [image.patches for image in images if image.patches is not None]
    lengths = [len(patches) for patches in cut]
    features = encoder.encode(
        torch.from_numpy(np.concatenate(cut)).to(encoder.device),
        torch.tensor([[1, image.row.rows, image.row.columns] for image in images]),
        taps=options.taps,
    )
    pooled = features.pooled
    pooled = image_means(features.tokens, lengths) if pooled is None else pooled.float()
    lists = {"tokens": features.tokens} if options.tokens else {}
    lists |= {f"tap_{layer}": features.taps[layer] for layer in options.taps}

    starts = list(accumulate(lengths[:-1], initial=0))
    vectors = pooled.cpu().numpy()
    finite, fits = np.logical_and.reduce(np.isfinite(vectors), 1), np.ones(len(images), bool)
    arrays: dict[str, list[np.ndarray]] = {}
    for name, tokens in lists.items():
        stored = tokens.to(getattr(torch, options.dtype_out))
        finite &= all_finite(tokens, starts)
        fits &= all_finite(stored, starts)
        arrays[name] = np.split(stored.cpu().numpy(), starts[1:])
    return [
        Encoded(
            settle(image.row, bool(finite[i]), bool(fits[i]), options.dtype_out),
            vectors[i],
            {name: parts[i] for name, parts in arrays.items()},
        )
        for i, image in enumerate(images)
    ]


def image_means(tokens: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the mean of each image's tokens in fp32, in one call that adds in a fixed order.

    `index_add` would add in whatever order a GPU's threads arrive.

    Shapes: tokens [T, D], lengths N host ints that sum to T -> [N, D].
    """
    counts = torch.tensor(lengths, device=tokens.device)
    return torch.segment_reduce(tokens.float(), "mean", lengths=counts, unsafe=True)


def all_finite(tokens: Tensor, starts: Sequence[int]) -> np.ndarray:
    """Return for each image whether all its tokens, from `starts` on, are finite: [N] bools."""
    return np.logical_and.reduceat(tokens.isfinite().all(1).cpu().numpy(), starts)


def settle(row: Row, finite: bool, fits: bool, dtype_out: DtypeOut) -> Row:
    """Return the row as it is, or as the error that its features make it."""
    if not finite:
        return replace(row, status="non_finite", stage="encode", note=None)
    if not fits:
        return replace(row, status="overflow", stage="encode", note=f"beyond {dtype_out}")
    return row
