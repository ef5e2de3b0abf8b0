"""The names of models, the same in every command, and what a misspelt one may mean. No torch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches

import click

# Short names of published checkpoints. `bench` gives the same architectures random weights.
SHORT = {
    "aimv2-large": "apple/aimv2-large-patch14-native",
    "aimv2-l14-224": "apple/aimv2-large-patch14-224",
    "aimv2-l14-448": "apple/aimv2-large-patch14-448",
    "siglip2-so400m": "google/siglip2-so400m-patch16-naflex",
    "siglip-so400m14-384": "google/siglip-so400m-patch14-384",
    "clip-l14-quickgelu": "openai/clip-vit-large-patch14",
    "clip-l14": "laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
    "dinov2-b14": "facebook/dinov2-base",
    "dinov2-l14": "facebook/dinov2-large",
    "dinov3-b16": "facebook/dinov3-vitb16-pretrain-lvd1689m",
    "dinov3-l16": "facebook/dinov3-vitl16-pretrain-lvd1689m",
    "qwen3-vit": "Qwen/Qwen3.5-9B",
    "qwen2.5-vl-vit": "Qwen/Qwen2.5-VL-7B-Instruct",
    "qwen2-vl-vit": "Qwen/Qwen2-VL-7B-Instruct",
    "moonvit-so400m": "moonshotai/Kimi-K2.5",
    "c-radio-h16": "nvidia/C-RADIOv4-H",
    "tipsv2-b14": "google/tipsv2-b14",
    "pe-spatial-l14": "timm/vit_pe_spatial_large_patch14_448.fb",
}
MODEL_HELP = (
    f"A checkpoint's name on the hub, its folder, tiny, or a short name: {', '.join(SHORT)}."
)


def full_name(model: str) -> str:
    """Return the hub's name for a short name; every other name, and a folder, as it is."""
    return model if os.path.isdir(model) else SHORT.get(model, model)


@contextmanager
def explaining(model: str | None) -> Iterator[None]:
    """Say which known name a model may mean, where a checkpoint cannot be read."""
    from packvit.checkpoints.errors import CheckpointError

    try:
        yield
    except CheckpointError as error:
        raise click.ClickException(" ".join([str(error), *meant(model)])) from error


def meant(model: str | None) -> Iterator[str]:
    """Yield what a name that is not known may mean, if any name is near."""
    if model is None or os.path.exists(model):
        return
    from packvit.checkpoints.folders import EMBEDDED
    from packvit.families import FAMILIES

    published = [name for encoder in FAMILIES for name in encoder.family.checkpoints]
    known = [*EMBEDDED, *SHORT, *published]
    if model in known:
        return
    # By the whole name, and by what stands behind the owner.
    by_word = {name.rpartition("/")[2].lower(): name for name in reversed(known)}
    by_word |= {name.lower(): name for name in known}
    near = get_close_matches(model.lower(), by_word, n=3, cutoff=0.75)
    if not near:
        near = get_close_matches(model.rpartition("/")[2].lower(), by_word, n=3, cutoff=0.75)
    if names := list(dict.fromkeys(by_word[word] for word in near)):
        said = f"Did you mean {' or '.join(names)}?"
    else:
        said = f"Known are {', '.join([*EMBEDDED, *SHORT])}"
        said += ", and the published ones that `packvit info --json` lists."
    yield said
