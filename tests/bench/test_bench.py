import copy
import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from time import sleep
from typing import Any

import pytest
import reference
import torch
import towers
import transformers
from click.testing import CliRunner, Result
from small_checkpoint import write_checkpoint
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from docs.tables import native_table
from packvit.bench import (
    MODELS,
    NATIVE,
    WORKLOADS,
    BenchError,
    BenchOptions,
    NativeBatch,
    models,
    native,
    run,
)
from packvit.bench.accuracy import pictures, plant
from packvit.bench.contenders import Subject, collect, forward_backward
from packvit.bench.measuring import interleave, times_faster
from packvit.bench.native import measure_native
from packvit.bench.ours import OURS, Ours
from packvit.bench.peers import Peer, grouped, one_by_one, padded, peers
from packvit.bench.run import measure
from packvit.bench.table import as_markdown
from packvit.bench.workloads import Workload, encoder_flops, workload
from packvit.cli.bench import bench
from packvit.config import Windows
from packvit.families import FAMILIES, AIMv2Packing, DINOv3ViTPacking, Siglip2NaflexPacking
from packvit.verification.references import write_random

PEERS = peers("transformers")
BASELINE = PEERS[0].title
TITLES = {candidate.title for candidate in (*PEERS, *OURS)}
GRID = ((1, 4, 6), (1, 2, 3), (1, 4, 6), (1, 1, 7))


def silent(words: str) -> None:
    """What is going on is nobody's business here."""


def invoke(*argv: object) -> Result:
    return CliRunner().invoke(bench, [str(word) for word in argv])


@pytest.fixture(scope="module")
def siglip2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small NaFlex checkpoint with a pooling head."""
    folder = tmp_path_factory.mktemp("siglip2")
    family = Siglip2NaflexPacking.family
    write_random(family.reference.variants[0], family, folder, seed=0)
    return folder


@pytest.fixture(scope="module")
def aimv2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small AIMv2-native checkpoint without a head, as the embedded one is."""
    return write_checkpoint(tmp_path_factory.mktemp("aimv2"), head=False)


def subject(model: models.Model, *, train: bool = False) -> Subject:
    patches = reference.draw_patches([*GRID], model.config.patch_dim)
    return Subject(model, Workload("few", "few", GRID, True), patches, False, train)


def test_the_models_and_workloads_of_the_records_are_there():
    assert tuple(models.SIZES) == MODELS
    mixed = workload("mixed", small=False)
    assert (len(mixed.lengths), sum(mixed.lengths)) == (52, 33_739)
    for name in WORKLOADS:
        full, small = workload(name, small=False), workload(name, small=True)
        assert sum(small.lengths) < sum(full.lengths)
        assert small.scaled_down
        assert not full.scaled_down
    tiny = workload("tiny-images", small=False)
    assert len(tiny.lengths) == 2048
    assert {4, 16} <= set(tiny.lengths) <= set(range(4, 17))


@pytest.mark.parametrize(("layers", "full"), [(2, ()), (9, (7,))])
def test_the_first_layers_of_qwen2_5_vl_keep_their_windows(
    monkeypatch: pytest.MonkeyPatch, layers: int, full: tuple[int, ...]
):
    """On a CPU the first two are measured unless asked otherwise, and none of them is full."""
    encoder, architecture, _ = models.SIZES["qwen2.5-vl-vit"]
    small = {"hidden_size": 64, "num_heads": 4, "intermediate_size": 96, "out_hidden_size": 48}
    monkeypatch.setitem(models.SIZES, "qwen2.5-vl-vit", (encoder, architecture, small))
    config = models.build("qwen2.5-vl-vit", layers, torch.device("cpu"), torch.float32).config
    assert (config.layers, config.windows) == (layers, Windows(8, full))


