"""C-RADIO v3 and v4: ten prefix tokens, a summary of two of them, and no final norm.

The table of positions is resized to the square of an image's longer side, of which the top left is
taken. The model normalises pixels by itself, by CLIP's statistics. config.json is transformers', or
the authors' own (`radio_entries.py`); the tensors' names are the same.

Source: arXiv:2412.07679; "C-RADIOv4", arXiv:2601.17237; transformers 5.17, models/radio.
"""

from packvit.checkpoints.layouts import Family, Layout, Reference, Variant
from packvit.checkpoints.rules import Rule, gated, layers, linear_over_channels, rename, reshape
from packvit.config import CLIP_STATISTICS, EncoderConfig, ImageConfig
from packvit.encoder import Encoder
from packvit.families.radio_entries import STATISTICS, read, write

MODEL = "radio_model.model."
OURS, BLOCK = "encoder.layers.{i}.", f"{MODEL}blocks.{{i}}."
GENERATOR = f"{MODEL}patch_generator."
SCALE = "layer_scale{half}.lambda1"  # all ones in published checkpoints, which leave it out
RULES = (
    linear_over_channels("embeddings.patches.weight", f"{GENERATOR}embedder.weight"),
    reshape("embeddings.positions", f"{GENERATOR}pos_embed", 1),
    rename("embeddings.registers", f"{GENERATOR}cls_token.token"),  # class tokens among them
    *layers(
        OURS,
        BLOCK,
        {
            "attention_norm": "norm1",
            "attention.qkv": "attn.qkv",
            "attention.out": "attn.proj",
            "mlp_norm": "norm2",
        },
    ),
    rename(f"{OURS}attention_scale.scale", BLOCK + SCALE.format(half=1)),
    rename(f"{OURS}mlp_scale.scale", BLOCK + SCALE.format(half=2)),
)
PLAIN = layers(f"{OURS}mlp.", f"{BLOCK}mlp.", {"up": "fc1", "down": "fc2"})
GATED = (
    *layers(f"{OURS}mlp.", f"{BLOCK}mlp.", {"down": "down_proj"}),
    *gated(f"{OURS}mlp.gate_up", f"{BLOCK}mlp.", "gate_proj up_proj"),
)
FUSED = (  # by their names in transformers 5.17
    *gated(f"{OURS}mlp.gate_up", f"{BLOCK}mlp.", "weights_in"),
    *layers(f"{OURS}mlp.", f"{BLOCK}mlp.", {"down": "weights_out"}),
)
CARRIED = {
    "summary_idxs": "radio_model.summary_idxs",
    "norm_mean": "radio_model.input_conditioner.norm_mean",
    "norm_std": "radio_model.input_conditioner.norm_std",
    "video_embedder": f"{GENERATOR}video_embedder.weight",
}


def images(config: EncoderConfig) -> ImageConfig:
    """Return RADIO's preprocessing: images as they are, in whole patches."""
    return ImageConfig(config.patch, *CLIP_STATISTICS, "bicubic")


def layout(mlp: tuple[Rule, ...]) -> Layout:
    """Return the layout of checkpoints with one kind of MLP; heads for teachers are skipped."""
    marker, skipped = mlp[0].theirs[0].format(i=0), ("radio_model.adaptors",)
    rules = (*RULES, *mlp)
    return Layout("transformers", marker, rules, read, write, CARRIED, STATISTICS, skipped)


FAMILY = Family(
    name="C-RADIO",
    model_types=("radio", "RADIOModel"),
    layouts=(layout(PLAIN), layout(GATED), layout(FUSED)),
    images=images,
    checkpoints=(
        *(f"nvidia/C-RADIOv3-{size}" for size in ("B", "L", "H")),
        *(f"nvidia/C-RADIOv4-{size}" for size in ("SO400M", "H")),
    ),
    reference=Reference(
        variants=(
            Variant("plain", "RadioModel", {"max_img_size": 224, "mlp_ratio": 2.0}),
            Variant(
                *("SwiGLU", "RadioModel", {"max_img_size": 224, "use_swiglu_ffn": True}),
                since="5.24",
            ),
        ),
        processor="CLIPImageProcessorPil",
        processor_options={
            "do_normalize": False,
            "do_center_crop": False,
            "size": {"height": 512, "width": 512},
        },
    ),
    processor_normalizes=False,
)


class RadioPacking(Encoder):
    """C-RADIO on packs: `nvidia/C-RADIOv3-*` and `nvidia/C-RADIOv4-*`."""

    family = FAMILY
