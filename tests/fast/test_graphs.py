"""Packs by CUDA graphs: the same as without, whatever was replayed before."""

import copy
import pickle
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn
from torch.func import functional_call

from packvit.bench.models import config_of
from packvit.config import HALF_STATISTICS, ImageConfig
from packvit.encoder import Encoder
from packvit.families import FAMILIES, AIMv2Packing
from packvit.fast.graphs import (
    MOST_TOKENS,
    Graphs,
    Recording,
    Size,
    WeightFingerprint,
    fill_table,
    fill_up,
    is_due,
    is_graphable,
    ladder,
    look,
    size_of,
)
from packvit.model.attention import BACKENDS
from packvit.model.memory import Peak
from packvit.packs.grid import frame_table, sequence_lengths
from packvit.packs.places import PatchPlaces
from packvit.packs.segments import Segments

STATISTICS = ImageConfig(14, *HALF_STATISTICS, "bilinear", None)


def test_the_ladder_wastes_at_most_a_token_in_32_of_packs_of_2048_and_more():
    for tokens in range(1, MOST_TOKENS, 7):
        rung = ladder(tokens)
        assert tokens <= rung <= tokens + max(63, tokens // 32)
        assert ladder(rung) == rung
        assert rung % 64 == 0


def test_mean_waste_over_random_packs_is_below_6_percent():
    draw = random.Random(0)
    packs = [draw.randint(1024, 33_000) for _ in range(50)]
    waste = sum(ladder(tokens) for tokens in packs) / sum(packs) - 1
    assert waste <= 0.06


def test_what_fills_a_pack_up_is_sequences_of_its_own():
    [torch_backend] = [b for b in BACKENDS if b.name == "torch"]
    draw = random.Random(1)
    for _ in range(200):
        lengths = tuple(draw.randint(1, 700) for _ in range(draw.randint(1, 9)))
        size = size_of(lengths, [], torch_backend, 0)
        filled = fill_up(lengths, size)
        assert filled[: len(lengths)] == lengths
        assert sum(filled) == size.tokens == ladder(sum(lengths))
        assert len(filled) == size.sequences
        assert max(filled) <= size.longest


def test_what_fills_a_pack_up_has_places_within_the_longest_sequence():
    [torch_backend] = [b for b in BACKENDS if b.name == "torch"]
    grid = ((1, 3, 17), (2, 1, 9), (1, 64, 2))
    lengths = sequence_lengths(grid)
    size = size_of(lengths, [], torch_backend, 0)
    table = torch.from_numpy(fill_table(frame_table(grid), fill_up(lengths, size)))
    found, own = PatchPlaces.from_table(table, size.tokens), PatchPlaces.from_grid(grid)
    assert torch.equal(found.row[: sum(lengths)], own.row)
    assert torch.equal(found.column[: sum(lengths)], own.column)
    assert max(found.row.max(), found.column.max()) < size.longest


def test_copies_and_pickles_come_without_graphs():
    graphs = Graphs()
    graphs.met[size_of((3,), [], BACKENDS[0], 0)] = 1
    assert not copy.deepcopy(graphs).met
    assert not pickle.loads(pickle.dumps(graphs)).met


def encoder_of(kind: str) -> Encoder:
    model = reference.build(kind).to("cuda", torch.bfloat16)
    [family] = [f for f in FAMILIES if model.config.model_type in f.family.model_types]
    return family.from_transformers(model, attention="torch", positions="interpolate")


def draw_packs(encoder: Encoder, count: int) -> list[tuple[Tensor, Tensor]]:
    draw = random.Random(5)
    packs = []
    for seed in range(count):
        images = draw.randint(1, 6)
        grid = [(draw.randint(1, 2), draw.randint(1, 9), draw.randint(1, 9)) for _ in range(images)]
        patches = reference.draw_patches(grid, encoder.config.patch_dim, seed)
        packs.append((patches.cuda(), torch.tensor(grid)))
    return packs


@pytest.mark.gpu
@pytest.mark.parametrize("kind", reference.KINDS)
def test_graphs_change_nothing(kind: str):
    encoder = encoder_of(kind)
    packs = draw_packs(encoder, 12)
    packs[3][0].fill_(float("nan"))  # what it leaves in a graph's memory must not be seen later
    fast = encoder.fast
    assert fast is not None
    assert fast.graphs is not None
    with torch.inference_mode():
        first = [encoder.encode(*pack, taps=[0]) for pack in packs]
        second = [encoder.encode(*pack, taps=[0]) for pack in packs]
        third = [encoder.encode(*pack, taps=[0]) for pack in reversed(packs)][::-1]
        assert fast.graphs.kept
        graphs, fast.graphs = fast.graphs, None
        plain = [encoder.encode(*pack, taps=[0]) for pack in packs]
        fast.graphs = graphs
    for runs in zip(first, second, third, plain, strict=True):
        for get in (lambda f: f.tokens, lambda f: f.taps[0], lambda f: f.prefix):
            one, two, three, without = map(get, runs)
            assert torch.equal(one.nan_to_num(7), two.nan_to_num(7))
            assert torch.equal(one.nan_to_num(7), three.nan_to_num(7))
            # Other sizes may be other kernels: both are within bf16's rounding of each other.
            torch.testing.assert_close(one, without, atol=0.06, rtol=0.02, equal_nan=True)


@pytest.mark.gpu
def test_results_are_the_callers_own():
    encoder = encoder_of("aimv2")
    [(patches, grid), *_] = draw_packs(encoder, 1)
    with torch.inference_mode():
        first = [encoder(patches, grid) for _ in range(3)][-1]
        kept = first.clone()
        encoder(-patches, grid)
    assert torch.equal(first, kept)


@pytest.mark.gpu
def test_changed_weights_are_seen():
    encoder, other = encoder_of("aimv2"), encoder_of("aimv2")
    [(patches, grid), *_] = draw_packs(encoder, 1)
    name = "encoder.layers.0.mlp.down.weight"
    with torch.no_grad():
        other.get_parameter(name).mul_(3)
        before = [encoder(patches, grid) for _ in range(3)][-1]
        wanted = other(patches, grid)
        encoder.get_parameter(name).mul_(3)  # in place
        assert torch.equal(encoder(patches, grid), wanted)
        assert not torch.equal(before, wanted)
        encoder.load_state_dict(encoder_of("aimv2").state_dict(), assign=True)
        for _ in range(3):
            assert torch.equal(encoder(patches, grid), before)


@pytest.mark.gpu
def test_training_makes_no_graphs():
    encoder = encoder_of("aimv2")
    [(patches, grid), *_] = draw_packs(encoder, 1)
    for _ in range(3):
        encoder(patches, grid).float().square().mean().backward()
    assert encoder.fast is not None
    assert encoder.fast.graphs is not None
    assert not encoder.fast.graphs.met
    assert all(parameter.grad is not None for parameter in encoder.encoder.parameters())


@pytest.mark.parametrize("change", ["assigned", "swapped", "replaced", "watched", "moved"])
def test_what_graphs_were_recorded_of_is_told_from_what_is_now(change: str):
    encoder: Any = AIMv2Packing.from_transformers(reference.build("aimv2", is_native=True))
    modules = tuple(encoder.modules())
    assert all(map(is_graphable, modules))
    before = look(modules)
    assert look(modules) == before
    block = encoder.encoder.layers[1]
    other = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    if change == "assigned":
        nn.ModuleDict({"tower": encoder}).load_state_dict(
            {f"tower.{name}": tensor for name, tensor in other.items()}, assign=True
        )
    elif change == "replaced":
        block.mlp.down = copy.deepcopy(block.mlp.down)
    elif change == "watched":
        block.register_forward_hook(lambda module, given, out: None)
        assert not is_graphable(block)
    elif change == "moved":
        block.mlp.down.weight.data = block.mlp.down.weight.data.clone()
    else:
        seen = []
        encoder.forward = lambda *given: seen.append(look(modules)) or given[0]
        functional_call(encoder, other, (torch.zeros(1, 588), [(1, 1, 1)]))
        assert seen != [before]
        return
    assert look(modules) != before


def test_what_others_wrap_is_never_recorded():
    class Foreign(nn.Linear):
        """As an adapter is: a module of another package."""

    assert not is_graphable(Foreign(2, 2))


def recording(size: Size, bytes: int = 0) -> Recording:
    """What is to be recorded, of a module that is never run."""
    never: Any = lambda *given: None  # noqa: E731 # of a type that is not its own
    return Recording(
        never, [], None, Segments.from_lengths((3,)), size, nn.Linear(2, 2), None, bytes
    )


def test_what_a_size_took_no_room_for_is_not_tried_again(monkeypatch: pytest.MonkeyPatch):
    graphs, size = Graphs(), size_of((3,), [], BACKENDS[0], 0)
    tried: list[Any] = []

    def record(*given):
        tried.append(given)
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(graphs, "record", record)
    for _ in range(3):
        assert not graphs.keep(recording(size))
    assert len(tried) == 1


def test_a_size_without_room_for_its_activations_is_not_recorded(monkeypatch: pytest.MonkeyPatch):
    graphs, size, tried = Graphs(), size_of((3,), [], BACKENDS[0], 0), []
    monkeypatch.setattr(graphs, "record", tried.append)
    monkeypatch.setattr("packvit.fast.graphs.free_memory", lambda device: 4000)
    assert not graphs.keep(recording(size, bytes=1001))
    assert not tried
    assert graphs.keep(recording(size._replace(tokens=65), bytes=1000))
    assert len(tried) == 1


def test_sizes_that_come_and_go_are_recorded_ever_less_often():
    due = [met for met in range(1, 1000) if is_due(met)]
    assert due[:2] == [2, 4]
    assert len(due) <= 9


class Product(nn.Module):
    """A product, and graphs of it that remember where its weights were, as those of CUDA do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)
        self.graphs = Graphs()

    def forward(self, x: Tensor) -> Tensor:
        run = lambda rows, table, segments: (self.linear(rows[0]), {})  # noqa: E731
        nothing = Peak(0, 0)
        out, _ = self.graphs(run, [x], None, (len(x),), BACKENDS[-1], owner=self, peak=nothing)
        return out


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have a CPU record and replay, and return where the weights of each recording were."""
    places: list[int] = []

    def record(graphs: Graphs, wanted: Recording) -> Any:
        owner: Any = wanted.owner
        weight = owner.linear.weight.detach()
        places.append(weight.data_ptr())
        return weight

    monkeypatch.setattr(Graphs, "record", record)
    monkeypatch.setattr(
        "packvit.fast.graphs.replay", lambda weight, rows, *rest: (rows[0] @ weight.T, {})
    )
    monkeypatch.setattr("packvit.fast.graphs.is_graphable", lambda module: True)
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *device: stream)
    return places


