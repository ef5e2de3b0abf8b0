"""A model of transformers, or of timm, in memory, as the checkpoint that it would be saved as."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from packvit.checkpoints.errors import CheckpointError
from packvit.checkpoints.files import Checkpoint
from packvit.checkpoints.folders import CONFIG, read_json


def read_model(model: nn.Module) -> Checkpoint:
    """Return a model as the checkpoint that it would be saved as.

    Raises: CheckpointError if it has no configuration to go by; ImportError without transformers.
    """
    config: Any = getattr(model, "config", None)
    timms = hasattr(model, "pretrained_cfg")  # of every model that timm creates
    if not (timms or hasattr(config, "to_dict")) or not isinstance(model, nn.Module):
        raise CheckpointError(
            "from_transformers takes a model of transformers, or one that timm created, not a "
            f"{type(model).__name__}."
        )
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    name = type(model).__name__
    if timms:
        return Checkpoint(name, None, timm_config(model), None, tensors)
    described = config.to_dict() | {"architectures": [name]}  # as `save_pretrained` would write it
    return Checkpoint(name, None, described, None, as_saved(model, tensors))


def timm_config(model: nn.Module) -> dict[str, Any]:
    """Return the config.json that timm would write. Source: timm 1.0.31, models/_hub.py."""
    from timm.models._hub import save_config_for_hf  # pyright: ignore[reportMissingImports]

    with TemporaryDirectory() as folder:
        save_config_for_hf(model, Path(folder) / CONFIG)
        return read_json(Path(folder), CONFIG) or {}


def as_saved(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's tensors under the names that `save_pretrained` would write.

    Names in memory change with the version of transformers; those in files do not.

    Raises: ImportError with the line that installs transformers.
    Source: transformers 5.17 and 5.24, `PreTrainedModel.save_pretrained`.
    """
    try:
        from transformers import PreTrainedModel
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError as error:
        raise ImportError(
            "from_transformers needs the transformers library, 5.17 or newer: "
            "pip install 'packvit[reference]'"
        ) from error
    return (
        revert_weight_conversion(model, tensors) if isinstance(model, PreTrainedModel) else tensors
    )
