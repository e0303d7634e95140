"""The command line, and the only file that prints: results to stdout, progress and errors to stderr.

Exit codes: 0 all rows done; 1 too many rows failed; 2 usage, job or manifest (do not retry); 3 cluster or
storage (a retry may help); 75 stopped by a signal after a clean stop; 130 Ctrl-C.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from batchsd.types import BatchsdError

if TYPE_CHECKING:
    from batchsd.drive import Stop
    from batchsd.job import Job
    from batchsd.progress import Snapshot

LOG_EVERY = 10.0  # seconds, where there is no terminal

set_option = click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="over the job's settings")
json_option = click.option("--json", "as_json", is_flag=True, help="for programs")


def main() -> None:
    """Run a command and exit with its code; a known error is one message, never a traceback."""
    try:
        code = commands.main(prog_name="batchsd", standalone_mode=False)
    except click.exceptions.Abort:
        code = 130
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except BatchsdError as error:
        say(f"batchsd: {error}")
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # `batchsd ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


def say(text: str) -> None:
    click.echo(text, err=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="batchsd")
def commands() -> None:
    """Turn a Parquet manifest of prompts into a dataset of pictures."""


@commands.command()
@click.argument("job")
@set_option
@click.option("--local", is_flag=True, help="in this process, without Ray")
@click.option("--address", help="a Ray cluster: host:port, auto, local, none")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="the first N rows, into <uri>-limit-N")
@click.option("--dry-run", is_flag=True, help="say what would be done")
def run(
    job: str, sets: tuple[str, ...], local: bool, address: str | None, limit: int | None, dry_run: bool
) -> None:
    """Draw the pictures of JOB; run again to go on where it stopped."""
    from batchsd.drive import Stop, check_failed, drive
    from batchsd.ledger import Ledger
    from batchsd.place import choose_place
    from batchsd.prepare import output_uri, prepare
    from batchsd.store import open_store
    from batchsd.summary import counts, made, plan_lines, shown

    loaded = load_job(job, sets)
    stop = Stop(loaded.run.grace)
    out = sys.stdout
    with ExitStack() as stack:
        place = stack.enter_context(choose_place(loaded, "none" if local else address, os.environ))
        if place.on_ray and not dry_run:
            # Ray prints raylet's remarks to stdout, whatever one tells it.
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            if not Ledger(open_store(output_uri(loaded, limit))).succeeded():
                place.connect()  # it comes up while the plan is made
        stack.enter_context(signals(stop))
        prepared = prepare(loaded, place.workers, place.gpu, limit)
        if dry_run:
            click.echo("\n".join(plan_lines(prepared, place.describe())))
            return
        for warning in (*prepared.warnings, *place.warnings):
            say(f"note: {warning}")
        ledger, plan = prepared.ledger, prepared.ledger.begin(prepared.plan)
        tally = ledger.roll_forward()
        if len(tally.done) == plan.shards:
            ledger.finish(plan)
            check_failed(tally, prepared.max_failed)
            click.echo(f"nothing to do: {shown(ledger.store.uri)} is complete ({counts(tally)})", file=out)
            return
        done = f", {tally.rows:,} are done" if tally.rows else ""
        say(f"{plan.rows:,} pictures in {plan.shards:,} shards{done}; {place.describe()}")
        began = time.monotonic()
        with Display() as display:
            executor = place.executor(prepared.recipe, display.log)
            arguments = (executor, stop, prepared.max_failed, display.show, display.log)
            total = drive(ledger, plan, tally, prepared.shards, *arguments)
        click.echo(made(prepared, total, time.monotonic() - began), file=out)


@commands.command()
@click.argument("job")
@set_option
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="the first N rows")
def plan(job: str, sets: tuple[str, ...], limit: int | None) -> None:
    """Say what `run` would make, from the manifest's footers alone."""
    from batchsd.place import choose_place
    from batchsd.prepare import prepare
    from batchsd.summary import plan_lines

    loaded = load_job(job, sets)
    with choose_place(loaded, None, os.environ) as place:
        prepared = prepare(loaded, place.workers, place.gpu, limit)
    click.echo("\n".join(plan_lines(prepared, place.describe())))


