"""OneVision-Encoder: clips attend as a whole, and every patch has a place in time and space.

A patch's place is what rotary positions tell, so that patches may be chosen from a clip, as a video
codec does: `encode(..., patch_positions=...)`. A photograph is a clip of one frame.

Source: github.com/EvolvingLMMs-Lab/OneVision-Encoder at c2cd3e0, its folder onevision_encoder.
"""

from collections.abc import Collection
from typing import Any

from packvit.checkpoints.config_json import (
    Json,
    activation,
    base,
    entry,
    sizes,
    square,
    write_sizes,
)
from packvit.checkpoints.errors import CheckpointError
from packvit.checkpoints.layouts import Family, Layout, Reference
from packvit.checkpoints.rules import convolution, layers, neighbours
from packvit.config import (
    CLIP_STATISTICS,
    EncoderConfig,
    ImageConfig,
    Norm,
    Probe,
    ShortestEdge,
    VideoRotary,
)
from packvit.encoder import Encoder
from packvit.families.clip_siglip import CLIP_BLOCK, probe_head

LAYER = "encoder.layers.{i}."
QKV = " ".join(f"{LAYER}self_attn.{part}_proj" for part in "qkv")
BLOCK = {ours: theirs for ours, theirs in CLIP_BLOCK.items() if ours != "attention.qkv"}
RULES = (
    *convolution("embeddings.patches", "embeddings.patch_embedding"),
    *layers("", "", {"embeddings.norm": "layernorm_pre", "norm": "layernorm_post"}),
    *layers(LAYER, LAYER, BLOCK),
    *neighbours(f"{LAYER}attention.qkv", QKV),
    *probe_head("norm"),
)
NORMS: dict[str, Norm] = {"layer_norm": "layer", "rms_norm": "rms"}
IMAGE, FRAME = 448, 224  # pixels, as the authors trained on photographs and on videos
ELSEWHERE = (
    "OneVision-Encoder is verified beside its arithmetic in float64, in our tests, and once beside "
    "its authors' code (benchmarks/RUNS.md): transformers has no class for it."
)


def read(config: Json, names: Collection[str]) -> EncoderConfig:
    """Read config.json.

    Raises: CheckpointError for heads that do not divide into 4, 6 and 6, or an unknown norm.
    """
    found = sizes(config, width=1024, layers=24, heads=16, mlp_width=4096)
    norm = entry(config, "layer_norm_type", str, "layer_norm")
    if found["width"] % (32 * found["heads"]) or norm not in NORMS:
        raise CheckpointError(
            f'config.json says {found} and "layer_norm_type": "{norm}"; packvit knows heads of a '
            f"multiple of 32, and {' or '.join(NORMS)}."
        )
    times = config.get("rope_temporal_size", 64)
    pooled = entry(config, "use_head", bool, True)
    return EncoderConfig(
        **found,
        patch=square(config, "patch_size", 14),
        positions=None,
        rotary=VideoRotary(
            base(config, 10000.0),
            None if times is None else square(config, "rope_temporal_size", 64),
        ),
        norm=NORMS[norm],
        norm_eps=entry(config, "layer_norm_eps", float, 1e-6),
        activation=activation(config, "gelu"),
        segments="clip",
        patch_bias=False,
        embedding_norm="tokens",
        final_norm="tokens" if pooled else None,
        pool="probe" if pooled else None,
        probe=Probe(found["heads"], found["mlp_width"], "rms") if pooled else None,
    )


def write(config: EncoderConfig) -> dict[str, Any]:
    """Write config.json as the authors' OneVisionEncoderConfig."""
    rotary = config.rotary
    assert isinstance(rotary, VideoRotary)
    return write_sizes(config) | {
        "model_type": "onevision_encoder",
        "architectures": ["OneVisionEncoderModel"],
        "image_size": IMAGE,
        "layer_norm_eps": config.norm_eps,
        "layer_norm_type": next(name for name, norm in NORMS.items() if norm == config.norm),
        "rope_theta": rotary.base,
        "rope_temporal_size": rotary.frames,
        "use_head": config.pool is not None,
    }


def images(config: EncoderConfig) -> ImageConfig:
    """Return CLIP's preprocessing; a clip's frames are smaller than a photograph."""
    image, frame = (ShortestEdge(side, (side, side)) for side in (IMAGE, FRAME))
    return ImageConfig(config.patch, *CLIP_STATISTICS, "bicubic", image, frame_sizing=frame)


FAMILY = Family(
    name="OneVision-Encoder",
    model_types=("onevision_encoder",),
    layouts=(Layout("transformers", "layernorm_pre.weight", RULES, read, write),),
    images=images,
    checkpoints=(
        "lmms-lab-encoder/onevision-encoder-large",
        "lmms-lab-encoder/onevision-encoder-large-si",
    ),
    reference=Reference(variants=(), processor="", elsewhere=ELSEWHERE),
)


class OneVisionEncoderPacking(Encoder):
    """OneVision-Encoder on packs: `lmms-lab-encoder/onevision-encoder-*`."""

    family = FAMILY
