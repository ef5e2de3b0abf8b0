"""What a job writes in its manifest: the settings that decide its rows, and what it begins with."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from packvit.config import EncoderConfig, ImageConfig
from packvit.corpus.folder.layout import fingerprint
from packvit.corpus.inputs.listing import Listing
from packvit.corpus.inputs.retries import BOUND
from packvit.corpus.settings import EmbedOptions
from packvit.encoder import Encoder
from packvit.images.drafts import MARGIN
from packvit.model.device import name_device
from packvit.packs.planning import PLAN_VERSION
from packvit.version import version_of

NUMBERS_FROM = ("torch", "numpy", "pillow", "pyarrow")  # packages that can change what is written


def describe_job(encoder: Encoder, weights: str, options: EmbedOptions) -> dict[str, Any]:
    """Return all settings that decide what is written, for the fingerprint and the manifest."""
    outputs = options.outputs(encoder.config)
    return {
        "revision": encoder.checkpoint.revision if encoder.checkpoint else None,
        "weights_sha256": weights,
        "family": encoder.family.name,
        "config": asdict(encoder.config),
        "positions": "interpolate" if encoder.embeddings.interpolate else "checkpoint",
        "preprocessing": {
            **without_clips(encoder.images),
            "resize": options.resize,
            "max_patches": options.max_patches,
            "max_pixels": options.max_pixels,
            # The pixels are the same except in damaged scans, which the two fill differently.
            "decode": options.decode,
            # Of "fast", whose pixels are not Pillow's of the whole JPEG.
            **({"draft_margin": MARGIN} if options.decode == "fast" else {}),
        },
        "device": encoder.device.type,
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "attention": encoder.attention,
        "invariant": encoder.invariant,
        "fp8": "int8" if encoder.fp8 else False,
        "compiled": encoder.compiled,
        "token_budget": options.token_budget,
        "plan_version": PLAN_VERSION,
        "pooled": pooled_from(encoder.config),
        **({"text_space": options.text_space} if options.text_space else {}),
        "lists": list(outputs.lists),
        **({"keep": [list(column) for column in options.keep]} if options.keep else {}),
        "dtype_out": options.dtype_out,
        # Left out where it is what it was before there was a choice.
        **({"vector_dtype": "float16"} if options.vector_dtype == "float16" else {}),
        "rows_per_part": options.rows_per_part,
        "versions": {package: version_of(package) for package in ("packvit", *NUMBERS_FROM)},
    }


def without_clips(images: ImageConfig) -> dict[str, Any]:
    """Return how images are prepared, without the size of frames: a job has no clips."""
    return {name: value for name, value in asdict(images).items() if name != "frame_sizing"}


def pooled_from(config: EncoderConfig) -> str:
    """Return in words what an image's one vector is."""
    if config.pool:
        return "checkpoint"
    return "mean of merged tokens" if config.merger else "mean of tokens"


def draft(
    encoder: Encoder, described: Mapping[str, Any], listing: Listing, format: str
) -> dict[str, Any]:
    """Return the manifest of a job before anything is written."""
    settings = {**described, "inputs_sha256": listing.sha256()}
    settings |= {"kept_sha256": listing.kept_sha256()} if "keep" in described else {}
    return {
        "format": format,
        "complete": False,
        "fingerprint": fingerprint(settings),
        "model": encoder.checkpoint.name if encoder.checkpoint else type(encoder).__name__,
        **settings,
        "inputs": len(listing),
        "ignored": listing.ignored,
        "root": listing.root,
        "retries": asdict(BOUND),
        "device_names": [name_device(encoder.device)],  # others that embed parts are added
        "certificate_sha256": None,
        "exports": {},
        "counts": None,
    }


def rows_before(recorded: Mapping[str, Any]) -> int | None:
    """Return the rows per part that a manifest records, or None."""
    rows = recorded.get("rows_per_part")
    return rows if type(rows) is int and rows > 0 else None
