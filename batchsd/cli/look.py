"""The commands that only look: plan, validate, status, plugins, schema."""

from __future__ import annotations

import json
import os
import sys
from contextlib import redirect_stdout
from datetime import datetime
from functools import partial
from pathlib import Path

import click

from batchsd.cli.options import date_option, json_option, load_job, set_option
from batchsd.cli.terminal import say
from batchsd.progress import counted


@click.command()
@click.argument("job")
@set_option
@date_option
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="the first N rows")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="pictures a second of one worker")
@click.option("--measure", is_flag=True, help="draw a few rows here to find the rate")
def plan(
    job: str, sets: tuple[str, ...], day: datetime | None, limit: int | None, rate: float | None, measure: bool
) -> None:
    """Say what `run` would make and take, from the manifest's footers and a few of its rows."""
    from batchsd import estimate
    from batchsd.job import fetch_models
    from batchsd.place import choose_place
    from batchsd.prepare import prepare
    from batchsd.revise import limited
    from batchsd.summary import plan_lines

    loaded = limited(load_job(job, sets, day), limit)
    fetch_models(loaded, say)
    with choose_place(loaded, None, os.environ) as place:
        parts = prepare(loaded, place.workers, place.gpu, limit)
        crew = place.crew
    click.echo("\n".join(plan_lines(parts, place.describe())))
    prepared = parts[-1]  # of a manifest that has grown: what is new
    rows = estimate.sample(prepared)
    speed = estimate.Rate(rate, "--rate") if rate else None
    if measure and rows:
        speed = estimate.measure(rows, partial(prepared.recipe, device=crew.device, threads=crew.threads))
    click.echo("\n".join(estimate.estimate_lines(prepared, crew.workers, crew.gpus, speed, rows)))


@click.command()
@click.argument("job")
@set_option
@date_option
def validate(job: str, sets: tuple[str, ...], day: datetime | None) -> None:
    """Read every row of JOB's manifest and list those that would be refused."""
    from batchsd import plugins
    from batchsd.job import fetch_models, model_options, model_path
    from batchsd.manifest import open_manifest
    from batchsd.prepare import check_registered
    from batchsd.reader import scan
    from batchsd.recipe import names_of
    from batchsd.rehearsal import hollow, rehearsal

    loaded = load_job(job, sets, day)
    registry = plugins.build(loaded.plugins, Path())
    check_registered(loaded, registry)
    names = names_of(registry)
    manifest = open_manifest(loaded, names=names)
    fetch_models(loaded, say)
    options = model_options(loaded)
    judge = rehearsal(hollow(model_path(loaded), options["vae"], options["ema"]), registry.tasks)
    bad = 0
    for key, what in scan(manifest, loaded, names, judge):
        bad += 1
        if bad <= 20:
            click.echo(f"{key}: {what}")
    click.echo(f"{counted(manifest.rows, 'row')}, {bad:,} bad")
    limit = loaded.run.max_failed
    if bad > (limit if isinstance(limit, int) else limit * manifest.rows):
        raise SystemExit(1)


@click.command()
@click.argument("run_folder", metavar="RUN")
@json_option
@click.option("--watch", is_flag=True, help="look again until the run is no longer at work")
def status(run_folder: str, as_json: bool, watch: bool) -> None:
    """How far RUN, an output folder, is."""
    from itertools import islice

    from batchsd.status import lines
    from batchsd.status import watch as look

    for found in islice(look(run_folder), None if watch else 1):
        if as_json:
            click.echo(json.dumps(found, indent=None if watch else 1))
        elif watch and sys.stdout.isatty():
            click.clear()
            click.echo("\n".join(lines(found)))
        else:
            click.echo(" | ".join(lines(found)) if watch else "\n".join(lines(found)))


@click.command()
@click.argument("job", required=False)
@set_option
@json_option
def plugins(job: str | None, sets: tuple[str, ...], as_json: bool) -> None:
    """List schedulers, tasks, sinks, scores, filters and watchers with the plugin that brings them."""
    from batchsd.plugins import describe

    with redirect_stdout(sys.stderr):  # a plugin may print while it is imported
        rows = describe(load_job(job, sets).plugins if job else (), Path())
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    columns = ("kind", "name", "owner", "version", "origin", "thing")
    widths = {column: max(len(column), *(len(row[column]) for row in rows)) for column in columns}
    for row in ({column: column for column in columns}, *rows):
        click.echo("  ".join(row[column].ljust(widths[column]) for column in columns).rstrip())


@click.command()
@click.argument("model")
@json_option
def inspect(model: str, as_json: bool) -> None:
    """Say what MODEL (a shipped name, a folder, a file, org/name) is, without loading its weights."""
    from batchsd.job import find_model
    from batchsd.model.inspect import describe, inspect_checkpoint

    facts = inspect_checkpoint(Path(model) if Path(model).exists() else find_model(model, "inspect", say))
    click.echo(json.dumps(facts, indent=1) if as_json else "\n".join(describe(facts)))
    if any(network["problems"] for network in facts["networks"].values()):
        raise SystemExit(2)


@click.command()
def schema() -> None:
    """The JSON Schema of a job file, for editors."""
    from batchsd.job import json_schema

    click.echo(json.dumps(json_schema(), indent=1))