@pytest.mark.parametrize(
    ("encoder", "kind", "changes"),
    [
        (AIMv2Packing, "aimv2", {"is_native": True, "use_head": False}),
        (Siglip2NaflexPacking, "siglip2", {"vision_use_head": False}),
        (DINOv3ViTPacking, "dinov3", {}),
    ],
)
def test_operations_are_those_that_torch_counts(encoder: Any, kind: str, changes: dict[str, Any]):
    ours = encoder.from_transformers(reference.build(kind, **changes))
    patches = reference.draw_patches([*GRID], ours.config.patch_dim)
    flops = encoder_flops(ours.config, GRID)
    with sdpa_kernel(SDPBackend.MATH):  # whose backward computes nothing twice
        with FlopCounterMode(display=False) as forward:
            tokens = ours(patches, torch.tensor(GRID))
        with FlopCounterMode(display=False) as backward:
            tokens.sum().backward()
    assert forward.get_total_flops() == flops.forward
    assert backward.get_total_flops() == flops.backward


@pytest.mark.parametrize("name", ["aimv2", "siglip2"])
def test_all_contenders_compute_the_same(name: str, aimv2: Path, siglip2: Path):
    model = {"aimv2": aimv2, "siglip2": siglip2}[name]
    report = measure(BenchOptions(str(model), ("mixed", "equal"), rounds=2, device="cpu"), silent)
    mixed, equal = report["workloads"]
    for work in (mixed, equal):
        assert work["wrong"] == {}
        assert work["results"].keys() | work["missing"].keys() == TITLES
        assert not work["results"].keys() & work["missing"].keys()
        for entry in work["results"].values():
            assert entry["relative_difference"] < 1e-6
    assert {BASELINE, "transformers, padded", "packvit, sdpa"} <= mixed["results"].keys()
    assert "no two images share a grid" in mixed["missing"]["transformers, grouped by equal grid"]
    assert {BASELINE, "transformers, grouped by equal grid"} <= equal["results"].keys()
    assert "it needs CUDA tensors" in mixed["missing"]["packvit, torch"]


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl"])
def test_towers_run_beside_transformers_own_packs(name: str, tmp_path: Path):
    towers.build(name).save_pretrained(tmp_path)
    report = measure(BenchOptions(str(tmp_path), ("mixed",), rounds=2, device="cpu"), silent)
    [mixed] = report["workloads"]
    assert mixed["wrong"] == {}
    assert {BASELINE, "transformers, packed", "packvit, sdpa"} <= mixed["results"].keys()
    assert "takes no mask" in mixed["missing"]["transformers, padded"]


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl"])
def test_operations_of_towers_are_those_that_torch_counts(name: str):
    model = towers.build(name)
    [family] = [f for f in FAMILIES if model.config.model_type in f.family.model_types]
    ours, grid = family.from_transformers(model), ((1, 10, 20), (2, 4, 6))
    patches = reference.draw_patches([*grid], ours.config.patch_dim)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        ours(patches, torch.tensor(grid))
    assert forward.get_total_flops() == encoder_flops(ours.config, grid).forward


def test_what_computes_something_else_is_called_wrong_and_not_timed(
    monkeypatch: pytest.MonkeyPatch,
):
    swapped = Ours("packvit, channels first", {"patch_order": "chw"})
    monkeypatch.setattr(run, "OURS", (OURS[4], swapped))
    result = invoke("--model", "tiny", "--workload", "small", "--rounds", 2, "--device", "cpu")
    assert result.exit_code == 1
    assert "WRONG, so not timed: packvit, channels first" in result.stdout
    assert f"| {swapped.title}" not in result.stdout


