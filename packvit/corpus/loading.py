"""The encoder of a job, and the digest of its weights."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from packvit import hub
from packvit.checkpoints.errors import CheckpointError
from packvit.checkpoints.files import Checkpoint
from packvit.checkpoints.outlines import without_numbers
from packvit.corpus import UsageError
from packvit.corpus.settings import ModelChoice
from packvit.encoder import Encoder
from packvit.model.device import find_device

TRIAL_MODEL = "tiny"


def choose_encoder(choice: ModelChoice, *, verify: bool) -> tuple[Encoder, str]:
    """Return the loaded encoder, and the digest of its weights.

    Raises: UsageError for arguments that do not go together; CheckpointError.
    """
    if isinstance(choice.model, Encoder):
        if choice != ModelChoice(model=choice.model):
            raise UsageError(
                "model is a loaded encoder, whose device, dtype, attention, revision and positions "
                "were chosen when it was loaded. Leave them out, or give the model's name."
            )
        if verify:
            raise UsageError(
                "model is a loaded encoder, whose weights may have been trained since, so it has "
                "no reference. Leave `verify` out, or give the model's name."
            )
        encoder, weights = choice.model, digest_weights(choice.model)
    else:
        encoder, weights = load_encoder(choice)
    interpolates = choice.options.positions == "interpolate"
    if verify and interpolates and not encoder.family.reference.interpolates:
        raise UsageError(
            'verify cannot check positions="interpolate": no reference defines it for '
            f"{encoder.family.name}. Leave one of the two out."
        )
    return encoder, weights


def load_encoder(choice: ModelChoice) -> tuple[Encoder, str]:
    """Return the encoder, and the digest of its weights, which is computed while they are loaded.

    Raises: UsageError for wrong arguments; CheckpointError if the checkpoint itself is wrong.
    """
    with explaining():
        imports = None
        if find_device(choice.options.device).type == "cuda":
            from packvit.fast.imports import import_ahead  # kernels, which a GPU alone has

            imports = import_ahead()
        checkpoint = open_checkpoint(choice)
        with ThreadPoolExecutor(1, "packvit-digest") as other:
            digest = other.submit(checkpoint.sha256)
            encoder = hub.family_of(checkpoint).from_checkpoint(checkpoint, choice.options)
        if imports is not None:
            imports.join()
        return encoder, digest.result()


def outline_encoder(choice: ModelChoice) -> Encoder:
    """Return an encoder without numbers, which answers what it is while others load it.

    Raises: as `load_encoder`, except for what is wrong with the numbers.
    """
    with explaining():
        checkpoint = without_numbers(open_checkpoint(choice))
        return hub.family_of(checkpoint).from_checkpoint(checkpoint, choice.options)


def open_checkpoint(choice: ModelChoice) -> Checkpoint:
    """Return the checkpoint that is named, with no tensor read yet."""
    assert not isinstance(choice.model, Encoder)
    return hub.read_tower(TRIAL_MODEL if choice.model is None else choice.model, choice.revision)


@contextmanager
def explaining() -> Iterator[None]:
    """Turn a ValueError about an argument into a UsageError."""
    try:
        yield
    except CheckpointError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error


def digest_weights(encoder: Encoder) -> str:
    """Return a digest of the weights in memory, which may have been trained since loading."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
