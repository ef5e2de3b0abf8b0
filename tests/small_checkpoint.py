"""A real checkpoint, small enough that a test can write it and a job can run it in a blink."""

from pathlib import Path

import torch
from transformers import Aimv2VisionConfig, Aimv2VisionModel

LAYERS, WIDTH = 3, 32


def write_checkpoint(
    folder: Path, *, native: bool = True, head: bool = True, scale: float = 1.0
) -> Path:
    """Write an AIMv2 in transformers' layout; all of its weights matter, and none is huge.

    `scale` multiplies the final norm, and so every token.
    """
    config = Aimv2VisionConfig(
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        is_native=native,
        use_head=head,
    )
    model = Aimv2VisionModel(config).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            if weight.ndim == 1:
                weight.uniform_(0.5, 1.5, generator=draw)
            else:
                weight.normal_(0, weight[0].numel() ** -0.5, generator=draw)
            if name == "rms_norm.weight":
                weight *= scale
    model.save_pretrained(folder)
    return folder
