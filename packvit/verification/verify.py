"""Verify a checkpoint, or a family by small random models."""

from collections.abc import Iterator
from contextlib import ExitStack
from copy import copy
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from packvit import hub
from packvit.checkpoints.layouts import Variant
from packvit.config import Table
from packvit.encoder import Encoder
from packvit.families import FAMILIES
from packvit.model.options import LoadOptions
from packvit.verification import Comparison, Findings, VerificationError, VerifyOptions, certificate
from packvit.verification.comparison import compare_outputs
from packvit.verification.files import (
    compare_photographs,
    compare_saved,
    compare_taken_over,
    obstacle_to_photographs,
)
from packvit.verification.references import ReferenceModel, import_reference, write_random
from packvit.verification.running import interpolation_error
from packvit.verification.second import compare_reference_neighbours, compare_with_timm, doubts
from packvit.verification.timm_models import NoCounterpartError
from packvit.version import is_newer, version_of

ANTIALIASED = ("bilinear_antialias", "bicubic_antialias")
TOWER = "the reference is the tower alone, as save_pretrained writes it"
CONVERTED = (
    "{library} does not read this layout: the reference has the weights as save_pretrained "
    "rewrote them"
)


def verify_checkpoint(
    name_or_folder: str | Path,
    options: VerifyOptions,
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
) -> Findings:
    """Compare a checkpoint, named on the hub or in a folder, with its reference's model of it.

    Raises: CheckpointError if either of the two cannot read it; ImportError without the reference.
    """
    checkpoint = hub.read_tower(name_or_folder, revision)
    kind = hub.family_of(checkpoint)
    import_reference(kind.family)
    loading = LoadOptions(device=device, dtype=torch.float32)
    return verify(kind.from_checkpoint(checkpoint, loading), options)


def verify_family(
    encoder: type[Encoder], options: VerifyOptions, *, device: str | torch.device | None = None
) -> Iterator[Findings]:
    """Yield the findings for each variant that the library reads, with small random weights.

    Raises: ImportError without the reference's library.
    """
    import_reference(encoder.family)
    library = version_of(encoder.family.reference.library)
    for variant in encoder.family.reference.variants:
        if variant.since and is_newer(variant.since, library):
            continue
        yield verify_variant(encoder, variant, options, device)


def verify_variant(
    encoder: type[Encoder],
    variant: Variant,
    options: VerifyOptions,
    device: str | torch.device | None,
) -> Findings:
    """Compare one small random model."""
    with TemporaryDirectory() as folder:
        model = write_random(variant, encoder.family, Path(folder), options.seed)
        loaded = encoder.from_pretrained(Path(folder), device=device, dtype=torch.float32)
        return verify(loaded, options, variant.name, model)


def vouch(encoder: Encoder, weights: str) -> dict[str, Any]:
    """Return a certificate for an encoder: the one in its folder, or else a new, quick one.

    The one in the folder is used if it applies to this encoder. `weights` is the checkpoint's
    `sha256()`.

    Raises: VerificationError naming the worst comparison; ImportError without the reference.
    """
    checkpoint, dtype = encoder.checkpoint, str(encoder.dtype).removeprefix("torch.")
    assert checkpoint is not None  # it was loaded by name
    found = certificate.read_beside(checkpoint)
    if found is not None and not certificate.why_not(
        found,
        checkpoint,
        weights,
        device=encoder.device.type,
        dtype=dtype,
        backend=encoder.attention,
    ):
        return found
    import_reference(encoder.family)
    options = LoadOptions(device=encoder.device, dtype=torch.float32)
    exact = type(encoder).from_checkpoint(checkpoint, options)
    lower = tuple({"bfloat16", dtype} - {"float32"})
    findings = verify(exact, VerifyOptions(quick=True, lower=lower))
    if findings.missed:
        raise VerificationError(
            f"{checkpoint.name} is not verified: {len(findings.missed)} of {len(findings.rows)} "
            f"comparisons with {findings.reference} are beyond their limit, the first being "
            f"{findings.missed[0].said}. `packvit verify` shows them all."
        )
    return certificate.certify([findings])


