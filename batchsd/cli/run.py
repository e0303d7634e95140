"""`batchsd run` and `batchsd retry`: draw, or go on where it stopped; draw again what failed."""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack, redirect_stdout
from datetime import datetime
from typing import TYPE_CHECKING

import click

from batchsd.cli.options import date_option, load_job, set_option
from batchsd.cli.terminal import Display, say, signals

if TYPE_CHECKING:
    from collections.abc import Callable

    from batchsd.job import Job
    from batchsd.prepare import Prepared
    from batchsd.revise import Beginning

local_option = click.option("--local", is_flag=True, help="in this process, without Ray")
address_option = click.option("--address", help="a Ray cluster: host:port, auto, local, none")


@click.command()
@click.argument("job")
@set_option
@date_option
@local_option
@address_option
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="the first N rows, into <uri>-limit-N")
@click.option("--update", is_flag=True, help="take up rows that were edited in place, redraw only those")
@click.option("--new", is_flag=True, help="into a folder of its own, <uri>-<plan>")
@click.option("--dry-run", is_flag=True, help="say what would be done")
def run(
    job: str,
    sets: tuple[str, ...],
    day: datetime | None,
    local: bool,
    address: str | None,
    limit: int | None,
    update: bool,
    new: bool,
    dry_run: bool,
) -> None:
    """Draw the pictures of JOB; run again to go on where it stopped."""
    from batchsd.place import choose_place
    from batchsd.prepare import prepare
    from batchsd.revise import begin_run, begin_update, beside
    from batchsd.summary import plan_lines

    if update and new:
        raise click.UsageError("--update changes the run that is there, --new leaves it alone: give one of them")
    loaded, where = load_job(job, sets, day), "none" if local else address
    if new:
        loaded = beside(loaded, limit)
    if dry_run:
        with choose_place(loaded, where, os.environ) as place:
            click.echo("\n".join(plan_lines(prepare(loaded, place.workers, place.gpu, limit), place.describe())))
        return
    carry_out(loaded, where, limit, begin_update if update else begin_run)


@click.command()
@click.argument("run_folder", metavar="RUN")
@local_option
@address_option
def retry(run_folder: str, local: bool, address: str | None) -> None:
    """Draw again the rows of RUN, an output folder, that failed; all others keep their pictures."""
    from batchsd.revise import begin_retry, job_of_run

    job, limit = job_of_run(run_folder)
    carry_out(job, "none" if local else address, limit, begin_retry)


def carry_out(job: Job, address: str | None, limit: int | None, begin: Callable[[Prepared], Beginning]) -> None:
    """Plan, begin and drive a run to its end. `begin` is called by the holder of the folder's lock."""
    from batchsd.drive import Stop, check_failed, deadline_of, drive
    from batchsd.job import fetch_models
    from batchsd.ledger import Ledger
    from batchsd.lock import Lock
    from batchsd.place import choose_place
    from batchsd.prepare import output_uri, prepare
    from batchsd.store import open_store
    from batchsd.summary import counts, made, shown

    stop, out = Stop(job.run.grace, deadline_of(job.run.deadline, datetime.now())), sys.stdout
    with ExitStack() as stack:
        place = stack.enter_context(choose_place(job, address, os.environ))
        if place.on_ray:
            # Ray prints raylet's remarks to stdout, whatever one tells it.
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            if not Ledger(open_store(output_uri(job, limit))).succeeded():
                place.connect()  # it comes up while the plan is made
        stack.enter_context(signals(stop))
        fetch_models(job, say)
        prepared = prepare(job, place.workers, place.gpu, limit)
        for reason in prepared.recognised[:2]:  # all are in the plan
            say(f"model: {reason}")
        for warning in (*prepared.warnings, *place.warnings):
            say(f"note: {warning}")
        ledger, plan = prepared.ledger, prepared.plan
        if ledger.plan() is None:
            ledger.check(plan)  # a lock is nothing to leave in a folder that is not ours
        lock = stack.enter_context(Lock(ledger.store))
        beginning = begin(prepared)
        tally = beginning.tally
        if len(tally.done) == plan.shards:
            ledger.finish(plan)
            check_failed(tally, prepared.max_failed)
            click.echo(f"nothing to do: {shown(ledger.store.uri)} is complete ({counts(tally)})", file=out)
            return
        place.check_nodes(prepared.recipe)
        done = f", {tally.rows:,} are done" if tally.rows else ""
        anew = f", {len(beginning.revisions):,} shards are built anew" if beginning.revisions else ""
        say(f"{plan.rows:,} pictures in {plan.shards:,} shards{done}{anew}; {place.describe()}")
        began = time.monotonic()
        with Display() as display:
            executor = place.executor(prepared.recipe, display.log)
            limits = (stop, prepared.max_failed, display.show, display.log, lock.check, beginning.revisions)
            total = drive(ledger, plan, tally, prepared.shards, executor, *limits)
        click.echo(made(prepared, total, time.monotonic() - began), file=out)