def test_weights_that_others_put_in_their_place_are_seen_after_a_replay(recorded: list[int]):
    model, x = Product().eval(), torch.randn(5, 4)
    parent = nn.ModuleDict({"tower": model})
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(x), x @ model.linear.weight.T)
        assert len(recorded) == 1
        parent.load_state_dict({k: v * 2 for k, v in parent.state_dict().items()}, assign=True)
        for _ in range(3):
            assert torch.equal(model(x), x @ model.linear.weight.T)
        assert len(recorded) == 2
        swapped = {"linear.weight": torch.randn(4, 4)}
        for _ in range(3):
            found = functional_call(model, swapped, (x,))
            assert torch.equal(found, x @ swapped["linear.weight"].T)
        assert torch.equal(model(x), x @ model.linear.weight.T)


def test_what_a_graph_reads_is_kept_until_it_is_forgotten(recorded: list[int]):
    model, x = Product().eval(), torch.randn(5, 4)
    with torch.no_grad():
        for _ in range(2):
            model(x)
        model.linear.weight.data = model.linear.weight.data.clone()
        assert model.graphs.fingerprint is not None
        [kept] = model.graphs.fingerprint.weights
        assert kept.data_ptr() == recorded[0] != model.linear.weight.data_ptr()
        model(x)
    assert model.graphs.fingerprint is None


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("change", ["loaded", "cast", "trained"])
def test_what_moves_or_changes_weights_from_a_parent_forgets_graphs(change: str, copied: bool):
    encoder = AIMv2Packing.from_transformers(reference.build("aimv2", is_native=True))
    if copied:
        encoder = copy.deepcopy(encoder)
    assert encoder.fast is not None
    assert encoder.fast.graphs is not None
    encoder.eval()
    encoder.fast.graphs.fingerprint = WeightFingerprint.of(encoder)
    parent = nn.ModuleDict({"tower": encoder}).eval()
    assert encoder.fast.graphs.fingerprint is not None
    if change == "loaded":
        parent.load_state_dict(parent.state_dict())
    elif change == "cast":
        parent.double()
    else:
        parent.train()
    assert encoder.fast.graphs.fingerprint is None


