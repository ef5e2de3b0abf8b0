"""Our peers, each set up as its authors recommend, on the same weights and images.

Inputs that a peer does not compute itself (pixels, padding, masks, coordinates) are made before the
clock starts.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from packvit.bench.contenders import Call, Contender, Subject, Unavailable
from packvit.config import SinCos, Table
from packvit.model.positions import sine_cosine, sine_cosine_axis
from packvit.packs.places import PatchPlaces
from packvit.verification.references import tower
from packvit.verification.running import inputs, last_state
from packvit.verification.towers import is_tower, last_order

Mode = Literal["default", "max-autotune"]  # of torch.compile
LONGEST = 120.0  # seconds that compiling may take
MULTIPLE = 8  # of padded lengths, so that masks are aligned and need no copy


class Peer(NamedTuple):
    """Another way to run the same weights."""

    title: str
    build: Callable[[Subject], Contender]  # raises Unavailable
    longest: float | None = None  # seconds that its first call may take


def reference_options(subject: Subject) -> dict[str, Any]:
    """Return the options with which the reference takes grids of other sizes."""
    asked = subject.model.resizes and subject.model.encoder.family.reference.interpolates
    return {"interpolate_pos_encoding": True} if asked else {}


def batch(subject: Subject, members: list[int]) -> Call:
    """Return one forward of images that share a grid."""
    looking, options = tower(subject.model.reference), reference_options(subject)
    each = [
        inputs(looking, subject.images[image], *subject.workload.grid[image][1:])
        for image in members
    ]
    given: dict[str, Any] = {name: torch.cat([one[name] for one in each]) for name in each[0]}
    if is_tower(looking):  # whose images lie end to end
        return tower_call(subject, members, given)
    if "pixel_attention_mask" in given:
        given["pixel_attention_mask"] = None  # nothing is padded, and a mask would cost time
    places = torch.stack([subject.rows[image] for image in members])
    prefix = places.new_full((len(members), subject.model.config.prefix), -1)
    return Call(lambda: last_state(looking, given, **options), torch.cat([prefix, places], 1))


def tower_call(subject: Subject, members: list[int], given: dict[str, Any]) -> Call:
    """Return one forward of a tower on images end to end, of any grids."""
    looking = tower(subject.model.reference)
    rows = []
    for image in members:
        _, tall, wide = subject.workload.grid[image]
        order = last_order(looking, (1, tall, wide))
        rows.append(subject.rows[image][order.to(subject.patches.device)])
    return Call(lambda: looking(**given).last_hidden_state, torch.cat(rows))


def packed(subject: Subject) -> Contender:
    """The reference on one pack, where its model takes one.

    Raises: Unavailable where it does not.
    """
    if not is_tower(tower(subject.model.reference)):
        raise Unavailable(f"{type(tower(subject.model.reference)).__name__} takes no packs")
    members = list(range(len(subject.images)))
    return Contender([batch(subject, members)], subject.model.reference)


def packed_compiled(subject: Subject) -> Contender:
    """The same, compiled for the pack's own sizes."""
    (call,) = packed(subject).calls
    run = compile_it(subject, call.run)
    return Contender([call._replace(run=run)], subject.model.reference)


def one_by_one(subject: Subject) -> Contender:
    """The reference, as its examples are written."""
    calls = [batch(subject, [image]) for image in range(len(subject.images))]
    return Contender(calls, subject.model.reference)


def grouped(subject: Subject) -> Contender:
    """The reference on batches of images that share a grid."""
    groups: dict[tuple[int, int, int], list[int]] = {}
    for image, grid in enumerate(subject.workload.grid):
        groups.setdefault(grid, []).append(image)
    if len(groups) == len(subject.images):
        raise Unavailable("no two images share a grid, so it equals one by one")
    calls = [batch(subject, members) for members in groups.values()]
    return Contender(calls, subject.model.reference)


class Padded(NamedTuple):
    """All images in one batch, padded to the longest. Shapes: [N, L, P], and [N, L] twice."""

    patches: Tensor
    real: Tensor  # bool
    rows: Tensor  # the row of the pack, or -1


