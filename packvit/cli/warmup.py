"""`packvit warmup`: compile the kernels of a model once, before the first job."""

import json
from dataclasses import asdict

import click

from packvit.cli.command import Command
from packvit.cli.models import explaining, full_name
from packvit.cli.options import json_option, revision_option


@click.command(cls=Command)
@click.argument("model")
@revision_option
@click.option("--device", help="The GPU, for example cuda:1.  [default: the first one]")
@click.option("--fp8", is_flag=True, help="Compile the kernels of fp8 too.")
@json_option
def warmup(model: str, revision: str | None, device: str | None, fp8: bool, as_json: bool) -> None:
    """Compile the kernels that MODEL needs on this GPU, and keep them for later jobs.

    They lie in $PACKVIT_CACHE, or in ~/.cache/packvit. A job compiles what it does not find there,
    which takes it some ten seconds. Useful in a container image: run it on a machine with the same
    kind of GPU, and copy the folder.

    \b
    Examples:
      packvit warmup apple/aimv2-large-patch14-native
      PACKVIT_CACHE=/opt/kernels packvit warmup aimv2-large --fp8
    """
    from packvit import hub  # torch is imported here
    from packvit.corpus.encode.warmup import warm_up

    try:
        with explaining(model):
            warmed = warm_up(hub.load(full_name(model), revision=revision, device=device))
            if fp8:
                encoder = hub.load(full_name(model), revision=revision, device=device, fp8=True)
                warmed = warm_up(encoder)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if as_json:
        click.echo(json.dumps(asdict(warmed), default=str))
        return
    kept = f"kept in {warmed.folder}" if warmed.folder else "not kept: the folder is not writable"
    decoder = "with" if warmed.jpegs else "without"
    click.echo(
        f"{warmed.model} on {warmed.gpu}, attention {warmed.attention}, {decoder} JPEG decoding: "
        f"kernels {kept} ({warmed.seconds:.1f} s)"
    )
