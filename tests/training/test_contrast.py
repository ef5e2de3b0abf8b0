"""Contrastive training: the loss around a ring of processes is the loss of one."""

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ring
import rotten
import torch
import two_towers
from torch.multiprocessing.spawn import start_processes
from torch.nn.utils import parameters_to_vector
from transformers import SiglipImageProcessorPil, SiglipModel

import packvit
from packvit.text.saving import save_towers
from recipes.sigmoid import sigmoid_loss


def expected() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The paper's loss of all pairs at once, in float64."""
    images, texts, scale, bias = given = [part.double().requires_grad_() for part in ring.draw()]
    logits = images @ texts.T * scale + bias
    signs = 2 * torch.eye(ring.PAIRS, dtype=torch.float64) - 1
    loss = -torch.log(torch.sigmoid(signs * logits)).sum() / ring.PAIRS
    return loss.detach(), list(torch.autograd.grad(loss, given))


@pytest.mark.parametrize("processes", [1, 3])
def test_the_loss_around_the_ring_and_its_gradients_are_the_papers(tmp_path: Path, processes: int):
    if processes == 1:
        images, texts, scale, bias = given = [part.requires_grad_() for part in ring.draw()]
        loss = sigmoid_loss(images, texts, scale, bias)
        said = [(loss.detach(), torch.autograd.grad(loss / ring.PAIRS, given))]
    else:
        start_processes(ring.run_process, (processes, str(tmp_path)), processes)
        said = [torch.load(tmp_path / str(rank)) for rank in range(processes)]
    wanted, gradients = expected()
    total = sum(loss for loss, _ in said) / ring.PAIRS
    assert abs(total - wanted) <= 1e-6 * wanted
    for place in range(2):  # of images and texts: each process has its own
        for rank in range(processes):
            found = said[rank][1][place]
            exact = gradients[place][rank::processes]
            assert (found - exact).abs().max() <= 1e-6 * exact.abs().max()
    for place in (2, 3):  # of scale and bias: a share each
        found = torch.stack([parts[place] for _, parts in said]).sum(0)
        assert (found - gradients[place]).abs() <= 1e-6 * gradients[place].abs()


def test_both_towers_are_written_as_the_checkpoint_they_came_from(tmp_path: Path):
    model = two_towers.build("siglip")
    model.save_pretrained(tmp_path / "model")
    two_towers.write_clip_tokenizer(tmp_path / "model")
    encoder, text = packvit.load(tmp_path / "model"), packvit.load_text(tmp_path / "model")
    with torch.no_grad():
        for parameter in [*encoder.parameters(), *text.parameters()]:
            parameter.mul_(2)
    save_towers(tmp_path / "saved", encoder, text)
    kind: Any = SiglipModel
    again, info = kind.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values())
    before = model.state_dict()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, 2 * before[name]), name
    read = packvit.load_text(tmp_path / "saved")
    assert torch.equal(read.logit_bias or torch.zeros(1), 2 * before["logit_bias"])
    assert read.embed(["a cat"]).shape == (1, read.width)
    other = two_towers.build("siglip", seed=1)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="from different checkpoints"):
        save_towers(tmp_path / "none", packvit.load(tmp_path / "other"), text)


def configure(tmp_path: Path, out: str) -> Path:
    if not (tmp_path / "photos").exists():
        rotten.write_good(tmp_path / "photos", 9)
        two_towers.build("siglip").save_pretrained(tmp_path / "model")
        side = {"height": 70, "width": 70}
        SiglipImageProcessorPil(size=side).save_pretrained(tmp_path / "model")
        # As ids are all a tower sees, any tokenizer serves.
        two_towers.write_gemma_tokenizer(tmp_path / "model")
        files = sorted((tmp_path / "photos").iterdir())
        with (tmp_path / "pairs.csv").open("w", newline="") as file:
            rows = [(f"photos/{path.name}", f"photograph {n}") for n, path in enumerate(files)]
            csv.writer(file).writerows([("image", "text"), *rows])
    path = tmp_path / f"{out}.toml"
    path.write_text(
        f"""
pairs = "{tmp_path / "pairs.csv"}"
model = "{tmp_path / "model"}"
out = "{tmp_path / out}"
epochs = 6
batch = 4
rate = 3e-4
warmup = 2
weight_decay = 0.0
save_every = 4
seed = 0
bf16 = false
locked = false
checkpointed = true
"""
    )
    return path


def train(path: Path, processes: int) -> list[float]:
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(several if processes > 1 else []), "-m", "recipes.contrast"]
    done = subprocess.run([*command, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with (path.with_suffix("") / "log.csv").open(newline="") as log:
        return [float(row["loss"]) for row in csv.DictReader(log)]


@pytest.mark.soak
def test_two_processes_train_both_towers_with_the_losses_of_one(tmp_path: Path):
    one = train(configure(tmp_path, "one"), 1)
    assert len(one) == 12
    assert sum(one[-3:]) < 0.9 * sum(one[:3])
    two = train(configure(tmp_path, "two"), 2)
    assert two == pytest.approx(one, rel=2e-3)
    first, second = (packvit.load_text(tmp_path / out / "model") for out in ("one", "two"))
    begun = packvit.load_text(tmp_path / "model")
    # All together: keys have a bias whose gradient is rounding alone, which Adam makes large.
    mine, other, start = (
        parameters_to_vector(text.parameters()) for text in (first, second, begun)
    )
    assert (mine - other).norm() <= 0.05 * (mine - start).norm()


@pytest.mark.soak
def test_what_was_killed_goes_on_with_the_losses_it_would_have_had(tmp_path: Path):
    expected = train(configure(tmp_path, "whole"), 1)
    path = configure(tmp_path, "cut")
    command = [sys.executable, "-m", "recipes.contrast", str(path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        for line in running.stderr:
            if line.startswith("step 6 "):  # one state at least is saved
                running.kill()
                break
    assert not (tmp_path / "cut" / "model").exists()
    assert train(path, 1) == expected
