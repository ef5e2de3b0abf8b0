"""Pretrain a small AIMv2-native encoder from photographs alone, on packs at native resolution.

Three losses. A crop's pooled vector picks its photograph among those of the batch. A crop's token
picks the token at the same place of the whole photograph, as the running mean of the weights sees
it. And hidden patches are predicted, as AIMv2 does, here from their surroundings. Of the running
means the best on the validation split is saved in bfloat16, in transformers' layout.

    python -m recipes.photographs photographs
    python -m recipes.pretrain recipes/pretrain.toml photographs --out run

Started again, it goes on from run/checkpoint.pt. run/log.csv has the losses.
"""

import argparse
import csv
import time
import tomllib
from math import cos, pi
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from recipes.evaluate import Trial, read_images
from recipes.objectives import Learner, losses
from recipes.views import Plans, Views, cut_batch, read_photographs

COLUMNS: tuple[str, ...] = (
    "step",
    "loss",
    "crops",
    "tokens",
    "pixels",
    "images_per_second",
    "plain",
    "edited",
)


class Run:
    """Everything that a checkpoint keeps, and the copies that compute in the device's dtype."""

    def __init__(self, settings: dict[str, Any], device: torch.device) -> None:
        torch.manual_seed(settings["seed"])
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.settings = settings
        self.master, self.mean, self.best = (
            Learner(settings["encoder"]).to(device) for _ in range(3)
        )
        self.mean.load_state_dict(self.master.state_dict())
        self.working, self.teacher = (
            Learner(settings["encoder"]).to(device, dtype).requires_grad_(grad)
            for grad in (True, False)
        )
        self.spread()
        self.optimizer = torch.optim.AdamW(
            self.master.parameters(), betas=(0.9, 0.95), weight_decay=settings["weight_decay"]
        )
        self.step, self.record = 0, -1.0

    def spread(self) -> None:
        """Copy the fp32 weights to where they compute."""
        self.working.load_state_dict(self.master.state_dict())
        self.teacher.load_state_dict(self.mean.state_dict())

    def learn(self, batch: tuple[Views, Views, Tensor]) -> dict[str, Tensor]:
        """Take one step and return the losses."""
        settings = self.settings
        parts = losses(self.working, self.teacher, batch, settings)
        weights = (1, settings["token_weight"], settings["pixel_weight"])
        weighted = [part * weight for part, weight in zip(parts.values(), weights, strict=True)]
        loss = torch.stack(weighted).sum()
        loss.backward()
        for weight, copy in zip(self.master.parameters(), self.working.parameters(), strict=True):
            assert copy.grad is not None
            weight.grad, copy.grad = copy.grad.float(), None
        nn.utils.clip_grad_norm_(self.master.parameters(), settings["clip"])
        self.step += 1
        late = (self.step - settings["warmup"]) / max(1, settings["steps"] - settings["warmup"])
        pace = self.step / settings["warmup"] if late < 0 else 0.5 + 0.5 * cos(pi * late)
        for group in self.optimizer.param_groups:
            group["lr"] = settings["learning_rate"] * pace
        self.optimizer.step()
        keep = min(settings["average"], self.step / (self.step + 10))
        with torch.no_grad():
            for mean, weight in zip(self.mean.parameters(), self.master.parameters(), strict=True):
                mean.lerp_(weight, 1 - keep)
        self.spread()
        return {"loss": loss.detach()} | {name: part.detach() for name, part in parts.items()}

    def parts(self) -> dict[str, Any]:
        """Return by name what has a state of its own."""
        named = {"master": self.master, "mean": self.mean, "best": self.best}
        return named | {"optimizer": self.optimizer}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        parts = {name: part.state_dict() for name, part in self.parts().items()}
        return parts | {"step": self.step, "record": self.record}

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a checkpoint."""
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.step, self.record = state["step"], state["record"]
        self.spread()


def read_log(path: Path, last: int) -> list[dict[str, str]]:
    """Return a log's rows up to a step: what came after the checkpoint is done again."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if int(row["step"]) <= last]


def train(settings: dict[str, Any], photographs: Path, out: Path, device: torch.device) -> None:
    """Train to the last step, from the checkpoint in `out` if there is one."""
    out.mkdir(parents=True, exist_ok=True)
    run, checkpoint = Run(settings, device), out / "checkpoint.pt"
    if checkpoint.exists():
        run.restore(torch.load(checkpoint, map_location=device, weights_only=True))
    photos = read_photographs(photographs / "train", device)
    patch = run.master.encoder.config.patch
    plans = Plans(
        [(photo.shape[1], photo.shape[2]) for photo in photos],
        seed=settings["seed"],
        count=settings["photographs"],
        patch=patch,
        most=settings["most_patches"],
    )
    trial = Trial(run.teacher.encoder.eval(), read_images(photographs / "validation"))
    kept = read_log(out / "log.csv", run.step)
    with (out / "log.csv").open("w", newline="", buffering=1) as file:
        log = csv.DictWriter(file, COLUMNS)
        log.writeheader()
        log.writerows(kept)
        began, since = time.perf_counter(), run.step
        for plan in DataLoader(
            plans,
            batch_size=None,
            sampler=range(run.step, settings["steps"]),
            num_workers=settings["workers"],
        ):
            torch.manual_seed(settings["seed"] + run.step)  # the same, too, if it was resumed
            parts = run.learn(cut_batch(photos, plan, patch))
            check = run.step % settings["check_every"] == 0 or run.step == settings["steps"]
            if not check and run.step % settings["log_every"]:
                continue
            row: dict[str, Any] = {name: f"{part.item():.4f}" for name, part in parts.items()}
            pace = (run.step - since) * 2 * plans.count / (time.perf_counter() - began)
            row |= {"step": run.step, "images_per_second": f"{pace:.0f}"}
            if check:
                row |= (figures := trial.figures())
                if sum(figures.values()) > run.record:
                    run.record = sum(figures.values())
                    run.best.load_state_dict(run.mean.state_dict())
                torch.save(run.state(), out / "checkpoint.tmp")
                (out / "checkpoint.tmp").replace(checkpoint)
                began, since = time.perf_counter(), run.step
            log.writerow(row)
            print(*(f"{name} {value}" for name, value in row.items()), sep="  ", flush=True)
    run.best.encoder.bfloat16().save_pretrained(out / "model")


def main() -> None:
    """Read the command line and the configuration file, and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", type=Path, help="a .toml file")
    parser.add_argument("photographs", type=Path, help="what recipes/photographs.py made")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    asked = parser.parse_args()
    settings = tomllib.loads(asked.settings.read_text())
    train(settings, asked.photographs, asked.out, torch.device(asked.device))


if __name__ == "__main__":
    main()