@commands.command()
@click.argument("job")
@set_option
def validate(job: str, sets: tuple[str, ...]) -> None:
    """Read every row of JOB's manifest and list those that would be refused."""
    from batchsd import plugins
    from batchsd.manifest import open_manifest
    from batchsd.prepare import check_registered, names_of
    from batchsd.reader import scan

    loaded = load_job(job, sets)
    registry = plugins.build(loaded.plugins, Path())
    check_registered(loaded, registry)
    names = names_of(registry)
    manifest = open_manifest(loaded, names=names)
    bad = 0
    for key, what in scan(manifest, loaded, names):
        bad += 1
        if bad <= 20:
            click.echo(f"{key}: {what}")
    click.echo(f"{manifest.rows:,} rows, {bad:,} bad")
    limit = loaded.run.max_failed
    if bad > (limit if isinstance(limit, int) else limit * manifest.rows):
        raise SystemExit(1)


@commands.command()
@click.argument("run_folder", metavar="RUN")
@json_option
def status(run_folder: str, as_json: bool) -> None:
    """How far RUN, an output folder, is."""
    from batchsd.progress import duration, failures
    from batchsd.status import read_status

    found = read_status(run_folder)
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    click.echo(f"{found['state']}: {found['done']:,} of {found['rows']:,} rows, {failures(found['failed'])}")
    click.echo(f"shards: {found['shards_done']:,} of {found['shards']:,}")
    if found["seconds_left"] is not None:
        click.echo(f"{found['pictures_per_second']:.3g} pictures/s, {duration(found['seconds_left'])} left")
    if found["reason"]:
        click.echo(found["reason"])


@commands.command()
@click.argument("job", required=False)
@set_option
@json_option
def plugins(job: str | None, sets: tuple[str, ...], as_json: bool) -> None:
    """List schedulers, tasks, sinks and watchers with the plugin that brings them."""
    from batchsd.plugins import describe

    rows = describe(load_job(job, sets).plugins if job else (), Path())
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    columns = ("kind", "name", "owner", "version", "origin", "thing")
    widths = {column: max(len(column), *(len(row[column]) for row in rows)) for column in columns}
    for row in ({column: column for column in columns}, *rows):
        click.echo("  ".join(row[column].ljust(widths[column]) for column in columns).rstrip())


@commands.command()
def schema() -> None:
    """The JSON Schema of a job file, for editors."""
    from batchsd.job import json_schema

    click.echo(json.dumps(json_schema(), indent=1))


# -- what is printed -----------------------------------------------------------------------------------------


class Display:
    """Progress on stderr: one living line on a terminal, else a log line every `LOG_EVERY` seconds."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            BarColumn(24), TextColumn("{task.description}"), console=self._console, transient=True
        )
        self._task = self._bar.add_task("starting the workers", total=None)
        self._said = time.monotonic()

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def show(self, at: Snapshot) -> None:
        from batchsd.progress import line

        if self._console.is_terminal:
            if at.rate:
                self._bar.update(self._task, total=at.planned, completed=at.done, description=line(at))
        elif time.monotonic() - self._said >= LOG_EVERY:
            self._said = time.monotonic()
            say(f"{time.strftime('%H:%M:%S')} {line(at)}")

    def log(self, text: str) -> None:
        if self._console.is_terminal:
            self._console.print(text, markup=False)
        else:
            say(f"{time.strftime('%H:%M:%S')} {text}")


# -- the ways in ---------------------------------------------------------------------------------------------


def load_job(path: str, sets: tuple[str, ...]) -> Job:
    from batchsd.job import load

    return load(path, sets, os.environ)


@contextmanager
def signals(stop: Stop) -> Iterator[None]:
    """The first signal asks for a clean stop, the second ends the process at once."""
    codes = {signal.SIGINT: ("Ctrl-C", 130), signal.SIGTERM: ("SIGTERM", 75), signal.SIGUSR1: ("SIGUSR1", 75)}

    def handle(number: int, frame: Any) -> None:
        name, code = codes[signal.Signals(number)]
        if stop.asked:
            raise SystemExit(code)
        stop.ask(name, code)
        text = f"{name}: stopping after the shards in flight, {stop.grace:g} s at most (again: at once)\n"
        os.write(sys.stderr.fileno(), text.encode())  # print itself may have been interrupted

    before = {number: signal.signal(number, handle) for number in codes}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
