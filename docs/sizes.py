"""How large the published checkpoints are: the table of families in README.

Entries are those of config.json that differ from the defaults of the reference's own class, for the
smallest and the largest checkpoint of each family. Nothing is downloaded: sizes follow from them.
"""

from typing import Any, NamedTuple

import torch

from packvit.config import EncoderConfig
from packvit.encoder import Encoder
from packvit.families import FAMILIES
from packvit.model.memory import peak

TOKENS = 16_384  # the default token budget of `packvit embed`
BF16 = 2  # bytes


class Published(NamedTuple):
    """A size in which a family is published."""

    label: str
    entries: dict[str, Any]
    names: tuple[str, ...] = ()  # tensors that say what the checkpoint has beside its blocks


def sized(width: int, layers: int, heads: int, mlp: int, **rest: Any) -> dict[str, Any]:
    """Return sizes under the names of config.json."""
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": mlp,
        **rest,
    }


def tower(width: int, layers: int, heads: int, mlp: int, **rest: Any) -> dict[str, Any]:
    """Return sizes under the names of config.json of Qwen's towers."""
    named = {"hidden_size": width, "depth": layers, "num_heads": heads, "intermediate_size": mlp}
    return named | rest


HEAD = ("vision_model.head.probe",)
PROJECTED = ("mm_projector.proj.0.weight",)
SHARED = ("visual_projection.weight",)
SIZES: dict[str, tuple[Published, Published]] = {
    "AIMv2": (
        Published("large", sized(1024, 24, 8, 2816, use_head=False)),
        Published("3B", sized(3072, 24, 24, 8192, use_head=False)),
    ),
    "SigLIP2 NaFlex": (
        Published("base", sized(768, 12, 12, 3072), HEAD),
        Published("so400m", sized(1152, 27, 16, 4304), HEAD),
    ),
    "DINOv3": (
        Published("small", sized(384, 12, 6, 1536, num_register_tokens=4)),
        Published("7B", sized(4096, 40, 32, 8192, num_register_tokens=4, use_gated_mlp=True)),
    ),
    "DINOv2": (
        Published("small", sized(384, 12, 6, 1536, image_size=518)),
        Published("giant", sized(1536, 40, 24, 4096, image_size=518, use_swiglu_ffn=True)),
    ),
    "SigLIP": (
        Published("base", sized(768, 12, 12, 3072), HEAD),
        Published("so400m", sized(1152, 27, 16, 4304, image_size=384, patch_size=14), HEAD),
    ),
    "CLIP": (
        Published("base", sized(768, 12, 12, 3072), SHARED),
        Published("huge", sized(1280, 32, 16, 5120, patch_size=14, projection_dim=1024), SHARED),
    ),
    "Qwen3 ViT": (
        Published("0.8B", tower(768, 12, 12, 3072, out_hidden_size=1024)),
        Published("27B", tower(1152, 27, 16, 4304, out_hidden_size=5120)),
    ),
    "MoonViT": (
        Published("K2.5", {"text_config": {"hidden_size": 7168}}, PROJECTED),
        Published("K2.6", {"text_config": {"hidden_size": 7168}}, PROJECTED),
    ),
    "Qwen2.5-VL ViT": (
        Published("3B", tower(1280, 32, 16, 3420, out_hidden_size=2048)),
        Published("72B", tower(1280, 32, 16, 3420, out_hidden_size=8192)),
    ),
    "Qwen2-VL ViT": (
        Published("2B", {"embed_dim": 1280, "hidden_size": 1536}),
        Published("72B", {"embed_dim": 1280, "hidden_size": 8192}),
    ),
    "C-RADIO": (
        Published("B", {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}),
        Published("H", {}),
    ),
    "Perception Encoder": (
        Published("core T", {"architecture": "vit_pe_core_tiny_patch16_384", "num_classes": 512}),
        Published(
            "core G", {"architecture": "vit_pe_core_gigantic_patch14_448", "num_classes": 1280}
        ),
    ),
    "OneVision-Encoder": (
        Published("large", {}),
        Published("large-si", {}),
    ),
    "TIPSv2": (
        Published("B", {}),
        Published("g", sized(1536, 40, 24, 4096, use_swiglu_ffn=True)),
    ),
}


def configuration(name: str, size: Published) -> EncoderConfig:
    """Return what describes an encoder of a family, by the family's name."""
    [encoder] = [encoder for encoder in FAMILIES if encoder.family.name == name]
    return encoder.family.layouts[0].read(size.entries, size.names)


def count(parameters: int) -> str:
    """Return a number of parameters as model cards print it."""
    return f"{parameters / 1e6:.0f} M" if parameters < 1e9 else f"{parameters / 1e9:.1f} B"


def vector_of(config: EncoderConfig) -> str:
    """Return in words what an image's one vector is."""
    if config.summary:
        return f"{len(config.summary.chosen)} class tokens"
    mean = f"mean of the {'merged ' if config.merger else ''}tokens"
    return {"probe": "attention pooling", "class": "class token"}.get(config.pool or "", mean)


def parameter_count(encoder: type[Encoder], config: EncoderConfig) -> int:
    """Return the number of parameters of an encoder, of which none is made."""
    with torch.device("meta"):
        parameters = encoder(config, encoder.family.images(config)).parameters()
    return sum(one.numel() for one in parameters)


def families_table() -> str:
    """Return a row for each family: what it is, how large, and what a pack takes on a GPU.

    Towers of multimodal models and of videos are listed behind the table, which is to stay short.
    """
    lines, towers, videos = [], [], []
    head = [
        "| family | class | checkpoints | parameters | GPU memory | one vector an image |",
        "|---|---|---|---|---|---|",
    ]
    for encoder in FAMILIES:
        family = encoder.family
        configs = [configuration(family.name, size) for size in SIZES[family.name]]
        numbers = [parameter_count(encoder, config) for config in configs]
        counts = list(dict.fromkeys(map(count, numbers)))
        if configs[0].merger:
            towers.append(f"{family.name} ({' to '.join(counts)})")
            continue
        if configs[0].segments == "clip":
            videos.append(f"{family.name} ({' to '.join(counts)})")
            continue
        activations = [peak(config, BF16).activations(TOKENS) for config in configs]
        sizes = [BF16 * n + more for n, more in zip(numbers, activations, strict=True)]
        memory = [f"{size / 2**30:.1f}" for size in sizes]
        labels = [size.label for size in SIZES[family.name]]
        published = f"{len(family.checkpoints)}, {labels[0]} to {labels[1]}"
        vector = vector_of(configs[0])
        lines.append(
            f"| {family.name} | `{encoder.__name__}` | {published} | {' to '.join(counts)} | "
            f"{' to '.join(memory)} GiB | {vector} |"
        )
    listed = (
        f"Vision towers of multimodal models, with their mergers: {', '.join(towers)}. "
        f"Of whole clips: {', '.join(videos)}."
    )
    return "\n".join([*head, *lines, "", listed]) + "\n"
