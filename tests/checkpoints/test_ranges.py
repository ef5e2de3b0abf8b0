"""A tower of a large model on the hub: its tensors alone, by HTTP range, equal to the whole's."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import Hub, Repository
from safetensors.torch import load, save
from transformers import Qwen3VLConfig, Qwen3VLModel

import packvit
from packvit.checkpoints.errors import CheckpointError
from packvit.checkpoints.folders import CONFIG, INDEX, WEIGHTS
from packvit.checkpoints.ranges import (
    Place,
    choose_from_file,
    encode_header,
    fetch_tensors,
    read_places,
)

ROOT, COMMIT, NAME = Path(__file__).parents[2], "c" * 40, "Qwen/Qwen3-VL-nano"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")

LOAD = """
import json, sys
import packvit
from packvit.checkpoints.errors import CheckpointError
try:
    encoder = packvit.load(sys.argv[1], device="cpu")
    sums = {name: float(tensor.double().sum()) for name, tensor in encoder.state_dict().items()}
    print(json.dumps({"sums": sums, "files": [str(f) for f in encoder.checkpoint.files]}))
except CheckpointError as error:
    print(json.dumps({"error": str(error)}))
"""


def load_from(hub: Hub, home: Path, **settings: str) -> dict[str, Any]:
    """Load the model in a process of its own, as huggingface_hub's settings ask."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("HF_") and not name.lower().endswith("_proxy")
    }
    ours = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, NAME],
        env=inherited | ours | settings,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def model() -> dict[str, bytes]:
    """A whole Qwen3-VL in two shards, whose tower lies in both."""
    config = Qwen3VLConfig(
        text_config={
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": 20_000,
        },
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 512,
            "depth": 4,
            "num_heads": 4,
            "out_hidden_size": 64,
            "deepstack_visual_indexes": [1],
            "num_position_embeddings": 64,
        },
    )
    torch.manual_seed(0)
    tensors = {f"model.{k}": v.contiguous() for k, v in Qwen3VLModel(config).state_dict().items()}
    names = sorted(tensors)
    shards = {name: SHARDS[number % 2] for number, name in enumerate(names)}
    files = {
        shard: save({name: tensors[name] for name in names if shards[name] == shard})
        for shard in SHARDS
    }
    index = {"metadata": {}, "weight_map": shards}
    return files | {
        CONFIG: json.dumps(config.to_dict()).encode(),
        INDEX: json.dumps(index).encode(),
    }


@pytest.fixture
def hub(model: dict[str, bytes]) -> Iterator[Hub]:
    with Hub() as hub:
        hub.repositories[NAME] = Repository({COMMIT: model}, {"main": COMMIT})
        yield hub


def tower_bytes(model: dict[str, bytes]) -> int:
    tensors = {name: tensor for shard in SHARDS for name, tensor in load(model[shard]).items()}
    return sum(t.nbytes for name, t in tensors.items() if name.startswith("model.visual."))


def sums_of(model: dict[str, bytes], folder: Path) -> dict[str, float]:
    folder.mkdir()
    for name, data in model.items():
        (folder / name).write_bytes(data)
    encoder = packvit.load(str(folder), device="cpu")
    return {name: float(tensor.double().sum()) for name, tensor in encoder.state_dict().items()}


def test_only_the_bytes_of_the_tower_come_over_the_network(
    hub: Hub, model: dict[str, bytes], tmp_path: Path
):
    found = load_from(hub, tmp_path / "home")
    assert found["sums"] == sums_of(model, tmp_path / "whole")
    sent = sum(request.sent for request in hub.requests if "cdn" in request.path)
    headers = sum(8 + int.from_bytes(model[shard][:8], "little") for shard in SHARDS)
    assert sent == tower_bytes(model) + headers
    assert tower_bytes(model) < sum(map(len, model.values())) / 2
    [kept] = found["files"]
    assert all(name.startswith("model.visual.") for name in load(Path(kept).read_bytes()))
    asked = len(hub.requests)
    assert load_from(hub, tmp_path / "home", HF_HUB_OFFLINE="1") == found
    assert len(hub.requests) == asked


def test_a_download_that_was_cut_off_goes_on_where_it_ended(
    hub: Hub, model: dict[str, bytes], tmp_path: Path
):
    found = load_from(hub, tmp_path / "home")
    kept = Path(found["files"][0])
    whole = kept.read_bytes()
    kept.with_name(f"{kept.name}.incomplete").write_bytes(whole[:-1000])
    kept.unlink()
    hub.requests.clear()
    assert load_from(hub, tmp_path / "home") == found
    assert kept.read_bytes() == whole
    headers = sum(8 + int.from_bytes(model[shard][:8], "little") for shard in SHARDS)
    sent = sum(request.sent for request in hub.requests if "cdn" in request.path)
    assert sent == headers + 1000


