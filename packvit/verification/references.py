"""transformers' models as the references of our encoders: loaded, or made of random weights.

Nothing here uses our weight rules, positions or layers: a reference is loaded by the class that its
config.json names, from the same files. transformers is imported only when it is needed. Families
that it lacks are run by timm (`timm_reference.py`).
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from packvit.checkpoints.errors import CheckpointError
from packvit.checkpoints.layouts import Family, Variant
from packvit.checkpoints.processors import PROCESSORS, processor_name
from packvit.verification import timm_reference

SIZES: Mapping[str, Any] = {  # of the small random models
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 16,
    "image_size": 224,
    "num_register_tokens": 4,
    "depth": 3,  # these four as towers of multimodal models call them
    "num_heads": 4,
    "out_hidden_size": 48,
    "num_position_embeddings": 14**2,
}
# Models that transformers does not offer by their names alone, and its folder of them.
UNNAMED: Mapping[str, str] = {
    "Qwen2VisionTransformerPretrainedModel": "qwen2_vl",
    "Qwen2_5_VisionTransformerPretrainedModel": "qwen2_5_vl",
}
TEXT_SIZES: Mapping[str, Any] = {  # of a text tower, whose outputs are not used
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def import_transformers() -> Any:
    """Return the library, which only verification needs.

    Raises: ImportError with the line that installs it.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "Verification compares with the transformers library, which is not installed: "
            "pip install 'packvit[reference]'"
        ) from error
    return transformers


def import_reference(family: Family) -> Any:
    """Return the library that a family is verified beside.

    Raises: ImportError with the line that installs it.
    """
    if family.reference.library == "timm":
        return timm_reference.import_timm()
    return import_transformers()


@contextmanager
def quiet() -> Iterator[None]:
    """Turn off transformers' progress bars and log messages."""
    logging = import_transformers().utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@dataclass(frozen=True, slots=True)
class ReferenceModel:
    """A checkpoint in `folder`, as transformers or timm reads it."""

    family: Family
    folder: Path

    @property
    def library(self) -> str:
        """Whose model it is."""
        return self.family.reference.library

    @property
    def architecture(self) -> str:
        """The class that config.json names, or timm's version and name of an architecture.

        Raises: CheckpointError if it is not a vision model of the family.
        """
        config = json.loads((self.folder / "config.json").read_bytes())
        if self.library == "timm":
            return timm_reference.architecture(config)
        known = self.family.reference.models
        if not known:
            raise CheckpointError(self.family.reference.elsewhere)
        named = config.get("architectures") or ["none"]
        if len(named) != 1 or named[0] not in known:
            raise CheckpointError(
                f'config.json in {self.folder} names the "architectures" {", ".join(named)}; '
                f"{self.family.name} is verified beside one of: {', '.join(sorted(known))}."
            )
        return named[0]

    def load(self, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
        """Return the model; buffers keep the precision that transformers gives them.

        Raises: CheckpointError if transformers would leave a weight at random.
        """
        if self.library == "timm":
            return timm_reference.load(self.folder, dtype).to(device)
        model, left = load_model(self.architecture, self.folder, dtype)
        if left:
            raise CheckpointError(
                f"transformers finds no weights in {self.folder} for {', '.join(left[:5])}, so "
                "there is no reference to compare with."
            )
        return model.to(device)


def load_model(
    name: str, folder: Path, dtype: torch.dtype, *, config: Any = None
) -> tuple[nn.Module, list[str]]:
    """Return a transformers model in eval mode, and the names of weights left at random."""
    with quiet():
        model, info = model_class(name).from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True
        )
    return model.eval(), sorted(str(name) for name in info["missing_keys"])


def model_class(name: str) -> Any:
    """Return the class of that name in transformers."""
    transformers = import_transformers()
    if name in UNNAMED:
        folder = UNNAMED[name]
        return getattr(import_module(f"transformers.models.{folder}.modeling_{folder}"), name)
    return getattr(transformers, name)


def tower(model: nn.Module) -> Any:
    """Return the vision tower of a model."""
    return getattr(model, "vision_model", model)


def projection(model: nn.Module) -> nn.Module | None:
    """Return the projection to the space shared with text, or None."""
    return getattr(model, "visual_projection", None)


def vision_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of the vision tower and its projection."""
    shared = projection(model)
    named = {f"projection.{k}": v for k, v in (shared.state_dict() if shared else {}).items()}
    return dict(tower(model).state_dict()) | named


def write_random(variant: Variant, family: Family, folder: Path, seed: int) -> nn.Module:
    """Write a small random model, as its library saves it, with its preprocessing; return it."""
    if family.reference.library == "timm":
        made = randomise(timm_reference.create_small(variant), seed)
        timm_reference.save(made, folder)
        return made
    kind = model_class(variant.model)
    settings = kind.config_class
    looking = getattr(settings, "sub_configs", {}).get("vision_config")
    with quiet():
        known = (looking or settings)().to_dict()
        entries = {name: size for name, size in SIZES.items() if name in known}
        entries |= variant.entries
        config = (
            settings(vision_config=entries, text_config=dict(TEXT_SIZES))
            if looking
            else settings(**entries)
        )
        model = randomise(kind(config), seed)
        model.save_pretrained(folder)
        if processor := image_processor(family.reference.processor):
            processor(**family.reference.processor_options).save_pretrained(folder)
    return model


def randomise(model: nn.Module, seed: int) -> Any:
    """Draw random weights large enough that an ignored or misplaced one changes the outputs."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(
                parameter.shape, generator=generator, dtype=torch.float32, device=device
            )
            words = name.split(".")
            is_scale = words[-1] == "weight" and parameter.ndim == 1  # of a norm
            is_table = any("position" in word or word == "pos_embed" for word in words)
            is_matrix = words[-1].endswith("weight") and not is_table
            if is_scale:
                noise = 1 + 0.3 * noise
            else:
                noise *= 0.7 * parameter[0].numel() ** -0.5 if is_matrix else 0.5
            parameter.copy_(noise)
    return model.eval()


def processor_class(family: Family, settings: Mapping[str, Any] | None) -> str:
    """Return the name of transformers' image processor for a checkpoint.

    The Pillow version if there is one; the family's if the checkpoint names none.
    """
    name = processor_name(settings or {})
    if name is None:
        return family.reference.processor
    return f"{name}Pil" if PROCESSORS[name].has_pillow else name


def image_processor(name: str) -> Any:
    """Return the class of that name in transformers, or None if it cannot run here."""
    from importlib.util import find_spec

    if not name.endswith("Pil") and find_spec("torchvision") is None:
        return None
    return getattr(import_transformers(), name, None)
