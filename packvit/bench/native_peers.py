"""Our peers on a batch of one size: transformers and timm, from pixels on the device to tokens.

Each gets what flatters it: fixed sizes, attention by torch's own kernel, and positions that are
computed once where its code allows it.
"""

from collections.abc import Callable
from importlib.util import find_spec
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packvit.bench.contenders import Call, Contender, Subject, Unavailable, cut
from packvit.bench.peers import LONGEST, Mode, Peer, compile_it, reference_options
from packvit.config import EncoderConfig, Table
from packvit.verification.references import tower
from packvit.verification.timm_models import timm_weights


def resized(table: Tensor, like: Tensor) -> Tensor:
    """Return SigLIP2's square table of positions for another square, as its reference does."""
    before, after = isqrt(len(table)), isqrt(like.shape[1])
    image = table.float().T.unflatten(1, (before, before))[None]
    turned = F.interpolate(
        image, size=(after, after), mode="bilinear", align_corners=False, antialias=True
    )
    return turned[0].flatten(1).T.to(table.dtype)


def timm_model(subject: Subject) -> nn.Module:
    """Return timm's own model of the architecture, with the reference's weights.

    Raises: Unavailable without timm.
    """
    if find_spec("timm") is None:
        raise Unavailable("timm is not installed; pip install 'packvit[bench]'")
    import timm  # pyright: ignore[reportMissingImports] # needs torchvision

    assert subject.pixels is not None
    config = subject.model.config
    with torch.inference_mode(False), subject.pixels.device:  # CUDA graphs want plain weights
        model = timm.create_model(
            subject.timm,
            img_size=subject.pixels.shape[-1],
            num_classes=0,
            global_pool="",
            **sizes(config),
        )
    if config.final_norm == "pooled":
        model.norm = nn.Identity()  # of the class token alone, whose pooling nobody is asked for
    ours = subject.model.encoder.from_transformers(subject.model.reference).state_dict()
    table, wanted = ours.get("embeddings.positions"), model.state_dict()
    if table is not None and len(table) != wanted["pos_embed"].shape[1]:
        ours |= {"embeddings.positions": resized(table, wanted["pos_embed"])}
    model.load_state_dict(timm_weights(wanted, ours))
    return model.eval().to(subject.patches)


def sizes(config: EncoderConfig) -> dict[str, Any]:
    """Return what timm is told of a size, whose defaults are those of the published one."""
    told: dict[str, Any] = {
        "embed_dim": config.width,
        "depth": config.layers,
        "num_heads": config.heads,
        "mlp_ratio": (config.mlp_width + 0.5) / config.width,  # which timm rounds down
    }
    if config.activation == "gelu_tanh":
        told["act_layer"] = "gelu_tanh"
    if not config.gated and not isinstance(config.positions, Table):
        told["dynamic_img_size"] = False  # so that turns are computed once
    return told


def rows(subject: Subject) -> Tensor:
    """Return which row of the pack each token of a batch is. Shapes: -> [N, R + L]."""
    places = torch.stack(list(subject.rows))
    prefix = places.new_full((len(places), subject.model.config.prefix), -1)
    return torch.cat([prefix, places], 1)


def transformers_forward(subject: Subject) -> Callable[[], Tensor]:
    """Return the reference's forward of the batch; SigLIP2 NaFlex wants its patches cut."""
    looking, pixels = tower(subject.model.reference), subject.pixels
    assert pixels is not None
    if type(looking).__name__.startswith("Siglip2"):
        patch, shapes = subject.model.config.patch, subject.grid_thw[:, 1:]

        def naflex() -> Tensor:
            patches = cut(pixels, patch, "hwc").unflatten(0, (len(pixels), -1))
            return looking(patches, None, shapes).last_hidden_state

        return naflex
    positions, (_, side, _) = subject.model.config.positions, subject.workload.grid[0]
    fits = isinstance(positions, Table) and positions.rows == side
    options = {} if fits else reference_options(subject)  # interpolating costs
    return lambda: looking(pixels, **options).last_hidden_state


def transformers_batch(subject: Subject, mode: Mode | None) -> Contender:
    """transformers on the batch."""
    run = prepared(subject, transformers_forward(subject), mode)
    return Contender([Call(run, rows(subject))], subject.model.reference)


def timm_batch(subject: Subject, mode: Mode | None) -> Contender:
    """timm on the batch."""
    model = timm_model(subject)
    pixels: Any = subject.pixels
    features: Any = model.forward_features
    run = prepared(subject, lambda: features(pixels), mode)
    return Contender([Call(run, rows(subject))], model)


def prepared(
    subject: Subject, run: Callable[[], Tensor], mode: Mode | None
) -> Callable[[], Tensor]:
    """Return a forward as it is, or compiled. Raises: Unavailable."""
    return run if mode is None else compile_it(subject, run, mode)


NATIVE_BASELINE = "transformers"
NATIVE_PEERS = (
    Peer(NATIVE_BASELINE, lambda subject: transformers_batch(subject, None)),
    Peer("timm", lambda subject: timm_batch(subject, None)),
    Peer("timm, compiled", lambda subject: timm_batch(subject, "default")),
    Peer("transformers, compiled", lambda subject: transformers_batch(subject, "default")),
)
AUTOTUNED = (
    Peer("timm, max-autotune", lambda subject: timm_batch(subject, "max-autotune"), LONGEST),
    Peer(
        "transformers, max-autotune",
        lambda subject: transformers_batch(subject, "max-autotune"),
        LONGEST,
    ),
)
