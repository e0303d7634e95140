"""The commands that look after a run that is there: verify."""

from __future__ import annotations

import sys

import click

from batchsd.cli.terminal import say


@click.command()
@click.argument("run_folder", metavar="RUN")
def verify(run_folder: str) -> None:
    """Check RUN, an output folder: all shards once, rows, hashes, and every picture decodes."""
    from batchsd.verify import Verdict
    from batchsd.verify import verify as look

    faults = 0

    def found(fault: str) -> None:
        nonlocal faults
        faults += 1
        click.echo(fault)

    def looked(so_far: Verdict) -> None:
        if sys.stderr.isatty():
            click.echo(f"\r{so_far.shards:,} shards, {so_far.pictures:,} pictures", nl=False, err=True)

    verdict = look(run_folder, found, looked)
    if sys.stderr.isatty():
        say("")
    click.echo(
        f"{verdict.shards:,} shards, {verdict.rows:,} rows, {verdict.pictures:,} pictures, "
        f"{verdict.bytes / 2**20:,.1f} MiB: {f'{faults:,} faults' if faults else 'all as their markers say'}"
    )
    if verdict.missing:
        say(f"{verdict.missing:,} shards are not drawn yet; run the job again to go on")
    if faults or verdict.missing:
        raise SystemExit(1 if faults else 3)
