"""Memory that runs out, by limits of the system: point 9 of issue 16."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_towers
from features import contents
from rotten import write_good
from small_checkpoint import write_checkpoint
from transformers import CLIPImageProcessorPil, Dinov2Config, Dinov2Model

import packvit
from packvit.checkpoints.errors import CheckpointError
from packvit.out_of_memory import (
    free_host_memory,
    free_in_groups,
    is_out_of_memory,
    suppressed,
)


def write_huge(folder: Path, part: float) -> Path:
    """Write a DINOv2 that takes this part of the machine's memory, in a file without content."""
    held = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    width = 8192
    layers = int(part * held / 2 / (12 * width**2)) + 1
    config = Dinov2Config(hidden_size=width, num_hidden_layers=layers, num_attention_heads=64)
    with torch.device("meta"):
        model = Dinov2Model(config)
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        size = 2 * tensor.numel()
        header[name] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    written = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(written).to_bytes(8, "little") + written)
        file.truncate(8 + len(written) + end)
    described = config.to_dict() | {"architectures": ["Dinov2Model"]}
    (folder / "config.json").write_text(json.dumps(described))
    return folder


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (0.6, r"The weights of .* take [\d.]+ GiB, but cpu has only [\d.]+ GiB free"),
        (2.1, r"model\.safetensors takes [\d.]+ GiB, more than this process can have"),
    ],
)
def test_a_model_that_is_too_large_is_said_before_it_is_loaded(
    tmp_path: Path, part: float, said: str
):
    with pytest.raises(CheckpointError, match=said):
        packvit.load(write_huge(tmp_path, part), device="cpu")


RUN = "ulimit {kind} {limit}; exec {python} -m packvit {words}"


def run(kind: str, limit: int, *words: object) -> subprocess.CompletedProcess[str]:
    """Run a command that may map ("-v") or hold ("-d") so many MiB."""
    line = RUN.format(
        kind=kind, limit=limit << 10, python=sys.executable, words=" ".join(map(str, words))
    )
    env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=env)


@pytest.mark.parametrize(
    "words",
    [
        ("embed", "photos", "--out", "out"),
        ("pca", "photos/good-0000.jpg", "--out", "pca.png"),
        ("verify", "--quick", "--family", "dinov2"),
        ("bench", "--model", "tiny"),
        ("info",),
        ("convert", "model", "out", "--layout", "transformers"),
        ("check", "features"),
        ("merge", "one", "two", "--out", "out"),
        ("search", "features", "cat", "--out", "out"),
        ("dups", "features", "--out", "out"),
        ("zeroshot", "features", "--labels", "cat,dog", "--out", "out.parquet"),
        ("evaluate", "knn", "features"),
        ("warmup", "model"),
    ],
)
def test_every_command_says_in_a_sentence_that_memory_ran_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
):
    monkeypatch.chdir(tmp_path)
    write_good(Path("photos"), 1)
    check_refused(run("-v", 300, *words))  # what is imported alone needs more


def check_refused(done: subprocess.CompletedProcess[str]) -> None:
    """Check that a command ended with one sentence, and left nothing half written."""
    assert done.returncode == 1, (done.args, done.stderr)
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert re.match("Error: (Memory ran out. Choose a smaller model|The weights of .* take)", last)
    assert not [path for path in Path().iterdir() if path.name.startswith(("out", ".out"))]


@pytest.mark.soak
@pytest.mark.parametrize("limit", [("-v", 1260), ("-d", 320), ("-d", 420), ("-d", 550)])
def test_memory_that_runs_out_in_the_middle_is_said_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: tuple[str, int]
):
    monkeypatch.chdir(tmp_path)
    two_towers.build("clip").save_pretrained("model")
    two_towers.write_clip_tokenizer(Path("model"))
    side = {"height": 70, "width": 70}
    processor = CLIPImageProcessorPil(size={"shortest_edge": 70}, crop_size=side)
    processor.save_pretrained("model")
    write_good(Path("photos/cat"), 6)
    write_good(Path("photos/dog"), 6)
    packvit.embed("photos", out="features", model="model", device="cpu")
    for part in ("1/2", "2/2"):
        out = f"shard{part[0]}"
        packvit.embed("photos", out=out, model="model", device="cpu", shard=part, rows_per_part=3)
    whole, refused = contents(Path("features")), []
    for words in (
        ("embed", "photos", "--model", "model", "--out", "out"),
        ("convert", "model", "out", "--layout", "transformers"),
        ("check", "features"),
        ("merge", "shard1", "shard2", "--out", "out"),
        ("search", "features", "cat", "--out", "out.jpg"),
        ("dups", "features", "--out", "out.jpg"),
        ("zeroshot", "features", "--labels", "cat,dog", "--out", "out.parquet"),
        ("evaluate", "knn", "features"),
    ):
        done = run(*limit, *words)
        if done.returncode:
            check_refused(done)
            refused.append(words[0])
        shutil.rmtree("out", ignore_errors=True)  # what needs little may end well
        for name in ("out.jpg", "out.parquet"):
            Path(name).unlink(missing_ok=True)
    assert refused
    assert contents(Path("features")) == whole


HALVE = """
import sys, numpy as np, torch, packvit
from dataclasses import replace
from packvit.corpus.decode.prepare import Prepared
from packvit.corpus.encode.packs import encode_halved
from packvit.corpus.folder.rows import Row
from packvit.corpus.inputs.limits import limited_memory
from packvit.corpus.settings import EmbedOptions
torch.set_num_threads(1)
encoder = packvit.load(sys.argv[1], device="cpu")
def prepared(rows, columns):
    row = Row(f"{rows}", frames=1, rows=rows, columns=columns)
    return Prepared(row, np.zeros((rows * columns, encoder.config.patch_dim), np.uint8))
images = [prepared(64, 64) for _ in range(8)] + [prepared(300, 300)]
encode_halved(encoder, images[:1], EmbedOptions())  # what the libraries take once
with limited_memory(int(sys.argv[2]) << 20):
    done, _, packs = encode_halved(encoder, images, EmbedOptions())
print([each.row.status for each in done], packs)
"""


def test_a_pack_is_halved_on_a_cpu_and_one_image_that_is_too_large_is_a_row(tmp_path: Path):
    checkpoint = write_checkpoint(tmp_path)
    argv = [sys.executable, "-c", HALVE, str(checkpoint), "150"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    statuses, _, packs = done.stdout.strip().rpartition(" ")
    assert statuses == str(["ok"] * 8 + ["out_of_memory"])
    assert int(packs) > 2


def test_what_a_control_group_and_those_around_it_may_take_bounds_what_is_free(tmp_path: Path):
    group = tmp_path / "a" / "b"
    group.mkdir(parents=True)
    named = tmp_path / "named"
    named.write_text("0::/a/b\n")
    for folder, most, current, cached in ((group, "max", 5, 1), (group.parent, "1000", 700, 100)):
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.current").write_text(f"{current}\n")
        (folder / "memory.stat").write_text(f"anon 3\ninactive_file {cached}\n")
    assert free_in_groups(tmp_path, named) == [400]
    assert free_in_groups(tmp_path / "none", named) == []
    free = free_host_memory()
    assert free is None or 0 < free <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_other_errors_are_not_taken_for_a_want_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8, device="cpu")
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"), suppressed():
        raise RuntimeError("shapes do not match")
    with suppressed():
        bytes(2**50)
