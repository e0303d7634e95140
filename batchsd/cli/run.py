"""`batchsd run`: draw, or go on where it stopped."""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack, redirect_stdout

import click

from batchsd.cli.options import load_job, set_option
from batchsd.cli.terminal import Display, say, signals


@click.command()
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