def pad(subject: Subject) -> Padded:
    """Pad images to the longest, and to a multiple of `MULTIPLE`.

    Raises: Unavailable if there is nothing to pad.
    """
    if len(set(subject.workload.lengths)) == 1:
        raise Unavailable("all images have the same length, so nothing is padded")
    patches = pad_sequence(list(subject.images), batch_first=True)
    rows = pad_sequence(list(subject.rows), batch_first=True, padding_value=-1)
    more = -patches.shape[1] % MULTIPLE
    patches = torch.nn.functional.pad(patches, (0, 0, 0, more))
    rows = torch.nn.functional.pad(rows, (0, more), value=-1)
    return Padded(patches, rows >= 0, rows)


def padded_forward(subject: Subject) -> tuple[Callable[[], Tensor], Tensor]:
    """Return the padded forward of the model's family, and its rows.

    Raises: Unavailable if the family has none.
    """
    looking, padded = tower(subject.model.reference), pad(subject)
    kind = type(looking).__name__
    if kind.startswith("Siglip2"):
        shapes = subject.grid_thw[:, 1:]
        return lambda: looking(padded.patches, padded.real, shapes).last_hidden_state, padded.rows
    if kind.startswith("Aimv2") and isinstance(subject.model.config.positions, SinCos):
        return padded_aimv2(subject, looking, padded), padded.rows
    raise Unavailable(f"{kind} takes no mask")


def padded_aimv2(subject: Subject, looking: Any, padded: Padded) -> Callable[[], Tensor]:
    """AIMv2's own layers on padded tokens: transformers masks them, but embeds images of one size.

    The patch convolution runs as a linear layer, and positions are computed beforehand; both favour
    the peer.
    """
    config, embeddings = subject.model.config, looking.embeddings
    convolution = embeddings.patch_embed
    assert isinstance(config.positions, SinCos)
    like = padded.patches
    places = PatchPlaces.from_grid(subject.workload.grid, device=like.device)
    side = max(max(rows, columns) for _, rows, columns in subject.workload.grid)
    axis = sine_cosine_axis(config.positions, side, config.width, like.device, like.dtype)
    flat = sine_cosine(axis, places)
    positions = flat[padded.rows.clamp(min=0)]
    mask = padded.real[:, None, None, :].expand(-1, 1, padded.real.shape[1], -1)

    def run() -> Tensor:
        weight = convolution.weight.permute(0, 2, 3, 1).flatten(1)
        tokens = torch.nn.functional.linear(padded.patches, weight, convolution.bias)
        tokens = embeddings.rms_norm(tokens) + positions
        encoded = looking.encoder(inputs_embeds=tokens, attention_mask=mask)
        return looking.rms_norm(encoded.last_hidden_state)

    return run


def padded(subject: Subject) -> Contender:
    """The reference on one padded batch with a mask."""
    run, rows = padded_forward(subject)
    return Contender([Call(run, rows)], subject.model.reference)


def compile_it(
    subject: Subject, run: Callable[[], Tensor], mode: Mode = "default"
) -> Callable[[], Tensor]:
    """Compile a forward. Raises: Unavailable without --compiled."""
    if not subject.compiled:
        raise Unavailable("compilation takes a while: ask for it with --compiled")
    return torch.compile(run, mode=mode)


def padded_compiled(subject: Subject) -> Contender:
    """The same, compiled; one batch of equal images where nothing is padded."""
    if len(set(subject.workload.grid)) == 1:
        run, rows = batch(subject, list(range(len(subject.images))))
    else:
        run, rows = padded_forward(subject)
    return Contender([Call(compile_it(subject, run), rows)], subject.model.reference)


def timm(subject: Subject) -> Contender:
    """timm's NaFlexVit on one padded batch with a mask."""
    run, rows, model = timm_forward(subject)
    return Contender([Call(run, rows)], model)


def timm_compiled(subject: Subject) -> Contender:
    """The same, compiled."""
    run, rows, model = timm_forward(subject)
    return Contender([Call(compile_it(subject, run), rows)], model)


