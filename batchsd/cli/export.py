"""`batchsd export` and `batchsd report`: a finished run in another form."""

from __future__ import annotations

from pathlib import Path

import click

STRIPS, PATIENCE = 3, 60.0  # rows that a report draws again where nobody said how many; seconds for that


@click.command()
@click.argument("run_folder", metavar="RUN")
@click.option("--sink", required=True, metavar="S", help="parquet, webdataset, folder, or a plugin's")
@click.option("--to", metavar="FOLDER", help="where to; left out: RUN-S")
@click.option("--plugin", "names", multiple=True, metavar="P", help="a plugin to load, as in a job")
def export(run_folder: str, sink: str, to: str | None, names: tuple[str, ...]) -> None:
    """Write RUN's rows in another layout, without drawing again."""
    from batchsd import plugins
    from batchsd.export import export as write
    from batchsd.progress import counted
    from batchsd.summary import shown
    from batchsd.types import UsageError

    sinks = plugins.build(names, Path()).sinks
    if sink not in sinks:
        raise UsageError(f"--sink: {sink!r} is unknown; have {', '.join(sinks)}")
    target = to or f"{run_folder.rstrip('/')}-{sink}"
    rows = write(run_folder, sinks[sink], sink, target)
    click.echo(f"{counted(rows, 'row')} -> {shown(target)}")


@click.command()
@click.argument("run_folder", metavar="RUN")
@click.option("--to", metavar="FILE", help="where to; left out: RUN/report.html")
@click.option("--rows", type=click.IntRange(min=1), default=100_000, metavar="N", help="look at N rows at most")
@click.option(
    "--strips", type=click.IntRange(min=0), metavar="N", help="draw N rows again, to show them from noise to picture"
)
def report(run_folder: str, to: str | None, rows: int, strips: int | None) -> None:
    """Show RUN as one HTML page: pictures, figures, failures, strips from noise to picture, the exact job."""
    from batchsd.progress import counted
    from batchsd.report import write_report
    from batchsd.store import open_store
    from batchsd.summary import shown

    folder, _, name = (to or f"{run_folder.rstrip('/')}/report.html").rpartition("/")
    count, seconds = (STRIPS, PATIENCE) if strips is None else (strips, None)
    count, size = write_report(run_folder, open_store(folder or "."), name, rows, count, seconds)
    click.echo(f"{counted(count, 'picture')} on {shown(to or f'{run_folder}/report.html')} ({size / 2**20:.1f} MiB)")
