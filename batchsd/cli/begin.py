"""The commands that write something to begin from: init, new-plugin."""

from __future__ import annotations

from pathlib import Path

import click

from batchsd.new_plugin import KINDS


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path), default=Path("."))
def init(folder: Path) -> None:
    """Write a small job file with its manifest into FOLDER, to begin from."""
    from batchsd.starter import start

    job, manifest = start(folder)
    click.echo(f"wrote {job} and {manifest}; draw them with: batchsd run {job}")


@click.command("new-plugin")
@click.argument("name")
@click.option("--kind", type=click.Choice(KINDS), default="score", show_default=True, help="what the plugin brings")
def new_plugin(name: str, kind: str) -> None:
    """Write a plugin that works as it stands into the folder NAME: module, test, job, pyproject.toml."""
    from batchsd.new_plugin import new_plugin as write

    plugin, *rest = write(name, kind, Path())
    click.echo(f"wrote {plugin} (a {kind}: edit this), and beside it {', '.join(path.name for path in rest)}")
    click.echo(f"try it: cd {name} && pytest -q && batchsd run job.toml")
