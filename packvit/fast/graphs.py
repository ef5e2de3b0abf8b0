"""CUDA graphs of a forward, which spare the host its launches and the device the time between them.

A graph replays on the memory it was recorded with, so packs are filled up to sizes of a ladder, and
what fills them up attends to itself alone. A size is recorded when it is met for the second time;
one that had to make room for others since, when it is met for the fourth, the eighth, and so on:
recording costs two forwards, which sizes that come and go would not earn back.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from threading import RLock
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packvit.fast.attention import is_batch
from packvit.fast.hooks import is_hooked
from packvit.model.attention import MOST_SEQUENCES, Backend
from packvit.model.memory import Peak, free_memory
from packvit.packs.grid import to_device
from packvit.packs.segments import Segments, make_cu_seqlens

MOST_TOKENS = 2**16  # at half of it AIMv2-large is still 6 % faster on an H100, in bf16 and in fp8
KEPT_TOKENS = 2**18  # of all graphs kept: each holds what it reads and writes, 4 D bytes a token
SHARE = 4  # of the memory that is free, the part that a graph's activations may take: a quarter

# Takes tensors of a row a token, a table of the frames where one is wanted, and the cu_seqlens.
Run = Callable[[Sequence[Tensor], Tensor | None, Segments], tuple[Tensor, dict[int, Tensor]]]


def ladder(tokens: int) -> int:
    """Return the next size of the ladder: 32 to 64 steps an octave, 64 tokens at the least.

    So at most 1 token in 32 is filling, and half of that on average.
    """
    step = max(64, 1 << max(0, (tokens - 1).bit_length() - 6))
    return -(-tokens // step) * step


class Size(NamedTuple):
    """What a graph is recorded for."""

    tokens: int
    sequences: int
    longest: int
    taps: tuple[int, ...]
    backend: str
    batched: bool  # sequences of one length, which are never filled up
    stream: int  # the CUDA stream, since two would write one memory at once


class Graph(NamedTuple):
    """A recorded graph, and the memory it reads and writes."""

    graph: torch.cuda.CUDAGraph
    rows: tuple[Tensor, ...]
    table: Tensor | None
    cu_seqlens: Tensor
    held: Tensor | None  # what it reads besides weights
    out: Tensor
    taps: dict[int, Tensor]


class Recording(NamedTuple):
    """What is to be recorded: a run at a size, and what it is given."""

    run: Run
    rows: Sequence[Tensor]  # filled up, as the table and the cu_seqlens are
    table: Tensor | None
    segments: Segments
    size: Size
    owner: nn.Module  # the encoder whose weights the run reads
    held: Tensor | None  # what it reads besides
    bytes: int  # that the run may hold at its peak, beside weights


class WeightFingerprint(NamedTuple):
    """What graphs were recorded of: an encoder's modules but itself, and what they were then."""

    modules: tuple[nn.Module, ...]
    seen: list[int]
    weights: tuple[Tensor, ...]  # kept, so that graphs find something there until forgotten

    @classmethod
    def of(cls, owner: nn.Module) -> "WeightFingerprint":
        """Look at an encoder as it is."""
        held = (*owner.parameters(), *owner.buffers())
        modules = tuple(owner.modules())
        return cls(modules[1:], look(modules), tuple(tensor.detach() for tensor in held))

    def matches(self, owner: nn.Module) -> bool:
        """Return whether an encoder is still what it was."""
        return look((owner, *self.modules)) == self.seen


def look(modules: Iterable[nn.Module]) -> list[int]:
    """Return what tells modules from others: parts, weights, and whether they are watched.

    Weights come and go in ways that leave no other trace: assigned by a parent's `load_state_dict`,
    swapped by `functional_call`, adapted by LoRA.
    """
    seen: list[int] = []
    for module in modules:
        seen += map(id, module._modules.values())
        held = (*module._parameters.values(), *module._buffers.values())
        seen += [tensor.data_ptr() for tensor in held if tensor is not None]
        seen.append(is_hooked(module))
    return seen


def is_due(met: int) -> bool:
    """Return whether a size is to be recorded that was met so often without a graph."""
    return met > 1 and met.bit_count() == 1


