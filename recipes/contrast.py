"""Train both towers of a checkpoint on photographs and their captions, by SigLIP's sigmoid loss.

    python -m recipes.contrast recipes/contrast.toml
    torchrun --nproc-per-node 8 -m recipes.contrast recipes/contrast.toml

Started again it goes on after the last state it saved, on any number of processes that divides
`batch`, with the losses it would have had.
"""

import csv
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import packvit
from packvit.encoder import Encoder
from packvit.packs.features import Pack
from packvit.text.encoder import TextEncoder
from packvit.text.packs import TextPack
from packvit.text.saving import save_towers
from packvit.training import sharding
from packvit.training.blocks import checkpoint_activations, freeze
from recipes.distil import check_same, open_log, read_settings, schedule
from recipes.sigmoid import sigmoid_loss


@dataclass(frozen=True)
class Settings:
    """What the configuration file says; contrast.toml explains each."""

    pairs: str
    model: str
    out: str
    epochs: int
    batch: int
    rate: float
    warmup: int
    weight_decay: float
    save_every: int
    seed: int
    bf16: bool
    locked: bool
    checkpointed: bool


class Towers(nn.Module):
    """Both towers, and the scale and bias of their logits."""

    def __init__(self, encoder: Encoder, text: TextEncoder) -> None:
        super().__init__()
        self.encoder, self.text = encoder, text

    def forward(self, images: Pack, texts: TextPack) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return vectors of length 1 of images and texts, scale and bias."""
        assert self.text.logit_bias is not None
        projected = self.encoder.text_space == "projected"
        seen = self.encoder.encode(images, projected=projected).vectors()
        read = self.text.encode(texts).vectors()
        assert self.text.logit_scale is not None  # the checkpoint has both towers
        scale, bias = self.text.logit_scale.exp(), self.text.logit_bias
        return F.normalize(seen, dim=-1), F.normalize(read, dim=-1), scale, bias * 1


def main(path: str) -> None:
    """Train, log and save as a configuration file says."""
    settings = read_settings(Settings, path, "recipes/contrast.toml")
    device = sharding.start()
    own = sharding.own(settings.batch)
    torch.manual_seed(settings.seed)
    towers = load_towers(settings, device)
    encoder, text = towers.encoder, towers.text
    learned = [parameter for parameter in towers.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, settings.rate, weight_decay=settings.weight_decay)
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    check_same(out / "settings.json", asdict(settings))
    pairs = read_pairs(Path(settings.pairs), settings.batch)
    steps = [step for epoch in range(settings.epochs) for step in plan(pairs, settings, epoch)]
    done = sharding.resume(out, towers, optimizer)
    log = open_log(out / "log.csv", done) if sharding.is_first() else None

    def prepare(step: list[tuple[str, str]]) -> tuple[Pack, TextPack]:
        photographs, captions = zip(*(step[place] for place in own), strict=True)
        return encoder.pack(photographs, resize="checkpoint"), text.pack(captions)

    with ThreadPoolExecutor(1) as reader:  # the next batch is decoded while this one is learned
        coming = [reader.submit(prepare, step) for step in steps[done : done + 1]]
        for number in range(done, len(steps)):
            started = time.monotonic()
            images, texts = coming.pop().result()
            coming += [reader.submit(prepare, step) for step in steps[number + 1 : number + 2]]
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
                found = towers(images, texts)
            loss = sigmoid_loss(*found)
            sharding.backward(loss, settings.batch)
            for group in optimizer.param_groups:
                group["lr"] = settings.rate * schedule(number, len(steps), settings.warmup)
            optimizer.step()
            optimizer.zero_grad()
            mean, seconds = sharding.add_up(loss) / settings.batch, time.monotonic() - started
            if log:
                rate = optimizer.param_groups[0]["lr"]
                log.write(f"{number + 1},{mean!r},{settings.batch},{rate:.3e},{seconds:.3f}\n")
                log.flush()
                print(f"step {number + 1} of {len(steps)}: loss {mean:.4f}", file=sys.stderr)
            if (number + 1) % settings.save_every == 0 or number + 1 == len(steps):
                sharding.save(out, number + 1, towers, optimizer)
    export(towers, out / "model")
    sharding.leave()


def load_towers(settings: Settings, device: torch.device) -> Towers:
    """Return both towers in fp32, sharded where there are several processes."""
    encoder = packvit.load(settings.model, device=device, dtype=torch.float32)
    text = packvit.load_text(settings.model, device=device, dtype=torch.float32)
    if text.logit_bias is None:
        sys.exit(f"{settings.model} has no logit_bias, which the sigmoid loss learns: take SigLIP.")
    if settings.checkpointed:
        checkpoint_activations(encoder)
    towers = Towers(encoder, text).train()
    if settings.locked:
        freeze(encoder)
    if dist.is_initialized():
        sharding.shard(towers)
    return towers


def read_pairs(path: Path, batch: int) -> list[tuple[str, str]]:
    """Return the photographs and captions that a CSV file lists under `image` and `text`."""
    with path.open(newline="") as file:
        pairs = [(str(path.parent / row["image"]), row["text"]) for row in csv.DictReader(file)]
    if len(pairs) < batch:
        sys.exit(f"{path} lists {len(pairs)} pairs, but a batch has {batch}. Lower `batch`.")
    return pairs


def plan(
    pairs: list[tuple[str, str]], settings: Settings, epoch: int
) -> list[list[tuple[str, str]]]:
    """Return the batches of an epoch, shuffled; what fills no batch waits for another epoch."""
    order = random.Random(f"{settings.seed} {epoch}").sample(pairs, len(pairs))
    whole = len(order) - len(order) % settings.batch
    return [order[start : start + settings.batch] for start in range(0, whole, settings.batch)]


def export(towers: Towers, folder: Path) -> None:
    """Write both towers as a checkpoint; every process must call it, and the first one writes."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = get_model_state_dict(towers, options=options)
    if sharding.is_first():
        images, words = (
            {
                name.removeprefix(f"{part}."): tensor
                for name, tensor in whole.items()
                if isinstance(tensor, Tensor) and name.startswith(f"{part}.")
            }
            for part in ("encoder", "text")
        )
        save_towers(folder, towers.encoder, towers.text, states=(images, words))
    sharding.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
