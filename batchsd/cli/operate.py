"""The commands that look after a run that is there: verify, reproduce."""

from __future__ import annotations

import sys

import click

from batchsd.cli.terminal import say
from batchsd.progress import counted


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
        f"{counted(verdict.shards, 'shard')}, {counted(verdict.rows, 'row')}, {counted(verdict.pictures, 'picture')}, "
        f"{verdict.bytes / 2**20:,.1f} MiB: {counted(faults, 'fault') if faults else 'all as their markers say'}"
    )
    if verdict.missing:
        say(f"{counted(verdict.missing, 'shard')} not drawn yet; run the job again to go on")
    if faults or verdict.missing:
        raise SystemExit(1 if faults else 3)


@click.command()
@click.argument("run_folder", metavar="RUN")
@click.option("--id", "wanted", required=True, metavar="X", help="the row's id, or <manifest file>:<row>")
@click.option("--repeat", type=click.IntRange(min=0), default=0, metavar="N", help="which of a row's pictures, from 0")
@click.option("--model", default="", metavar="PATH", help="where the checkpoint lies, if it has moved")
@click.option("--to", type=click.Path(dir_okay=False), metavar="FILE", help="a PNG of both: stored left, drawn right")
def reproduce(run_folder: str, wanted: str, repeat: int, model: str, to: str | None) -> None:
    """Draw one row of RUN again, from the run folder alone, and compare: 0 the same within 1 of 255, 1 not."""
    from pathlib import Path

    from batchsd.place import gpus_here
    from batchsd.reproduce import Run, side_by_side

    run = Run(run_folder, model)
    found = run.find(wanted, repeat)
    auto = "cuda" if gpus_here() else "cpu"
    compared = run.compare(found, auto if run.job.model.device == "auto" else "")
    click.echo(f"{found.place}: {str(found.row.ours['prompt'])[:100]}")
    if compared.pixels is None:
        now = compared.drawn
        click.echo(f"then {found.row.ours['status']}, now {now.status} ({now.error or 'a picture'})")
    else:
        apart = compared.pixels
        click.echo(
            f"{'the same' if compared.same else 'another'} picture: pixels differ by {apart.largest} of 255 at most, "
            f"{apart.mean:.3g} on average, {100 * apart.share:.3g} % of them at all"
        )
    for line in compared.versions or ("every version is the same",):
        click.echo(line)
    if to:
        Path(to).write_bytes(side_by_side(compared))
    if not compared.same:
        raise SystemExit(1)