@pytest.mark.parametrize("name", ["aimv2-large", "siglip2-so400m"])
def test_gradients_are_those_of_the_same_sum_however_tokens_are_laid_out(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    encoder, architecture, entries = models.SIZES[name]
    small = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}
    monkeypatch.setitem(models.SIZES, name, (encoder, architecture, entries | small))
    model = models.build(name, 2, torch.device("cpu"), torch.float64)
    given = subject(model, train=True)
    given = Subject(model, given.workload, given.patches.double(), False, True)
    cotangent = torch.randn(len(given.patches), 64, dtype=torch.float64)
    ours = Ours("ours", {"attention": "sdpa"}).build(given)
    found = {}
    for title, contender in {
        "one by one": one_by_one(given),
        "grouped": grouped(given),
        "padded": padded(given),
        "ours": ours,
    }.items():
        forward_backward(contender, cotangent)()
        embedding = next(
            weight
            for key, weight in contender.module.named_parameters()
            if key.endswith(("patch_embed.bias", "patch_embedding.bias", "patches.bias"))
        )
        assert embedding.grad is not None
        found[title] = embedding.grad.clone()
        contender.module.zero_grad(set_to_none=True)
    largest = found["one by one"].abs().max()
    for title, gradient in found.items():  # transformers' RMSNorm is in fp32 whatever it is given
        assert (gradient - found["one by one"]).abs().max() < 1e-5 * largest, title
    with torch.inference_mode():
        tokens = collect(ours, len(given.patches))
        torch.testing.assert_close(
            tokens, collect(padded(given), len(given.patches)), rtol=1e-5, atol=1e-5
        )


def test_forward_and_backward_are_timed_too(aimv2: Path):
    plan = BenchOptions(str(aimv2), ("small",), train=True, rounds=2, device="cpu", clock="cpu")
    report = measure(plan, silent)
    assert "forward and backward, float32, on CPU" in as_markdown(report)
    assert ", in CPU time;" in as_markdown(report)
    [work] = report["workloads"]
    assert report["pass"] == "forward and backward"
    assert work["wrong"] == {}
    assert "packvit, sdpa" in work["results"]


def test_slow_contenders_take_fewer_turns_and_share_them_with_all():
    turns: dict[str, int] = {"quick": 0, "slow": 0}

    def run(name: str) -> None:
        turns[name] += 1

    runs = {name: lambda name=name: run(name) for name in turns}
    taken = interleave(runs, rounds=5, warmup=2, fewer={"slow": 3})
    assert turns == {"quick": 7, "slow": 3}
    assert [len(times) for times in taken] == [2, 2, 2, 1, 1]
    low, middle, high = times_faster(taken, "quick", "slow")
    assert low <= middle <= high


