"""The weights that all contenders share: random ones at published sizes, or a checkpoint's."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from packvit import hub
from packvit.bench import MODELS, BenchError
from packvit.config import EncoderConfig, Table
from packvit.encoder import Encoder
from packvit.families import (
    AIMv2Packing,
    ClipPacking,
    Dinov2Packing,
    DINOv3ViTPacking,
    KimiK25VisionPacking,
    PerceptionPacking,
    Qwen2VisionTransformerPacking,
    Qwen3VLVisionPacking,
    Qwen25VisionTransformerPacking,
    RadioPacking,
    Siglip2NaflexPacking,
    SiglipPacking,
    Tipsv2VisionPacking,
)
from packvit.verification import timm_reference
from packvit.verification.references import ReferenceModel, model_class, quiet, randomise
from packvit.verification.running import take_normalized
from packvit.verification.verify import tower_alone

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
HUGE = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16}
SO400M = {
    "hidden_size": 1152,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "intermediate_size": 4304,
    "vision_use_head": False,
}
CLIP_LARGE = LARGE | {"intermediate_size": 4096, "patch_size": 14, "image_size": 224}
AIMV2_LARGE = LARGE | {"num_attention_heads": 8, "intermediate_size": 2816, "use_head": False}
DINOV2 = {"patch_size": 14, "image_size": 518}
DINOV3 = {"patch_size": 16, "num_register_tokens": 4}

# Without pooling heads: only tokens are compared, and their work is not counted.
SIZES: dict[str, tuple[type[Encoder], str, dict[str, Any]]] = {
    "aimv2-large": (AIMv2Packing, "Aimv2VisionModel", AIMV2_LARGE | {"is_native": True}),
    "siglip2-so400m": (Siglip2NaflexPacking, "Siglip2VisionModel", SO400M),
    "clip-l14-quickgelu": (ClipPacking, "CLIPVisionModel", CLIP_LARGE),
    "clip-l14": (ClipPacking, "CLIPVisionModel", CLIP_LARGE | {"hidden_act": "gelu"}),
    "siglip-so400m14-384": (
        SiglipPacking,
        "SiglipVisionModel",
        SO400M | {"patch_size": 14, "image_size": 384},
    ),
    "dinov2-b14": (Dinov2Packing, "Dinov2Model", BASE | DINOV2),
    "dinov2-l14": (Dinov2Packing, "Dinov2Model", LARGE | DINOV2),
    "dinov3-b16": (DINOv3ViTPacking, "DINOv3ViTModel", BASE | DINOV3 | {"intermediate_size": 3072}),
    "dinov3-l16": (
        DINOv3ViTPacking,
        "DINOv3ViTModel",
        LARGE | DINOV3 | {"intermediate_size": 4096},
    ),
    "aimv2-l14-224": (AIMv2Packing, "Aimv2VisionModel", AIMV2_LARGE | {"image_size": 224}),
    "aimv2-l14-448": (AIMv2Packing, "Aimv2VisionModel", AIMV2_LARGE | {"image_size": 448}),
    "qwen3-vit": (Qwen3VLVisionPacking, "Qwen3_5VisionModel", {"out_hidden_size": 4096}),
    "qwen2.5-vl-vit": (
        Qwen25VisionTransformerPacking,
        "Qwen2_5_VisionTransformerPretrainedModel",
        {"hidden_size": 1280},
    ),
    "qwen2-vl-vit": (
        Qwen2VisionTransformerPacking,
        "Qwen2VisionTransformerPretrainedModel",
        {},
    ),
    "moonvit-so400m": (KimiK25VisionPacking, "Kimi_K25VisionModel", {}),
    "c-radio-h16": (RadioPacking, "RadioModel", HUGE),
    "tipsv2-b14": (Tipsv2VisionPacking, "Tipsv2VisionModel", BASE),
    "pe-spatial-l14": (PerceptionPacking, "vit_pe_spatial_large_patch14_448", {}),
}
# Biases that are zero in every published checkpoint, so that timm leaves them out.
ZERO = {"DINOv3ViTModel": ("q_proj.bias", "v_proj.bias")}


def config_of(name: str) -> EncoderConfig:
    """Return the configuration of our encoder of a size, without making weights."""
    encoder, architecture, entries = SIZES[name]
    if encoder.family.reference.library == "timm":
        given = {"architecture": architecture, "model_args": entries}
        return encoder.family.layouts[0].read(given, ())
    kind = model_class(architecture).config_class
    return encoder.family.layouts[0].read(kind(**entries).to_dict(), ())


@dataclass(frozen=True, eq=False)
class Model:
    """One set of weights."""

    name: str
    weights: str  # "random", or where they come from
    encoder: type[Encoder]
    config: EncoderConfig
    reference: Any  # transformers' model, or timm's, on the measured device and dtype

    @property
    def resizes(self) -> bool:
        """Whether its positions are learned for one grid, and interpolated only on request."""
        positions = self.config.positions
        return isinstance(positions, Table) and not positions.any_grid

    @property
    def multiple(self) -> int:
        """What its rows and columns must be multiples of."""
        return self.encoder.family.images(self.config).multiple

    @property
    def own_grid(self) -> tuple[int, int] | None:
        """The rows and columns of the only grid that its reference takes, or None."""
        positions = self.config.positions
        if not isinstance(positions, Table) or not self.resizes:
            return None
        fixed = not self.encoder.family.reference.interpolates
        return (positions.rows, positions.columns) if fixed else None


def build(name: str, layers: int | None, device: torch.device, dtype: torch.dtype) -> Model:
    """Return the random model of a size, or the checkpoint `name`.

    Raises: BenchError; CheckpointError; ImportError without the reference's library.
    """
    if name in SIZES:
        return random_model(name, layers, device, dtype)
    if layers is not None:
        raise BenchError(f"--layers is for random models only: {', '.join(MODELS)}. Leave it out.")
    return checkpoint_model(name, device, dtype)


def random_model(name: str, layers: int | None, device: torch.device, dtype: torch.dtype) -> Model:
    """Return a model with random weights; speed does not depend on them."""
    encoder, architecture, entries = SIZES[name]
    if encoder.family.reference.library == "timm":
        entries = entries | ({} if layers is None else {"depth": layers})
        with device:
            made = timm_reference.create(architecture, **entries)
    else:
        kind = model_class(architecture)
        entries = entries | ({} if layers is None else first_layers(kind.config_class(), layers))
        with quiet(), device:  # a GPU draws some hundred million numbers in no time
            made = kind(kind.config_class(**entries))
    reference = randomise(made, seed=0)
    for key, weight in reference.named_parameters():
        if key.endswith(ZERO.get(architecture, ())):
            weight.data.zero_()
    reference = reference.to(dtype)
    config = encoder.from_transformers(reference).config
    return Model(name, "random", encoder, config, take_normalized(reference))


def first_layers(config: Any, layers: int) -> dict[str, Any]:
    """Return the entries of a configuration of transformers that keep its first layers alone."""
    word = "depth" if hasattr(config, "depth") else "num_hidden_layers"
    full = getattr(config, "fullatt_block_indexes", None)  # of Qwen2.5-VL: without windows
    kept = {"fullatt_block_indexes": [layer for layer in full if layer < layers]} if full else {}
    return {word: layers} | kept


def checkpoint_model(name: str, device: torch.device, dtype: torch.dtype) -> Model:
    """Return a checkpoint's model, which transformers loads from what `save_pretrained` writes."""
    encoder = hub.load(name, device="cpu", dtype=torch.float32)
    encoder = tower_alone(encoder)
    with TemporaryDirectory() as folder:
        encoder.save_pretrained(folder)
        reference = ReferenceModel(encoder.family, Path(folder)).load(dtype, device)
    return Model(
        name, "the checkpoint's", type(encoder), encoder.config, take_normalized(reference)
    )
