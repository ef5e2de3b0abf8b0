"""Distil: a student learns the tokens of a teacher, photographs of any size on packs.

    python recipes/distil.py recipes/distil.toml
    torchrun --nproc-per-node 8 recipes/distil.py recipes/distil.toml

Started again it goes on after the last state it saved, on any number of processes that divides
`shares`, with the losses it would have had.
"""

import csv
import json
import math
import sys
import time
import tomllib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import packvit
from packvit.encoder import Encoder
from packvit.images.errors import ImageError
from packvit.training import sharding
from packvit.training.blocks import checkpoint_activations, freeze
from packvit.training.sampling import Step, count_tokens, plan_steps

Chosen = TypeVar("Chosen")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
COLUMNS = ("step", "loss", "tokens", "rate", "seconds")


@dataclass(frozen=True)
class Settings:
    """What the configuration file says; distil.toml explains each."""

    photographs: list[str]
    teacher: str
    student: str
    out: str
    epochs: int
    budget: int
    shares: int
    max_patches: int
    rate: float
    warmup: int
    weight_decay: float
    save_every: int
    seed: int
    bf16: bool
    checkpointed: bool


class Student(nn.Module):
    """An encoder whose tokens are projected to the teacher's width."""

    def __init__(self, encoder: Encoder, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.projection = nn.Linear(encoder.config.width, width, device=encoder.device)

    def forward(self, hidden_states: Tensor, grid_thw: Tensor) -> Tensor:
        """Return what the student takes the teacher's tokens to be."""
        return self.projection(self.encoder(hidden_states, grid_thw))


def main(path: str) -> None:
    """Train, log and save as a configuration file says."""
    settings = read_settings(Settings, path, "recipes/distil.toml")
    device = sharding.start()
    own = sharding.own(settings.shares)
    half = torch.bfloat16 if settings.bf16 else torch.float32
    teacher = packvit.load(settings.teacher, device=device, dtype=half)
    freeze(teacher)
    torch.manual_seed(settings.seed)
    encoder = packvit.load(settings.student, device=device, dtype=torch.float32)
    if encoder.images.patch != teacher.images.patch:
        sys.exit(
            f"The student's patches are {encoder.images.patch} pixels a side, the teacher's "
            f"{teacher.images.patch}, so that tokens have no counterparts. Choose another pair."
        )
    if settings.checkpointed:
        checkpoint_activations(encoder)
    student = Student(encoder, teacher.config.width).train()
    if dist.is_initialized():
        sharding.shard(student)
    optimizer = torch.optim.AdamW(
        student.parameters(), settings.rate, weight_decay=settings.weight_decay
    )

    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    check_same(out / "settings.json", asdict(settings))
    files, lengths = find_photographs(settings, teacher)
    plan = partial(plan_steps, lengths, settings.budget, settings.shares, seed=settings.seed)
    steps = [step for epoch in range(settings.epochs) for step in plan(epoch=epoch)]
    done = sharding.resume(out, student, optimizer)
    log = open_log(out / "log.csv", done) if sharding.is_first() else None

    def pack(step: Step, share: int) -> packvit.Pack:
        chosen = [files[image] for image in step[share].images]
        return teacher.pack(chosen, resize="native", max_patches=settings.max_patches)

    turns = [(s, share) for s in range(done, len(steps)) for share in own]
    with ThreadPoolExecutor(1) as reader:  # the next pack is decoded while this one is learned
        coming = [reader.submit(pack, steps[s], share) for s, share in turns[:1]]
        started, total = time.monotonic(), torch.zeros((), device=device)
        for turn, (number, share) in enumerate(turns):
            given = coming.pop().result()
            coming += [reader.submit(pack, steps[s], x) for s, x in turns[turn + 1 : turn + 2]]
            step, tokens = steps[number], count_tokens(steps[number], lengths)
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
                with torch.no_grad():
                    target = teacher(given.hidden_states, given.grid_thw)
                found = student(given.hidden_states, given.grid_thw)
            loss = difference(found, target) * step[share].counts
            sharding.backward(loss, tokens)
            total += loss.detach()
            if share != own[-1]:
                continue
            for group in optimizer.param_groups:
                group["lr"] = settings.rate * schedule(number, len(steps), settings.warmup)
            optimizer.step()
            optimizer.zero_grad()
            mean, seconds = sharding.add_up(total) / tokens, time.monotonic() - started
            started, total = time.monotonic(), torch.zeros((), device=device)
            if log:
                rate = optimizer.param_groups[0]["lr"]
                log.write(f"{number + 1},{mean!r},{tokens},{rate:.3e},{seconds:.3f}\n")
                log.flush()
                print(f"step {number + 1} of {len(steps)}: loss {mean:.4f}", file=sys.stderr)
            if (number + 1) % settings.save_every == 0 or number + 1 == len(steps):
                sharding.save(out, number + 1, student, optimizer)
    sharding.export(encoder, out / "student")
    sharding.leave()


def difference(found: Tensor, target: Tensor) -> Tensor:
    """Return how far tokens are from the teacher's, each of which is standardised; a sum of means.

    Standardising keeps the few channels that are huge in every teacher from being all there is.
    """
    target = F.layer_norm(target.float(), target.shape[-1:])
    return F.smooth_l1_loss(found.float(), target, reduction="none").mean(-1).sum()


def schedule(step: int, steps: int, warmup: int) -> float:
    """Return the share of the highest rate: a rise, then half a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


def find_photographs(settings: Settings, teacher: Encoder) -> tuple[list[Path], list[int]]:
    """Return the photographs that can be used and the tokens of each, all decoded once to know."""
    files, lengths = [], []
    for root in map(Path, settings.photographs):
        found = sorted(root.rglob("*")) if root.is_dir() else [root]
        for path in (path for path in found if path.suffix.lower() in SUFFIXES):
            try:
                pack = teacher.pack([path], resize="native", max_patches=settings.max_patches)
            except ImageError as error:
                print(f"{path} is left out: {error}", file=sys.stderr)
                continue
            files.append(path)
            lengths.append(int(pack.grid_thw.prod()))
    if not files:
        sys.exit(f"There is no photograph in {', '.join(settings.photographs)}.")
    return files, lengths


def read_settings(kind: Callable[..., Chosen], path: str, example: str) -> Chosen:
    """Return what a configuration file chooses, or exit naming a file that shows every entry."""
    try:
        return kind(**tomllib.loads(Path(path).read_text()))
    except (OSError, TypeError, tomllib.TOMLDecodeError) as error:
        sys.exit(f"{path} cannot be used: {error}. {example} shows every entry.")


def check_same(path: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to go on with other settings than the folder was begun with."""
    told = json.dumps(settings, indent=1)
    if path.exists() and path.read_text() != told:
        sys.exit(f"{path} holds other settings. Choose another `out`, or the settings it holds.")
    path.write_text(told)


def open_log(path: Path, done: int) -> TextIO:
    """Open the log behind the rows of steps that were saved; later ones are run again."""
    rows = []
    if path.exists():
        with path.open(newline="") as before:
            rows = [r for r in list(csv.reader(before))[1:] if len(r) == 5 and int(r[0]) <= done]
    path.write_text("".join(",".join(row) + "\n" for row in [COLUMNS, *rows]))
    return path.open("a")


if __name__ == "__main__":
    main(*sys.argv[1:])
