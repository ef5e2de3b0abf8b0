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
from packvit.families import AIMv2Packing, Siglip2NaflexPacking
from packvit.verification.references import ReferenceModel, import_transformers, quiet, randomise
from packvit.verification.verify import without_projection

# Without pooling heads: only tokens are compared, and their work is not counted.
SIZES: dict[str, tuple[type[Encoder], str, dict[str, Any]]] = {
    "aimv2-large": (
        AIMv2Packing,
        "Aimv2VisionModel",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 8,
            "intermediate_size": 2816,
            "is_native": True,
            "use_head": False,
        },
    ),
    "siglip2-so400m": (
        Siglip2NaflexPacking,
        "Siglip2VisionModel",
        {
            "hidden_size": 1152,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "intermediate_size": 4304,
            "vision_use_head": False,
        },
    ),
}


def config_of(name: str) -> EncoderConfig:
    """Return the configuration of our encoder of a size, without making weights."""
    encoder, architecture, entries = SIZES[name]
    kind = getattr(import_transformers(), architecture).config_class
    return encoder.family.layouts[0].read(kind(**entries).to_dict(), ())


@dataclass(frozen=True, eq=False)
class Model:
    """One set of weights."""

    name: str
    weights: str  # "random", or where they come from
    encoder: type[Encoder]
    config: EncoderConfig
    reference: Any  # transformers' model, on the measured device and dtype

    @property
    def resizes(self) -> bool:
        """Whether its positions are learned for one grid, and interpolated only on request."""
        positions = self.config.positions
        return isinstance(positions, Table) and not positions.any_grid


def build(name: str, layers: int | None, device: torch.device, dtype: torch.dtype) -> Model:
    """Return the random model of a size, or the checkpoint `name`.

    Raises: BenchError; CheckpointError; ImportError without transformers.
    """
    if name in SIZES:
        return random_model(name, layers, device, dtype)
    if layers is not None:
        raise BenchError(f"--layers is for random models only: {', '.join(MODELS)}. Leave it out.")
    return checkpoint_model(name, device, dtype)


def random_model(name: str, layers: int | None, device: torch.device, dtype: torch.dtype) -> Model:
    """Return a model with random weights; speed does not depend on them."""
    encoder, architecture, entries = SIZES[name]
    kind = getattr(import_transformers(), architecture)
    entries = entries | ({} if layers is None else {"num_hidden_layers": layers})
    with quiet():
        reference = randomise(kind(kind.config_class(**entries)), seed=0).to(device, dtype)
    config = encoder.from_transformers(reference).config
    return Model(name, "random", encoder, config, reference)


def checkpoint_model(name: str, device: torch.device, dtype: torch.dtype) -> Model:
    """Return a checkpoint's model, which transformers loads from what `save_pretrained` writes."""
    encoder = hub.load(name, device="cpu", dtype=torch.float32)
    if encoder.projection is not None:
        encoder = without_projection(encoder)
    with TemporaryDirectory() as folder:
        encoder.save_pretrained(folder)
        reference = ReferenceModel(encoder.family, Path(folder)).load(dtype, device)
    return Model(name, "the checkpoint's", type(encoder), encoder.config, reference)
