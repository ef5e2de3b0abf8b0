"""Blocks write to their stream in place, and to nothing of their caller's."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn

from packvit.families import AIMv2Packing
from packvit.fast.steps import STEPS, add_fused
from packvit.model.attention import Workload, resolve
from packvit.model.linear import Linear
from packvit.packs.segments import Segments

GRID = [(1, 3, 4), (2, 2, 5), (1, 1, 7)]
ALL = (0, 1, 2)  # layers
ADDED = 2 * len(ALL)  # in a forward: what attention finds and what the MLP does, of each block


@contextmanager
def in_place() -> Iterator[list[Tensor]]:
    """Have blocks on a CPU do as on CUDA in 16 bits, and yield what their matmuls wrote to."""
    written: list[Tensor] = []

    def add(
        stream: Tensor, tokens: Tensor, linear: Linear, scale: nn.Module
    ) -> tuple[Tensor, None]:
        kept, rest = add_fused(stream, tokens, linear, scale)
        assert kept is stream
        written.append(stream)
        return kept, rest

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "is_cuda", True)
        patch.setattr("packvit.fast.steps.may_fuse", lambda *tensors: True)
        patch.setitem(STEPS["add"], "fused", add)
        yield written


@pytest.fixture(scope="module")
def encoder() -> AIMv2Packing:
    return AIMv2Packing.from_transformers(reference.aimv2(is_native=True).double())


def assert_alike(ours: Tensor | None, theirs: Tensor | None) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_forward_in_place_changes_neither_its_outputs_nor_what_it_was_given(encoder, mode):
    patches, grid = reference.draw_patches(GRID, 588).double(), torch.tensor(GRID)
    given, embedded = patches.clone(), []
    with mode():
        plain = encoder.encode(patches, grid, taps=ALL)
        watch = encoder.embeddings.register_forward_hook(
            lambda module, given, out: embedded.append((out, out.clone()))
        )
        with watch, in_place() as written:
            found = encoder.encode(patches, grid, taps=ALL)
            tokens = encoder(patches, grid)
    assert len(written) == 2 * ADDED
    assert torch.equal(patches, given)
    assert len(embedded) == 2
    for now, before in embedded:
        assert torch.equal(now, before)
    assert torch.equal(tokens, found.tokens)
    assert_alike(found.tokens, plain.tokens)
    assert_alike(found.pooled, plain.pooled)
    for layer in ALL:
        assert_alike(found.taps[layer], plain.taps[layer])


def test_who_watches_a_block_may_keep_what_it_was_given_and_gave(encoder):
    patches, grid = reference.draw_patches(GRID, 588).double(), torch.tensor(GRID)
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, given: tuple[Tensor, ...], out: tuple[Tensor, None]) -> None:
        kept.extend((stream, stream.clone()) for stream in (given[0], out[0]))

    with torch.no_grad(), ExitStack() as watches:
        for block in encoder.encoder.layers:
            watches.enter_context(block.register_forward_hook(keep))
        with in_place():
            found = encoder.encode(patches, grid, taps=ALL)
    for now, before in kept:
        assert torch.equal(now, before)
    for layer in ALL:
        given, gave = kept[2 * layer][0], kept[2 * layer + 1][0]
        assert torch.equal(gave, found.taps[layer])
        assert not torch.equal(given, gave)


@pytest.mark.parametrize("part", ["", "attention_norm", "mlp_norm"])
def test_who_watches_one_module_alone_may_keep_what_it_was_given_and_gave(encoder, part: str):
    patches, grid = reference.draw_patches(GRID, 588).double(), torch.tensor(GRID)
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, given: tuple[Tensor, ...], out: Any) -> None:
        gave = out if part else out[0]
        kept.extend((stream, stream.clone()) for stream in (given[0], gave))

    watched = encoder.encoder.layers[0].get_submodule(part)
    with torch.no_grad():
        plain = encoder(patches, grid)
        with watched.register_forward_hook(keep), in_place():
            found = encoder(patches, grid)
    assert len(kept) == 2
    for now, before in kept:
        assert torch.equal(now, before)
    assert_alike(found, plain)


def test_blocks_leave_the_stream_they_are_given_as_it_was(encoder):
    lengths = (12, 10, 10, 7)
    draw = torch.Generator().manual_seed(0)
    stream = torch.randn(sum(lengths), 64, generator=draw, dtype=torch.float64)
    given = stream.clone()
    backend = resolve("sdpa", Workload(stream.device, stream.dtype, 16))
    segments = Segments.from_lengths(lengths)
    with torch.no_grad():
        plain, plain_taps = encoder.encoder(stream, segments, None, backend, ALL)
        with in_place() as written:
            found, taps = encoder.encoder(stream, segments, None, backend, ALL)
    assert len(written) == ADDED
    assert torch.equal(stream, given)
    assert_alike(found, plain)
    for layer in ALL:
        assert_alike(taps[layer], plain_taps[layer])


def test_with_gradients_on_nothing_is_written(encoder):
    patches, grid = reference.draw_patches(GRID, 588).double(), torch.tensor(GRID)
    with in_place() as written:
        encoder(patches, grid)
    assert not written
