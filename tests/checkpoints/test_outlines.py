"""An encoder without numbers says the same of itself as the one that is filled."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_checkpoint import write_checkpoint

from packvit.checkpoints.errors import CheckpointError
from packvit.corpus.loading import load_encoder, outline_encoder
from packvit.corpus.manifest import describe_job
from packvit.corpus.settings import EmbedOptions, ModelChoice, fit_options
from packvit.model.options import LoadOptions


def test_an_outline_describes_the_job_that_its_encoder_would_do(tmp_path: Path):
    choice = ModelChoice(
        model=write_checkpoint(tmp_path),
        options=LoadOptions(device="cpu", dtype="bfloat16"),
    )
    encoder, weights = load_encoder(choice)
    outline = outline_encoder(choice)
    assert outline.checkpoint is not None
    options = fit_options(encoder, EmbedOptions(taps=(-1,)))
    assert fit_options(outline, EmbedOptions(taps=(-1,))) == options
    assert describe_job(outline, outline.checkpoint.sha256(), options) == describe_job(
        encoder, weights, options
    )
    assert asdict(outline.config) == asdict(encoder.config)
    shapes = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
    assert {name: tensor.shape for name, tensor in outline.state_dict().items()} == shapes
    held = sum(tensor.untyped_storage().nbytes() for tensor in outline.state_dict().values())
    embedding = outline.embeddings.patches.weight.nbytes
    assert held <= embedding + 2 * len(shapes)  # a number each


def test_an_outline_refuses_what_its_encoder_refuses(tmp_path: Path):
    folder = write_checkpoint(tmp_path)
    weights = load_file(folder / "model.safetensors")
    first, second, *_ = sorted(weights)
    weights["another"] = weights.pop(first)
    weights[second] = torch.zeros(7)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    choice = ModelChoice(model=folder, options=LoadOptions(device="cpu"))
    with pytest.raises(CheckpointError) as refused:
        load_encoder(choice)
    for words in (f"missing: {first}", f"misshapen: {second} is [7]", "unexpected: another"):
        assert words in str(refused.value)
    with pytest.raises(CheckpointError) as outlined:
        outline_encoder(choice)
    assert str(outlined.value) == str(refused.value)