def test_a_left_over_that_is_longer_than_what_is_wanted_is_not_taken_for_it(tmp_path: Path):
    data, target = save({"x": torch.arange(10.0)}), tmp_path / "kept"

    def request(name: str, start: int, end: int) -> tuple[bytes, int]:
        return data[start:end], len(data)

    chosen = list((read_places(request, "a") or {}).items())
    fetch_tensors(request, chosen, target)
    whole = target.read_bytes()
    target.rename(tmp_path / "kept.incomplete")
    with (tmp_path / "kept.incomplete").open("ab") as file:
        file.write(b"more")
    fetch_tensors(request, chosen, target)
    assert target.read_bytes() == whole
    assert torch.equal(load(whole)["x"], torch.arange(10.0))


def test_a_cache_that_cannot_be_written_is_one_sentence(hub: Hub, tmp_path: Path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "packvit").write_text("in the way")
    said = load_from(hub, tmp_path / "home")["error"]
    assert said.startswith(f"'{NAME}' cannot be written to {tmp_path / 'home' / 'packvit'}/")
    assert ": Not a directory. Free the disk, or set HF_HOME or HF_HUB_CACHE so that" in said


def test_a_mirror_without_ranges_sends_whole_files(
    hub: Hub, model: dict[str, bytes], tmp_path: Path
):
    hub.ranges = False
    found = load_from(hub, tmp_path / "home")
    assert found["sums"] == sums_of(model, tmp_path / "whole")
    assert [Path(file).name for file in found["files"]] == list(SHARDS)


def test_a_tower_can_be_written_as_a_checkpoint_of_its_own(model: dict[str, bytes], tmp_path: Path):
    sums = sums_of(model, tmp_path / "whole")
    packvit.load(str(tmp_path / "whole")).save_pretrained(tmp_path / "tower")
    alone = packvit.load(str(tmp_path / "tower"), device="cpu")
    assert {n: float(t.double().sum()) for n, t in alone.state_dict().items()} == sums


def request_of(files: dict[str, bytes]):
    def request(file: str, start: int, end: int) -> tuple[bytes, int] | None:
        return (files[file][start:end], len(files[file])) if file in files else None

    return request


def test_a_part_of_one_file_is_what_safetensors_reads(tmp_path: Path):
    torch.manual_seed(0)
    tensors = {f"{name}{n}": torch.randn(n, 3) for name in "ab" for n in range(5)}
    files = {WEIGHTS: save(tensors)}
    chosen = choose_from_file(request_of(files), WEIGHTS, lambda names: ["a3", "b0", "b1"])
    assert chosen is not None
    fetch_tensors(request_of(files), chosen, tmp_path / WEIGHTS)
    found = load((tmp_path / WEIGHTS).read_bytes())
    assert sorted(found) == ["a3", "b0", "b1"]
    assert all(torch.equal(found[name], tensors[name]) for name in found)
    assert choose_from_file(request_of(files), WEIGHTS, list) is None  # most of it: the whole
    assert choose_from_file(request_of({}), WEIGHTS, list) is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 16,
        (1 << 40).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{}",
        (4).to_bytes(8, "little") + b"null",
        save({"a": torch.zeros(9)})[:-1],
        save({"a": torch.zeros(9)}) + b"x",
        encode_header([("a", Place("f", 9, 1, "F32", [2]))]),
    ],
)
def test_a_damaged_header_is_one_sentence(data: bytes):
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        read_places(request_of({WEIGHTS: data}), WEIGHTS)


def test_fewer_bytes_than_asked_for_are_refused(tmp_path: Path):
    files = {WEIGHTS: save({"a": torch.zeros(9), "b": torch.zeros(90)})}
    chosen = choose_from_file(request_of(files), WEIGHTS, lambda names: ["a"])
    assert chosen is not None
    files[WEIGHTS] = files[WEIGHTS][: chosen[0][1].end - 1]
    with pytest.raises(CheckpointError, match=r"35 bytes of model\.safetensors for 36"):
        fetch_tensors(request_of(files), chosen, tmp_path / WEIGHTS)
    assert not (tmp_path / WEIGHTS).exists()


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"[" * 100_000,
        b"{",
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1000000000000]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}',
        b'{"a": 5}',
    ],
)
def test_a_header_that_lies_about_its_file_is_refused(header: bytes):
    whole = len(header).to_bytes(8, "little") + header + bytes(4)

    def request(file: str, start: int, end: int) -> tuple[bytes, int]:
        return whole[start:end], len(whole)

    with pytest.raises(CheckpointError, match="its header does not fit its"):
        read_places(request, "model.safetensors")
