"""The commands that write something to begin from: init."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path), default=Path("."))
def init(folder: Path) -> None:
    """Write a small job file with its manifest into FOLDER, to begin from."""
    from batchsd.starter import start

    job, manifest = start(folder)
    click.echo(f"wrote {job} and {manifest}; draw them with: batchsd run {job}")