def is_graphable(module: nn.Module) -> bool:
    """Return whether a module does nothing but what its weights say: ours or torch's, unwatched."""
    return type(module).__module__.split(".")[0] in ("packvit", "torch") and not is_hooked(module)


def size_of(
    lengths: Sequence[int],
    taps: Collection[int],
    backend: Backend,
    stream: int,
    *,
    batched: bool = False,
) -> Size:
    """Return the size whose graph serves a pack of sequences of so many tokens each."""
    total, asked = sum(lengths), tuple(sorted(taps))
    if batched:
        return Size(total, len(lengths), lengths[0], asked, backend.name, True, stream)
    tokens = ladder(total)
    longest = 1 << (max(lengths) - 1).bit_length()
    filling = -(-(tokens - total) // longest)
    sequences = 1 << (len(lengths) + filling - 1).bit_length()
    return Size(tokens, sequences, longest, asked, backend.name, False, stream)


def fill_up(lengths: Sequence[int], size: Size) -> tuple[int, ...]:
    """Return `size.sequences` lengths: the pack's, of what fills it up, and of empty sequences."""
    whole, rest = divmod(size.tokens - sum(lengths), size.longest)
    filling = (size.longest,) * whole + ((rest,) if rest else ())
    empty = size.sequences - len(lengths) - len(filling)
    return (*lengths, *filling, *(0,) * empty)


def fill_table(table: np.ndarray, filled: Sequence[int]) -> np.ndarray:
    """Return the table of frames of a filled pack: what fills it up are frames of one row."""
    lengths = np.array(filled)
    more = np.array([np.ones_like(lengths), lengths, lengths.cumsum() - lengths])
    return np.concatenate([table, more[:, table.shape[1] :]], axis=1)


class Graphs:
    """The graphs of one encoder, the most recently used ones."""

    def __init__(self) -> None:
        self.lock = RLock()
        self.too_large: set[Size] = set()  # for the memory there was
        self.forget()

    def forget(self) -> None:
        """Keep nothing: what was recorded reads weights where they were."""
        with self.lock:
            self.kept: OrderedDict[Size, Graph] = OrderedDict()
            self.met: Counter[Size] = Counter()
            # By the stream that replays, whose graphs never run at the same time: their memory, and
            # the stream that records them, for another one could not use it again.
            self.pools: dict[int, tuple[Any, torch.cuda.Stream]] = {}
            self.fingerprint: WeightFingerprint | None = None

    def serve(self, x: Tensor, backend: Backend) -> bool:
        """Return whether packs such as `x` may run by graphs: in inference, if not too large."""
        return (
            x.is_cuda
            and len(x) <= MOST_TOKENS
            and backend.varlen
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled(x.device.type)
            and torch.cuda.is_available()  # fake tensors, which calls are counted with, need no GPU
            and not torch.cuda.is_current_stream_capturing()
        )

    def __call__(
        self,
        run: Run,
        rows: Sequence[Tensor],
        table: np.ndarray | None,
        lengths: Sequence[int],
        backend: Backend,
        taps: Collection[int] = (),
        *,
        owner: nn.Module,
        invariant: bool = False,
        held: Tensor | None = None,
        peak: Peak,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Return what `run` returns of the pack filled up, by a graph where there is one.

        `owner` is the encoder whose weights `run` reads, `held` what it reads besides, `peak` what
        it takes. With or without a graph it is the same kernels on the same sizes, so the same
        bits.
        """
        tokens, device = len(rows[0]), rows[0].device
        stream = torch.cuda.current_stream().cuda_stream
        batched = is_batch(lengths) and not invariant
        size = size_of(lengths, taps, backend, stream, batched=batched)
        filled = fill_up(lengths, size)
        frames = None if table is None else fill_table(table, filled)
        with self.lock:
            if size in self.kept:
                self.kept.move_to_end(size)
                found = replay(self.kept[size], rows, frames, filled)
                # Looked at while the device is at work: it takes the host a third of a millisecond.
                if self.fingerprint and self.fingerprint.matches(owner):
                    return found
                self.forget()
            elif self.fingerprint and not self.fingerprint.matches(owner):
                self.forget()
            self.met[size] += 1
            given = [pad(row, size) for row in rows]
            on_device = None if frames is None else to_device(frames, device)
            segments = Segments.from_lengths(filled, device=device)
            segments = Segments(filled, segments.cu_seqlens, size.longest)
            most = peak.activations(size.tokens)
            wanted = Recording(run, given, on_device, segments, size, owner, held, most)
            if is_due(self.met[size]) and self.keep(wanted):
                return replay(self.kept[size], rows, frames, filled)
            out, tapped = run(given, on_device, segments)
            return out[:tokens], {layer: tap[:tokens] for layer, tap in tapped.items()}

    def keep(self, wanted: Recording) -> bool:
        """Record a run and keep it, or say that it is not to be.

        Where memory is short nothing is kept, and the size not tried again.
        """
        size, owner = wanted.size, wanted.owner
        if size in self.too_large:
            return False
        if size.sequences > MOST_SEQUENCES and not size.batched:
            return False  # they take several launches, and which token is the first of each varies
        if not all(map(is_graphable, owner.modules())):
            self.met[size] -= 1  # as soon as it may be
            return False
        if SHARE * wanted.bytes > (free_memory(wanted.segments.cu_seqlens.device) or 0):
            self.too_large.add(size)
            return False
        try:
            with torch.inference_mode(False), torch.no_grad():  # so that both modes may replay
                self.kept[size] = self.record(wanted)
        except torch.OutOfMemoryError:
            self.too_large.add(size)
            self.forget()
            return False
        self.fingerprint = WeightFingerprint.of(owner)
        while sum(kept.tokens for kept in self.kept) > KEPT_TOKENS:
            self.kept.popitem(last=False)
        return True

    def record(self, wanted: Recording) -> Graph:
        """Record a run, on memory of the graph's own."""
        run, size, segments = wanted.run, wanted.size, wanted.segments
        rows = tuple(row.clone() for row in wanted.rows)
        table = None if wanted.table is None else wanted.table.clone()
        static = Segments(segments.lengths, segments.cu_seqlens.clone(), size.longest)
        if size.stream not in self.pools:
            self.pools[size.stream] = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        pool, side = self.pools[size.stream]
        here = torch.cuda.current_stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):  # what libraries set up on first use must not be recorded
            run(rows, table, static)
        here.wait_stream(side)
        if torch.cuda.mem_get_info(static.cu_seqlens.device)[0] < wanted.bytes:
            torch.cuda.empty_cache()  # which the allocator cannot do by itself while it records
        graph = torch.cuda.CUDAGraph()
        # Not `torch.cuda.graph`, which always empties the cache: 0.4 s of the first second of a
        # job on an H200. This thread's mistakes alone count: another one may be decoding JPEGs.
        with torch.cuda.stream(side):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                out, tapped = run(rows, table, static)
            finally:
                graph.capture_end()
        return Graph(graph, rows, table, static.cu_seqlens, wanted.held, out, tapped)

    def __reduce__(self) -> tuple[type["Graphs"], tuple[()]]:
        """Copy and travel empty: what was recorded belongs to one encoder's memory."""
        return Graphs, ()


def pad(rows: Tensor, size: Size) -> Tensor:
    """Fill up with zeros. Shapes: [T, any] -> [size.tokens, any]."""
    return F.pad(rows, (0, 0, 0, size.tokens - len(rows)))


def replay(
    graph: Graph, rows: Sequence[Tensor], table: np.ndarray | None, filled: Sequence[int]
) -> tuple[Tensor, dict[int, Tensor]]:
    """Copy a pack into the graph's memory, run it, and copy the results out."""
    tokens = len(rows[0])
    for memory, row in zip(graph.rows, rows, strict=True):
        memory[:tokens].copy_(row)
        memory[tokens:].zero_()  # what an earlier pack left there could be NaN
    graph.cu_seqlens.copy_(torch.from_numpy(make_cu_seqlens(filled)), non_blocking=True)
    if graph.table is not None and table is not None:
        graph.table.copy_(torch.from_numpy(table), non_blocking=True)
    graph.graph.replay()
    return graph.out[:tokens].clone(), {at: tap[:tokens].clone() for at, tap in graph.taps.items()}
