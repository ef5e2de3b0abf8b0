"""Write `packvit/models/tiny/`, the model that comes with the package.

A seeded AIMv2-native encoder in transformers' layout: it takes any grid, it runs everywhere, and
its weights are random. It is there so that the first command works; its features mean nothing.

    python recipes/make_tiny.py
"""

from pathlib import Path

import torch

from packvit.config import EncoderConfig, SinCos
from packvit.families.aimv2 import FAMILY, AIMv2Packing

FOLDER = Path(__file__).parents[1] / "packvit" / "models" / "tiny"

CONFIG = EncoderConfig(
    width=96,
    layers=2,
    heads=3,
    mlp_width=256,
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


def main() -> None:
    """Draw the weights from one seed and save them."""
    torch.manual_seed(0)
    AIMv2Packing(CONFIG, FAMILY.images(CONFIG)).bfloat16().save_pretrained(FOLDER)
    weights = (FOLDER / "model.safetensors").stat().st_size
    print(f"{FOLDER}: {weights:,} bytes of weights")


if __name__ == "__main__":
    main()