def verify(
    encoder: Encoder,
    options: VerifyOptions,
    variant: str | None = None,
    memory: nn.Module | None = None,
) -> Findings:
    """Compare an encoder in float32 with its reference's model of its checkpoint.

    `variant` names a small random model, and `memory` is that model before it was saved.
    """
    checkpoint = encoder.checkpoint
    assert checkpoint is not None  # it was loaded by one of the functions above
    assert encoder.dtype == torch.float32
    folder = checkpoint.files[0].parent
    remarks = []
    with ExitStack() as stack:
        if not readable_as_is(encoder):
            library = encoder.family.reference.library
            remarks.append(TOWER if encoder.merger else CONVERTED.format(library=library))
            converted = Path(stack.enter_context(TemporaryDirectory()))
            whole, encoder = encoder, tower_alone(encoder)
            if encoder.projection is not whole.projection:
                remarks.append(f"not compared: the projection to {whole.config.projection}")
            if encoder.merger is not whole.merger:
                remarks.append("not compared: the merger")
            encoder.save_pretrained(converted)
            reference = ReferenceModel(encoder.family, converted)
        else:
            reference = ReferenceModel(encoder.family, folder)
        if antialiases(encoder) and (error := interpolation_error(encoder.device)) > 1e-3:
            remarks.append(
                "torch interpolates an image to one column wrongly here when it antialiases (by "
                f"{error:.1f}); the reference was run with a workaround"
            )
        rows: list[Comparison] = list(compare_outputs(encoder, reference, options))
        rows.append(compare_reference_neighbours(encoder, reference, options))
        second, missing = None, []
        if options.timm and reference.library != "timm":
            try:
                second, more = compare_with_timm(encoder, reference, options)
                rows += more
            except NoCounterpartError as error:
                missing.append(f"timm: {error}")
        remarks += doubts(rows)
        if memory is not None:
            rows.append(compare_taken_over(encoder, memory))
        rows += compare_saved(encoder, reference)
        obstacle = obstacle_to_photographs(reference, checkpoint)
        if obstacle is None:
            rows += compare_photographs(encoder, folder, options)
        else:
            missing.append(obstacle)
        return Findings(
            family=encoder.family.name,
            model=f"random weights, seed {options.seed}" if variant else checkpoint.name,
            variant=variant or "published",
            revision=checkpoint.revision,
            weights=checkpoint.sha256(),
            settings=certificate.settings_digest(checkpoint),
            reference=reference.architecture,
            second=second,
            device=encoder.device.type,
            rows=tuple(rows),
            not_compared=tuple(missing),
            remarks=tuple(remarks),
        )


def readable_as_is(encoder: Encoder) -> bool:
    """Return whether the reference reads the files of this checkpoint as they are."""
    checkpoint = encoder.checkpoint
    assert checkpoint is not None
    if encoder.family.reference.library == "timm":  # by its own names alone
        return any(layout.marker in checkpoint.tensors for layout in encoder.family.layouts)
    layout = encoder.family.layout(checkpoint.tensors, checkpoint.config).name
    if encoder.merger is not None and encoder.skipped:  # of a whole model, whose tower it is
        return False
    without_text = encoder.projection is not None and not checkpoint.config.get("architectures")
    named = bool(checkpoint.config.get("model_type"))  # or it comes with code of its own
    return named and layout == "transformers" and not without_text


def tower_alone(encoder: Encoder) -> Encoder:
    """Return an encoder without the parts that transformers' class of its tower lacks.

    That is a projection to the space shared with text, or a merger beside the language model.
    """
    lacking = [
        part
        for part in ("projection", "merger")
        if getattr(encoder, part) is not None and not has_words(encoder, part)
    ]
    tower = copy(encoder)
    tower._modules = {**encoder._modules, **dict.fromkeys(lacking)}
    tower.config = replace(encoder.config, **dict.fromkeys(lacking))
    return tower


def has_words(encoder: Encoder, part: str) -> bool:
    """Return whether transformers' layout of a tower has a name for one of its parts."""
    layouts = [layout for layout in encoder.family.layouts if layout.name == "transformers"]
    rules = layouts[0].rules if layouts else ()
    return any(rule.ours.startswith(f"{part}.") for rule in rules)


def antialiases(encoder: Encoder) -> bool:
    """Return whether the reference resizes learned positions with antialiasing."""
    table = encoder.config.positions
    return isinstance(table, Table) and table.any_grid and table.resize in ANTIALIASED


def family_names() -> dict[str, type[Encoder]]:
    """Return the families by their names on the command line, which are their modules' names."""
    return {encoder.__module__.rpartition(".")[2]: encoder for encoder in FAMILIES}
