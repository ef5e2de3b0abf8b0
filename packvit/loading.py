"""Load a checkpoint into an encoder that runs as its caller chose; called by `Encoder`."""

from typing import TYPE_CHECKING, TypeVar

import torch

from packvit.checkpoints import pretrained
from packvit.checkpoints.files import Checkpoint
from packvit.fast.fp8 import fp8_obstacle, to_fp8
from packvit.model.attention import resolve
from packvit.model.linear import make_invariant
from packvit.options import Options

if TYPE_CHECKING:  # it imports this module
    import packvit.encoder

AnyEncoder = TypeVar("AnyEncoder", bound="packvit.encoder.Encoder")


def fill(kind: type[AnyEncoder], checkpoint: Checkpoint, options: Options) -> AnyEncoder:
    """Build the encoder that a checkpoint describes, and load all its weights.

    Raises: CheckpointError saying what is wrong with the checkpoint; ValueError for an option that
    cannot run here.
    """
    described = pretrained.describe_checkpoint(kind.family, checkpoint)
    with torch.device("meta"):
        encoder = kind(
            described.config,
            described.images,
            attention=options.attention,
            patch_order=options.patch_order,
            positions=options.positions,
        )
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = torch.device(device).type == "cuda"
    dtype = options.dtype or (torch.bfloat16 if on_gpu else torch.float32)
    state, encoder.carried, encoder.skipped = pretrained.read(
        encoder.state_dict(), checkpoint, described.layout, options.patch_order, device, dtype
    )
    encoder.load_state_dict(state, assign=True)
    # A model in memory is copied, and must not be kept alive by its copy.
    encoder.checkpoint = checkpoint if checkpoint.files else None
    resolve(options.attention, encoder.attention_inputs)  # refused here rather than in a forward
    take(encoder.eval(), options)
    return encoder


def take(encoder: "packvit.encoder.Encoder", options: Options) -> None:
    """Switch an encoder to fp8, batch-invariant or compiled, as `options` says.

    Raises: ValueError if fp8 cannot run here.
    """
    if options.fp8:
        if obstacle := fp8_obstacle(encoder.encoder, encoder.device, encoder.dtype):
            raise ValueError(f"fp8=True cannot run: fp8 {obstacle}. Leave it out.")
        to_fp8(encoder.encoder)
        encoder.requires_grad_(False)
    if options.invariant:
        make_invariant(encoder)
    if options.compile:
        for block in encoder.encoder.layers:
            block.compile(dynamic=True)  # one after another, so that all share one compilation
    encoder.fp8, encoder.invariant = options.fp8, options.invariant
    encoder.compiled = options.compile
