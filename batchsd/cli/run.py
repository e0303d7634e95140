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
from batchsd.cli.terminal import Display, end, say, signals

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from batchsd.job import Job
    from batchsd.lock import Lock
    from batchsd.marker import Tally
    from batchsd.place import Place
    from batchsd.prepare import Prepared
    from batchsd.revise import Beginning
    from batchsd.stop import Stop

    Begin = Callable[[Sequence[Prepared]], list[Beginning]]

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
    from batchsd.job import fetch_models
    from batchsd.place import choose_place
    from batchsd.prepare import prepare
    from batchsd.revise import begin_run, begin_update, beside, limited
    from batchsd.summary import plan_lines

    if update and new:
        raise click.UsageError("--update changes the run that is there, --new leaves it alone: give one of them")
    loaded, where = load_job(job, sets, day), "none" if local else address
    if new:
        loaded = beside(loaded, limit)
    loaded = limited(loaded, limit)
    if dry_run:
        fetch_models(loaded, say)
        with choose_place(loaded, where, os.environ) as place:
            parts = prepare(loaded, place.workers, place.gpu, limit)
            click.echo("\n".join(plan_lines(parts, place.describe(), update)))
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


def carry_out(job: Job, address: str | None, limit: int | None, begin: Begin) -> None:
    """Plan, begin and drive a run to its end. `begin` is called by the holder of the folder's lock."""
    from batchsd.job import fetch_models
    from batchsd.ledger import Ledger
    from batchsd.lock import Lock
    from batchsd.place import choose_place
    from batchsd.prepare import prepare
    from batchsd.stop import Stop, all_drawn, deadline_of
    from batchsd.store import open_store
    from batchsd.summary import complete

    stop, out = Stop(job.run.grace, deadline_of(job.run.deadline, datetime.now())), sys.stdout
    with ExitStack() as stack:
        place = stack.enter_context(choose_place(job, address, os.environ, end))
        if place.on_ray:
            # Ray prints raylet's remarks to stdout, whatever one tells it.
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            if not Ledger(open_store(job.output.uri)).succeeded():
                place.connect()  # it comes up while the plan is made
        stack.enter_context(signals(stop))
        fetch_models(job, say)
        parts = prepare(job, place.workers, place.gpu, limit)
        for reason in parts[0].recognised[:2]:  # all are in the plan
            say(f"model: {reason}")
        for warning in dict.fromkeys([*(text for part in parts for text in part.warnings), *place.warnings]):
            say(f"note: {warning}")
        first = parts[0].ledger
        if first.plan() is None:
            first.check(parts[0].plan)  # a lock is nothing to leave in a folder that is not ours
        lock = stack.enter_context(Lock(first.store))
        begun = begin(parts)
        if all(beginning.complete for beginning in begun):
            totals = [beginning.tally for beginning in begun]
            text = complete(begun)
        else:
            totals, text = draw(begun, place, stop, lock)
        click.echo(text, file=out)
        for beginning, total in zip(begun, totals, strict=True):
            if error := all_drawn(total, beginning.prepared.max_failed):
                raise error


def draw(begun: Sequence[Beginning], place: Place, stop: Stop, lock: Lock) -> tuple[list[Tally], str]:
    """Drive the plans that are not complete, one after the other; give each plan's sum and the last line for people."""
    from batchsd.drive import drive
    from batchsd.marker import sum_of
    from batchsd.summary import made, to_do

    if warning := place.check_nodes(begun[-1].prepared.recipe):
        say(f"note: {warning}")
    say(f"{to_do(begun)}; {place.describe()}")
    began, totals = time.monotonic(), []
    with Display() as display:
        for beginning in begun:
            part = beginning.prepared
            if beginning.complete:
                totals.append(beginning.tally)
                continue
            executor = place.executor(part.recipe, display.log)
            limits = (stop, part.max_failed, display.show, display.log, lock.check, beginning.revisions)
            totals.append(drive(part.ledger, part.plan, beginning.tally, part.shards, executor, *limits))
    return totals, made(begun, sum_of(totals), time.monotonic() - began)
