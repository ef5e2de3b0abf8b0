"""`packvit verify`: compare our encoder with its reference, and write a certificate."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from packvit.cli.command import Command
from packvit.cli.models import MODEL_HELP, explaining, full_name
from packvit.cli.options import device_option, revision_option
from packvit.cli.published import run_published
from packvit.verification import Comparison, Findings, VerifyOptions

MISSED = 1


@click.command(cls=Command, context_settings={"show_default": True})
@click.argument("names", nargs=-1)
@click.option("--model", help=MODEL_HELP)
@revision_option
@click.option(
    "--family",
    help="Verify small random models of a family instead: aimv2, siglip2, dinov3, dinov2, "
    "siglip, clip, qwen3_vl, qwen2_5_vl, qwen2_vl, kimi_k25, radio, tipsv2, "
    "perception, onevision, or all.",
)
@click.option(
    "--published",
    metavar="FOLDER",
    type=click.Path(path_type=Path, file_okay=False),
    help="Verify published checkpoints, NAMES or all that are known, and write a certificate of "
    "each into FOLDER; the same command goes on where it was stopped.",
    show_default=False,
)
@click.option(
    "--reference",
    type=click.Choice(["transformers", "timm"]),
    default="transformers",
    help="timm: its model of the same weights as well, where it has one. Perception Encoder, of "
    "which transformers has no class, is compared with timm's in any case.",
)
@device_option
@click.option("--quick", is_flag=True, help="Fewer and smaller images.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**31),
    default=0,
    help="Seed of random weights and images.",
)
@click.option(
    "--certificate",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where to write the certificate; by default packvit-certificate.json in the folder of "
    "--model, if it is one.",
    show_default=False,
)
@click.option("--json", "as_json", is_flag=True, help="Print the certificate instead of the table.")
@click.pass_context
def verify(
    context: click.Context,
    names: tuple[str, ...],
    model: str | None,
    revision: str | None,
    family: str | None,
    published: Path | None,
    reference: str,
    device: str | None,
    quick: bool,
    seed: int,
    certificate: Path | None,
    as_json: bool,
) -> None:
    """Compare an encoder with transformers' model of the same weights, or timm's.

    This compares tokens, prefix, the output of every layer, pooled and projected vectors, for
    images of many shapes, alone and packed, in float32 and bfloat16, with every attention backend
    that runs here; the pixels that both preprocess from the same files; and the weights that
    transformers loads from a checkpoint we save. The exit code is 1 if any difference exceeds its
    limit.

    \b
    Examples:
      packvit verify --model apple/aimv2-large-patch14-native --certificate native.json
      packvit verify --model ./checkpoint
      packvit verify --model facebook/dinov2-small --reference timm
      packvit verify --family all --quick
      packvit verify --published certificates facebook/dinov2-small facebook/dinov2-base
    """
    if sum(choice is not None for choice in (model, family, published)) != 1:
        raise click.UsageError("Give one of --model, --family and --published.")
    if names and published is None:
        raise click.UsageError(
            f"{names[0]} stands alone, and NAMES are for --published. Write --model {names[0]}."
        )
    if published is not None and certificate is not None:
        raise click.UsageError("--published writes into its own folder. Leave out --certificate.")
    if revision is not None and model is None:
        raise click.UsageError("--revision needs --model; random weights have no revision.")
    from packvit.retrieval.nearest import choose_device  # torch is imported here
    from packvit.verification import certificate as certificates

    choose_device(device)  # refused before anything is loaded
    findings = []
    options = VerifyOptions(quick=quick, seed=seed, timm=reference == "timm")
    if published is not None:
        known = [full_name(name) for name in names]
        context.exit(run_published(known, published, options, device, as_json=as_json))
    for found in search(model, family, revision, device, options):
        findings.append(found)
        click.echo(f"{title(found)}: {len(found.rows)} comparisons", err=True)
        if not as_json:
            click.echo(as_table(found))
    said = certificates.certify(findings)
    click.echo(json.dumps(said, indent=1) if as_json else verdict(findings))
    beside = folder_of(model)
    target = certificate or (beside and beside / certificates.NAME)
    if target is not None:
        try:
            certificates.write(target, said)
            click.echo(f"The certificate is {target}.", err=True)
        except OSError as error:
            reason = f"{target} could not be written: {error.strerror}."
            if certificate is not None:
                raise click.ClickException(f"{reason} Name another file.") from error
            click.echo(f"{reason} Name a file with --certificate to have one.", err=True)
    context.exit(0 if said["passed"] else MISSED)


def folder_of(model: str | None) -> Path | None:
    """Return the folder that `model` names, or None."""
    from packvit.checkpoints.folders import EMBEDDED

    return Path(model) if model and model not in EMBEDDED and Path(model).is_dir() else None


def search(
    model: str | None,
    family: str | None,
    revision: str | None,
    device: str | None,
    options: VerifyOptions,
) -> Iterator[Findings]:
    """Verify the chosen encoders one after another.

    Raises: click.UsageError for an unknown family, ClickException for other errors.
    """
    from packvit.verification.references import import_reference
    from packvit.verification.verify import family_names, verify_checkpoint, verify_family

    known = family_names()
    if family is not None and family != "all" and family not in known:
        raise click.UsageError(
            f'No family is called "{family}". Choose all or one of: {", ".join(known)}.'
        )
    try:
        if model is not None:
            with explaining(model):
                found = verify_checkpoint(
                    full_name(model), options, revision=revision, device=device
                )
            yield found
        for name, encoder in known.items():
            if family not in ("all", name):
                continue
            elsewhere = encoder.family.reference.elsewhere
            if elsewhere and family == name:
                raise click.UsageError(elsewhere)
            if elsewhere:
                click.echo(elsewhere, err=True)
                continue
            try:
                import_reference(encoder.family)
            except ImportError as error:
                if family == name or encoder.family.reference.library == "transformers":
                    raise
                click.echo(f"{encoder.family.name} is left out. {error}", err=True)
                continue
            yield from verify_family(encoder, options, device=device)
    except OSError as error:
        raise click.ClickException(str(error)) from error


def title(found: Findings) -> str:
    """Return the model and the reference in words."""
    both = found.reference + (f" and {found.second}" if found.second else "")
    return f"{found.family} {found.variant} ({found.model}) beside {both}"


def as_table(found: Findings) -> str:
    """Return the worst comparison of each kind, with its limit."""
    lines = [title(found)]
    groups: dict[tuple[str, str], dict[str, list[Comparison]]] = {}
    for row in found.rows:
        group = (row.dtype, row.backend) if row.backend != "none" else ("files", "")
        groups.setdefault(group, {}).setdefault(row.what, []).append(row)
    width = max(len(row.what) for row in found.rows)
    for group, kinds in groups.items():
        lines.append(f"  {' '.join(group).strip()}")
        for kind, rows in kinds.items():
            lines.append(f"    {kind:<{width}}  {worst(rows)}")
    lines += [f"  MISSED {row.said}" for row in found.missed[:10]]
    if len(found.missed) > 10:
        lines.append(f"  MISSED {len(found.missed) - 10} more")
    lines += [f"  not compared: {reason}" for reason in found.not_compared]
    lines += [f"  {remark}" for remark in found.remarks]
    return "\n".join(lines)


def worst(rows: Sequence[Comparison]) -> str:
    """Return the comparison closest to its limit, in words."""
    row = max(rows, key=lambda row: (not row.passed, row.worst / row.limit if row.limit else 0.0))
    said = "exact" if row.passed and row.limit == 0 else f"{row.worst:.1e}  limit {row.limit:.1e}"
    own = "" if row.own is None else f" (the reference's own error is {row.own:.1e})"
    return f"{len(rows):>4} x  {'' if row.passed else 'MISSED '}{said}{own}"


def verdict(findings: Sequence[Findings]) -> str:
    """Return the result in a sentence."""
    rows = sum(len(found.rows) for found in findings)
    missed = sum(len(found.missed) for found in findings)
    if missed:
        return f"MISSED: {missed:,} of {rows:,} comparisons are beyond their limit."
    encoders = f"{len(findings)} encoder{'' if len(findings) == 1 else 's'}"
    return f"Passed: all {rows:,} comparisons of {encoders} are within their limits."
