"""The recipe of distillation: killed and gone on, and on two processes, it has the same losses."""

import csv
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import rotten
import torch
from small_checkpoint import write_checkpoint

import packvit
from packvit.families.aimv2 import AIMv2Packing

RECIPE = Path(__file__).parents[2] / "recipes" / "distil.py"


def configure(tmp_path: Path, out: str, epochs: int) -> Path:
    if not (tmp_path / "photos").exists():
        rotten.write_good(tmp_path / "photos", 7)
        (tmp_path / "photos" / "broken.jpg").write_bytes(b"no photograph")
        write_checkpoint(tmp_path / "small", head=False)
    path = tmp_path / f"{out}.toml"
    path.write_text(
        f"""
photographs = ["{tmp_path / "photos"}"]
teacher = "{tmp_path / "small"}"
student = "{tmp_path / "small"}"
out = "{tmp_path / out}"
epochs = {epochs}
budget = 40
shares = 2
max_patches = 40
rate = 1e-3
warmup = 2
weight_decay = 0.05
save_every = 2
seed = 0
bf16 = false
checkpointed = true
"""
    )
    return path


def train(path: Path, processes: int = 1) -> None:
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(several if processes > 1 else []), str(RECIPE), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "broken.jpg is left out" in done.stderr


def losses(tmp_path: Path, out: str) -> list[float]:
    with (tmp_path / out / "log.csv").open(newline="") as log:
        rows = list(csv.DictReader(log))
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    return [float(row["loss"]) for row in rows]


@pytest.mark.soak
def test_a_student_learns_and_what_was_killed_goes_on_with_the_same_losses(tmp_path: Path):
    train(configure(tmp_path, "whole", 4))
    expected = losses(tmp_path, "whole")
    assert len(expected) >= 6
    assert expected[-1] < expected[0]
    student = packvit.load(tmp_path / "whole" / "student")
    assert isinstance(student, AIMv2Packing)
    start = packvit.load(tmp_path / "small").state_dict()
    assert all(not torch.equal(x, start[name]) for name, x in student.state_dict().items())

    path = configure(tmp_path, "cut", 4)
    command = [sys.executable, str(RECIPE), str(path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        for line in running.stderr:
            if line.startswith("step 4 "):  # one state at least is saved
                running.send_signal(signal.SIGKILL)
                break
    assert not (tmp_path / "cut" / "student").exists()
    train(path)
    assert losses(tmp_path, "cut") == expected


@pytest.mark.soak
@pytest.mark.parametrize("epochs", [10])
def test_two_processes_have_the_losses_of_one_over_20_steps(tmp_path: Path, epochs: int):
    compare_processes(tmp_path, epochs, 20)


@pytest.mark.soak
def test_two_processes_have_the_losses_of_one(tmp_path: Path):
    compare_processes(tmp_path, 3, 4)


def compare_processes(tmp_path: Path, epochs: int, least: int) -> None:
    train(configure(tmp_path, "one", epochs))
    train(configure(tmp_path, "two", epochs), processes=2)
    one, two = losses(tmp_path, "one"), losses(tmp_path, "two")
    assert len(one) == len(two) >= least
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) <= 1e-5
    students = [packvit.load(tmp_path / out / "student") for out in ("one", "two")]
    for ours, theirs in zip(*(s.parameters() for s in students), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
