"""CUDA graphs of the blocks, for packs so small that launching kernels takes longer than they do.

A graph replays on the memory it was recorded with, so packs are filled up to sizes of a ladder, and
what fills them up attends to itself alone. A size is recorded when it is met for the second time.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection
from threading import Lock
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from packvit.attention import Backend
from packvit.packed import Segments

MOST_TOKENS = 4096  # above it an H100 computes AIMv2-large longer than the host launches it
KEPT = 32  # graphs; they share one pool of memory

Turns = tuple[Tensor, Tensor]
Run = Callable[..., tuple[Tensor, dict[int, Tensor]]]


def ladder(tokens: int) -> int:
    """Return the next size of the ladder: 16 to 32 steps an octave, 64 tokens at the least.

    So at most 1 token in 16 is filling, and half of that on average.
    """
    step = max(64, 1 << max(0, (tokens - 1).bit_length() - 5))
    return -(-tokens // step) * step


class Size(NamedTuple):
    """What a graph is recorded for."""

    tokens: int
    sequences: int
    longest: int
    taps: tuple[int, ...]
    backend: str
    rotary: bool
    stream: int  # the CUDA stream, since two would write one memory at once


class Graph(NamedTuple):
    """A recorded graph, and the memory it reads and writes."""

    graph: torch.cuda.CUDAGraph
    hidden_states: Tensor
    seams: Tensor
    turns: Turns | None
    out: Tensor
    taps: dict[int, Tensor]


def size_of(
    segments: Segments, taps: Collection[int], backend: Backend, rotary: bool, stream: int
) -> Size:
    """Return the size whose graph serves a pack."""
    tokens = ladder(segments.tokens)
    longest = 1 << (segments.max_seqlen - 1).bit_length()
    filling = -(-(tokens - segments.tokens) // longest)
    sequences = 1 << (len(segments.lengths) + filling - 1).bit_length()
    return Size(tokens, sequences, longest, tuple(sorted(taps)), backend.name, rotary, stream)


def fill_up(segments: Segments, size: Size, device: torch.device) -> Segments:
    """Return `size.sequences` sequences: the pack's, what fills it up, and empty ones."""
    whole, rest = divmod(size.tokens - segments.tokens, size.longest)
    filling = (size.longest,) * whole + ((rest,) if rest else ())
    empty = size.sequences - len(segments.lengths) - len(filling)
    filled = Segments.from_lengths((*segments.lengths, *filling, *(0,) * empty), device=device)
    return Segments(filled.lengths, filled.cu_seqlens, size.longest)


class Graphs:
    """The graphs of one stack of blocks, the most recently used ones."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.forget()

    def forget(self) -> None:
        """Keep nothing: what was recorded reads weights where they were."""
        self.kept: OrderedDict[Size, Graph] = OrderedDict()
        self.met: Counter[Size] = Counter()
        self.pool = None

    def __call__(
        self,
        run: Run,
        hidden_states: Tensor,
        segments: Segments,
        turns: Turns | None,
        backend: Backend,
        taps: Collection[int] = (),
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Return what `run` returns of the pack filled up, by a graph where there is one.

        With or without a graph it is the same kernels on the same sizes, so the same bits.
        """
        tokens, stream = len(hidden_states), torch.cuda.current_stream().cuda_stream
        size = size_of(segments, taps, backend, turns is not None, stream)
        filled = fill_up(segments, size, hidden_states.device)
        with self.lock:
            self.met[size] += 1
            if self.met[size] == 1:
                turns = turns and (pad(turns[0], size), pad(turns[1], size))
                out, tapped = run(pad(hidden_states, size), filled, turns, backend, size.taps)
                return out[:tokens], {layer: tap[:tokens] for layer, tap in tapped.items()}
            if size not in self.kept:
                with torch.inference_mode(False), torch.no_grad():  # so that both modes may replay
                    self.kept[size] = self.record(run, hidden_states, filled, turns, backend, size)
                while len(self.kept) > KEPT:
                    self.kept.popitem(last=False)
            self.kept.move_to_end(size)
            return replay(self.kept[size], hidden_states, filled, turns)

    def record(
        self,
        run: Run,
        hidden_states: Tensor,
        filled: Segments,
        turns: Turns | None,
        backend: Backend,
        size: Size,
    ) -> Graph:
        """Record the blocks at `size`, on memory of the graph's own."""
        memory = pad(hidden_states, size).clone()
        seams = Segments(filled.lengths, filled.cu_seqlens.clone(), size.longest)
        angles = turns and (pad(turns[0], size).clone(), pad(turns[1], size).clone())
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):  # what libraries set up on first use must not be recorded
            run(memory, seams, angles, backend, size.taps)
        here.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        # This thread's mistakes alone count: another one may be decoding JPEGs meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            out, tapped = run(memory, seams, angles, backend, size.taps)
        return Graph(graph, memory, seams.cu_seqlens, angles, out, tapped)

    def __reduce__(self) -> tuple[type["Graphs"], tuple[()]]:
        """Copy and travel empty: what was recorded belongs to one encoder's memory."""
        return Graphs, ()


def pad(rows: Tensor, size: Size) -> Tensor:
    """Fill up with zeros. Shapes: [T, any] -> [size.tokens, any]."""
    return F.pad(rows, (0, 0, 0, size.tokens - len(rows)))


def replay(
    graph: Graph, hidden_states: Tensor, filled: Segments, turns: Turns | None
) -> tuple[Tensor, dict[int, Tensor]]:
    """Copy a pack into the graph's memory, run it, and copy the results out."""
    tokens = len(hidden_states)
    graph.hidden_states[:tokens].copy_(hidden_states)
    graph.hidden_states[tokens:].zero_()  # what an earlier pack left there could be NaN
    graph.seams.copy_(filled.cu_seqlens, non_blocking=True)
    for memory, given in zip(graph.turns or (), turns or (), strict=True):
        memory[:tokens].copy_(given)
    graph.graph.replay()
    return graph.out[:tokens].clone(), {at: tap[:tokens].clone() for at, tap in graph.taps.items()}