@pytest.mark.gpu
def test_graphs_of_one_stream_share_the_memory_of_the_largest():
    with torch.device("cuda"):
        config = replace(config_of("aimv2-large"), layers=4)
        encoder = AIMv2Packing(config, STATISTICS).to(torch.bfloat16).eval()
    held = []
    with torch.inference_mode():
        for tokens in (32768, 16384, 24576, 20480):
            patches = torch.randn(tokens, 588, device="cuda", dtype=torch.bfloat16)
            grid = torch.tensor([(1, 32, 32)] * (tokens // 1024))
            for _ in range(2):
                encoder(patches, grid)
            del patches
            torch.cuda.empty_cache()
            held.append(torch.cuda.memory_reserved())
    assert encoder.fast is not None
    assert encoder.fast.graphs is not None
    assert len(encoder.fast.graphs.kept) == 4
    # What a graph of its own memory would hold: 23 KiB a token, where rows and results take 4.
    assert held[-1] - held[0] < 10 * 1024 * (16384 + 24576 + 20480)


def test_a_batch_of_one_length_is_never_filled_up_and_has_a_size_of_its_own():
    [fa4] = [b for b in BACKENDS if b.name == "fa4"]
    batch = (257,) * 8
    size = size_of(batch, [], fa4, 0, batched=True)
    assert fill_up(batch, size) == batch
    assert size != size_of(batch, [], fa4, 0)
    assert size != size_of((257,) * 7 + (250,), [], fa4, 0)
