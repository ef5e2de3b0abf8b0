"""What pretraining asks of an encoder: crops, places and hidden patches."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packvit.config import EncoderConfig, SinCos
from packvit.families.aimv2 import FAMILY, AIMv2Packing
from recipes.views import Views, normalise


class Learner(nn.Module):
    """The encoder in fp32, and the two heads that only training needs."""

    def __init__(self, shape: Mapping[str, Any]) -> None:
        super().__init__()
        config = EncoderConfig(
            **shape,
            patch=14,
            positions=SinCos(),
            norm="rms",
            norm_eps=1e-5,
            activation="silu",
            gated=True,
            bias=False,
            qkv_bias="",
            embedding_norm="patches",
        )
        width = config.width
        self.encoder = AIMv2Packing(config, FAMILY.images(config))
        self.place = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.pixels = nn.Linear(width, config.patch_dim)


def pool(tokens: Tensor, views: Views) -> Tensor:
    """Return the mean token of every view, of length 1."""
    sums = tokens.new_zeros(len(views.counts), tokens.shape[1], dtype=torch.float32)
    return F.normalize(sums.index_add_(0, views.view, tokens.float()), dim=-1)


def losses(
    learner: Learner, teacher: Learner, batch: tuple[Views, Views, Tensor], settings: dict[str, Any]
) -> dict[str, Tensor]:
    """Return the three losses of a batch."""
    whole, crops, where = batch
    images = learner.encoder.images
    device = where.device
    pixels = normalise(whole.patches, images)
    rate = (2 * torch.rand(len(crops.counts), device=device) - 1) * settings["masked"]
    hidden = torch.rand(len(crops.view), device=device) < rate[crops.view]
    seen = normalise(crops.patches, images).masked_fill(hidden[:, None], 0)
    with torch.no_grad():
        taught = teacher.encoder(pixels, whole.grid).float()
    tokens = learner.encoder(torch.cat([pixels, seen]), torch.cat([whole.grid, crops.grid]))
    of_whole, of_crops = tokens.split([len(pixels), len(seen)])

    asked, answers = pool(of_crops, crops), pool(of_whole, whole)
    same = torch.arange(len(answers), device=device)
    rounds = [part @ answers.T / settings["temperature"] for part in asked.split(len(answers))]
    picked = [F.cross_entropy(way, same) for each in rounds for way in (each, each.T)]

    sample = torch.randint(len(where), (settings["token_samples"],), device=device)
    ours = F.normalize(learner.place(of_crops[sample]).float(), dim=-1)
    theirs = F.normalize((taught - taught.mean(0))[where[sample]], dim=-1)
    similar = ours @ theirs.T / settings["token_temperature"]

    target = F.layer_norm(crops.patches, crops.patches.shape[1:], eps=1e-3)
    error = (learner.pixels(of_crops).float() - target).square().mean(1)
    return {
        "crops": torch.stack(picked).mean(),
        "tokens": F.cross_entropy(similar, torch.arange(len(sample), device=device)),
        "pixels": (error * hidden).sum() / hidden.sum().clamp(min=1),
    }