def timm_forward(subject: Subject) -> tuple[Callable[[], Tensor], Tensor, Any]:
    """Return NaFlexVit's forward, its rows, and the model with SigLIP2's weights.

    Raises: Unavailable without timm, and for families that NaFlexVit cannot express.
    """
    config = subject.model.config
    if not isinstance(config.positions, Table) or config.gated or config.prefix or config.rotary:
        raise Unavailable("NaFlexVit has not the positions or MLP of this family")
    if find_spec("timm") is None:
        raise Unavailable("timm is not installed; pip install 'packvit[bench]'")
    from timm.models.naflexvit import (  # pyright: ignore[reportMissingImports] # needs torchvision
        NaFlexVit,
        NaFlexVitCfg,
    )

    side = (config.positions.rows, config.positions.columns)
    model = NaFlexVit(
        NaFlexVitCfg(
            patch_size=config.patch,
            embed_dim=config.width,
            depth=config.layers,
            num_heads=config.heads,
            mlp_ratio=(config.mlp_width + 0.5) / config.width,  # timm rounds down
            act_layer="gelu_tanh",
            global_pool="",
            pos_embed_grid_size=side,
            pos_embed_interp_mode="bilinear",
        ),
        num_classes=0,
    )
    model.load_state_dict(timm_weights(tower(subject.model.reference), side, config.layers))
    model = model.eval().to(subject.patches)
    try:
        padded = pad(subject)
    except Unavailable:  # equal lengths: a batch of which every patch is real
        rows = torch.stack(list(subject.rows))
        padded = Padded(torch.stack(list(subject.images)), rows >= 0, rows)
    places = torch.zeros(*padded.rows.shape, 2, dtype=torch.int64, device="cpu")
    for row, (_, rows, columns) in zip(places, subject.workload.grid, strict=True):
        y, x = torch.meshgrid(
            *(torch.arange(side, dtype=torch.int64, device="cpu") for side in (rows, columns)),
            indexing="ij",
        )
        row[: rows * columns] = torch.stack([y, x], -1).flatten(0, 1)
    places = places.to(padded.patches.device)

    def run() -> Tensor:
        return model.forward_features(padded.patches, places, padded.real)["patches"]

    return run, padded.rows, model


TIMM_NAMES = {  # of a block: timm's to transformers', several where timm has one matrix
    "norm1": ("layer_norm1",),
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.proj": ("self_attn.out_proj",),
    "norm2": ("layer_norm2",),
    "mlp.fc1": ("mlp.fc1",),
    "mlp.fc2": ("mlp.fc2",),
}


def timm_weights(looking: Any, side: tuple[int, int], layers: int) -> dict[str, Tensor]:
    """Return the weights of transformers' SigLIP2 under timm's names."""
    theirs = looking.state_dict()
    named = {"embeds.pos_embed": theirs["embeddings.position_embedding.weight"].view(1, *side, -1)}
    for kind in ("weight", "bias"):
        named[f"embeds.proj.{kind}"] = theirs[f"embeddings.patch_embedding.{kind}"]
        named[f"norm.{kind}"] = theirs[f"post_layernorm.{kind}"]
        for layer in range(layers):
            for name, parts in TIMM_NAMES.items():
                found = [theirs[f"encoder.layers.{layer}.{part}.{kind}"] for part in parts]
                named[f"blocks.{layer}.{name}.{kind}"] = torch.cat(found)
    return named


def peers(library: str) -> tuple[Peer, ...]:
    """Return the peers of a family that is verified beside `library`; the baseline first."""
    return (
        Peer(f"{library}, one by one", one_by_one),
        Peer(f"{library}, grouped by equal grid", grouped),
        Peer(f"{library}, packed", packed),
        Peer(f"{library}, packed, compiled", packed_compiled, LONGEST),
        Peer(f"{library}, padded", padded),
        Peer(f"{library}, padded, compiled", padded_compiled),
        Peer("timm NaFlexVit, padded", timm),
        Peer("timm NaFlexVit, padded, compiled", timm_compiled),
    )