TINY = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every native batch small: narrow models, and few patches that some sides exceed."""
    small: dict[str, NativeBatch] = {}
    for name, row in NATIVE.items():
        encoder, architecture, entries = models.SIZES[row.model]
        patch = entries.get("patch_size", 16 if "so400m" in name else 14)
        changed = entries | TINY
        if architecture != "Dinov2Model":  # which tells a ratio instead
            changed["intermediate_size"] = 100
        side = 6 * patch
        if "image_size" in entries:
            changed["image_size"] = side + 2 if "384" in name else side
        monkeypatch.setitem(models.SIZES, row.model, (encoder, architecture, changed))
        side += 2 if row.model == "siglip-so400m14-384" else 0  # 384 is no multiple of 14
        small[name] = replace(row, side=side)
    monkeypatch.setattr(native, "NATIVE", small)


def test_peers_and_we_compute_the_same_from_pixels_at_every_native_size(
    monkeypatch: pytest.MonkeyPatch,
):
    shrink(monkeypatch)
    plan = BenchOptions(rounds=2, device="cpu")
    reports = list(measure_native(plan, tuple(NATIVE), silent))
    assert [report["row"] for report in reports] == list(NATIVE)
    for report in reports:
        [work] = report["workloads"]
        assert work["wrong"] == {}, report["row"]
        assert {"transformers", "packvit, sdpa", "packvit, invariant"} <= work["results"].keys()
        assert ("timm" in work["results"]) == (find_spec("timm") is not None)
        for entry in work["results"].values():
            assert entry["relative_difference"] < 2e-6
            assert entry["images_per_second"] == pytest.approx(2e3 / entry["median_ms"])


@pytest.mark.parametrize(
    "name", ["clip-l14-quickgelu", "siglip-so400m14-384", "dinov2-b14", "dinov3-b16"]
)
def test_every_family_is_measured_on_mixed_sizes(name: str, monkeypatch: pytest.MonkeyPatch):
    shrink(monkeypatch)
    report = measure(BenchOptions(name, ("mixed",), rounds=2, device="cpu"), silent)
    [work] = report["workloads"]
    assert work["wrong"] == {}
    assert {BASELINE, "packvit, sdpa"} <= work["results"].keys()


@pytest.mark.parametrize("name", ["aimv2-l14-224", "folder"])
def test_a_model_whose_positions_fit_one_grid_is_measured_on_that_grid(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """W5"""
    shrink(monkeypatch)
    if name == "folder":
        encoder, architecture, entries = models.SIZES["aimv2-l14-224"]
        kind = getattr(transformers, architecture)
        encoder.from_transformers(kind(kind.config_class(**entries)).eval()).save_pretrained(
            tmp_path / name
        )
        name = str(tmp_path / name)
    report = measure(BenchOptions(name, ("mixed", "small"), rounds=2, device="cpu"), silent)
    for work in report["workloads"]:
        assert work["wrong"] == {}
        assert work["fewest"] == work["most"] == 36
        assert "own 6 x 6 patches" in work["title"]
        assert {BASELINE, "packvit, sdpa"} <= work["results"].keys()


def test_native_batches_are_written_one_by_one_until_time_runs_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    shrink(monkeypatch)
    words = ("--workload", "native", "--rounds", 2, "--device", "cpu", "--out", tmp_path / "rows")
    two = ("--model", "clip-l14-224", "--model", "aimv2-l14-224")
    done = invoke(*words, *two, "--way", "packvit, sdpa", "--commit", "abc")
    assert done.exit_code == 0, done.stderr
    written = sorted((tmp_path / "rows").iterdir())
    assert [path.name for path in written] == ["aimv2-l14-224-cpu.json", "clip-l14-224-cpu.json"]
    for path in written:
        report = json.loads(path.read_text())
        assert as_markdown(report) in done.stdout
        assert report.keys() >= {"commit", "date", "gpus", "torch", "transformers", "timm"}
        assert report["workloads"][0]["results"].keys() == {"transformers", "packvit, sdpa"}
        assert f"{report['row']}, 2 images" in native_table([report])
        assert ", abc, " in native_table([report])
    late = invoke(*words, *two, "--seconds", 1e-6)
    assert late.exit_code == 0
    assert late.stdout == ""
    assert late.stderr.count("no time was left for it") == 2


def test_what_takes_too_long_is_stopped_and_named(monkeypatch: pytest.MonkeyPatch):
    shrink(monkeypatch)

    def endless(given: Subject) -> Any:
        while True:
            sleep(0.01)

    slow = Peer("endless", endless, 0.05)
    monkeypatch.setattr(native, "AUTOTUNED", (slow,))
    [report] = measure_native(BenchOptions(rounds=2, device="cpu"), ("clip-l14-224",), silent)
    [work] = report["workloads"]
    assert work["missing"]["endless"] == "it took longer than 0.05 s"
    assert "packvit, sdpa" in work["results"]


def test_the_command_prints_a_table_and_writes_a_report(aimv2: Path, tmp_path: Path):
    target = tmp_path / "report.json"
    words = ("--model", aimv2, "--workload", "small", "--rounds", 2, "--device", "cpu")
    done = invoke(*words, "--json", target)
    assert done.exit_code == 0, done.stderr
    report = json.loads(target.read_text())
    assert done.stdout == as_markdown(report) + "\n"
    assert report["weights"] == "the checkpoint's"
    assert report.keys() >= {"date", "packvit", "torch", "transformers", "timm", "gpus", "threads"}
    assert report.keys() >= {"model", "layers", "dtype", "rounds", "baseline", "gpu_state_after"}
    [work] = report["workloads"]
    assert work["results"][work["headline"]["ours"]]["ours"]
    assert not work["results"][work["headline"]["peer"]]["ours"]
    assert work["ceiling_tflops"] > 0
    for title, entry in work["results"].items():
        assert entry["ours"] == title.startswith("packvit")
        assert entry["rounds"] == 2
        low, middle, high = entry["times_faster_than_baseline"]
        assert 0 < low <= middle <= high
    assert "timm NaFlexVit, padded" in work["missing"]
    assert "NaFlexVit has not the positions or MLP of this family" in done.stdout


def test_several_models_are_written_one_by_one_with_the_contenders_asked_for(
    aimv2: Path, tmp_path: Path
):
    small = ("--model", "tiny", "--model", aimv2, "--workload", "small", "--rounds", 2)
    words = (*small, "--device", "cpu", "--way", "packvit, sdpa", "--out", tmp_path / "rows")
    done = invoke(*words)
    assert done.exit_code == 0, done.stderr
    found = {path.name: json.loads(path.read_text()) for path in (tmp_path / "rows").iterdir()}
    assert found.keys() == {"bench-tiny-cpu.json", f"bench-{aimv2.name}-cpu.json"}
    for report in found.values():
        [work] = report["workloads"]
        assert list(work["results"]) == [report["baseline"], "packvit, sdpa"]


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["--rounds", "1"], 2, "--rounds"),
        (["--workload", "vast"], 2, "--workload"),
        (["--model", "tiny", "--layers", "3"], 2, "--layers is for random models only"),
        (["--device", "gpu"], 2, 'device "gpu" cannot be used'),
        (["--json", "nowhere/report.json"], 2, "nowhere is not a folder"),
        (["--way", "ours"], 2, 'No contender is called "ours"'),
        (["--model", "tiny", "--model", "tiny", "--json", "-"], 2, "name a folder by --out"),
        (["--model", "a/x", "--model", "b/x", "--out", "rows"], 2, "Two models have one name"),
        (["--workload", "native", "--model", "tiny"], 2, "No batch is called tiny"),
        (["--workload", "native", "--way", "ours"], 2, 'No contender is called "ours"'),
        (["--workload", "native", "--json", "-"], 2, "name a folder by --out"),
        (["--workload", "native", "--train"], 2, "--train is not measured on native sizes"),
        (["--model", "./nowhere"], 1, "nowhere"),
    ],
)
def test_wrong_use_is_answered_in_a_sentence(argv: list[str], code: int, said: str):
    result = invoke(*argv)
    assert result.exit_code == code
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_plans_that_cannot_be_are_refused():
    plans = (
        BenchOptions(workloads=("vast",)),
        BenchOptions(rounds=1),
        BenchOptions(dtype="int8"),
        BenchOptions(clock="sun"),
    )
    for plan in plans:
        with pytest.raises(BenchError):
            measure(plan, silent)


def test_outliers_that_their_readers_undo_change_nothing_and_others_do():
    encoder = AIMv2Packing.from_transformers(reference.build("aimv2", is_native=True)).double()
    grid = ((1, 3, 5), (1, 2, 2))
    patches = torch.from_numpy(pictures(grid, encoder.config.patch))
    assert patches.shape == (19, encoder.config.patch_dim)
    with torch.inference_mode():
        before = encoder(patches, torch.tensor(grid))
        undone = plant(copy.deepcopy(encoder), undo=True)(patches, torch.tensor(grid))
        left = plant(copy.deepcopy(encoder), undo=False)(patches, torch.tensor(grid))
    torch.testing.assert_close(undone, before, atol=1e-9, rtol=1e-9)
    assert (left - before).norm() > 0.05 * before.norm()
