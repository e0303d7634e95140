"""A plan and a finished run in a few lines for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from batchsd.card import write_card
from batchsd.ledger import DATA, place_of
from batchsd.marker import Marker, Tally, sum_of
from batchsd.prepare import Prepared
from batchsd.progress import counted, duration, failures
from batchsd.redact import redact

if TYPE_CHECKING:
    from batchsd.revise import Beginning

REPORT_ROWS = 10_000  # of a run, looked at for the report at its end: a second or two; `batchsd report` looks at more


def plan_lines(parts: Sequence[Prepared], where: str, update: bool = False) -> list[str]:
    """What `run` would make, and how far that is. Raises UsageError where the folder holds something else."""
    states = []
    for part in parts:
        plan, ledger = part.plan, part.ledger
        standing = ledger.plan()
        edited = update and standing is not None and standing.hash != plan.hash
        if not edited:
            ledger.check(plan)
        tally = ledger.tally()
        state = f"{len(tally.done):,} of {plan.shards:,} shards done ({counts(tally)})"
        if standing is None:
            state = "new" if plan.number == 1 else "new files or rows of the manifest, to be drawn besides"
        elif len(tally.done) == plan.shards:
            state = f"complete ({counts(tally)}): nothing to do"
        if edited:
            state = f"{state.partition(':')[0]}; the manifest was edited: --update redraws the rows that differ"
        states.append(f"plan {plan.number}: {made_of(plan.rows, plan.shards)}, {state}")
    plan, recipe = parts[-1].plan, parts[-1].recipe
    files = len({file.name for part in parts for file in part.recipe.manifest.files})
    rows, pictures = sum(part.recipe.manifest.rows for part in parts), sum(part.plan.rows for part in parts)
    return [
        f"input   {counted(files, 'file')}, {counted(rows, 'row')}, {counted(plan.repeat, 'picture')} a row",
        f"model   {recipe.job.model.path} ({plan.hard['checkpoint'][:12]}), {plan.hard['model.dtype']}",
        f"output  {shown(recipe.uri)}: {made_of(pictures, sum(part.plan.shards for part in parts))} "
        f"of at most {max(part.plan.rows_per_shard for part in parts):,}, {plan.sink}",
        f"where   {where}",
        *(f"state   {state}" for state in states),
    ]


def to_do(begun: Sequence[Beginning]) -> str:
    """`48 pictures in 6 shards, 16 done, 2 shards built anew`."""
    plans = [beginning.prepared.plan for beginning in begun]
    parts = [made_of(sum(plan.rows for plan in plans), sum(plan.shards for plan in plans))]
    if rows := sum(beginning.tally.rows for beginning in begun):
        parts.append(f"{rows:,} done")
    if anew := sum(len(beginning.revisions) for beginning in begun):
        parts.append(f"{counted(anew, 'shard')} built anew")
    if fresh := [plan.rows for plan, part in zip(plans, begun, strict=True) if plan.number > 1 and not part.tally.rows]:
        parts.append(f"{sum(fresh):,} new in the manifest")
    return ", ".join(parts)


def made_of(pictures: int, shards: int) -> str:
    """`48 pictures in 6 shards`."""
    return f"{counted(pictures, 'picture')} in {counted(shards, 'shard')}"


def counts(tally: Tally) -> str:
    """`47 pictures, 1 failed (1 oom)`."""
    return f"{counted(tally.ok, 'picture')}, {failures(tally.failed)}"


def complete(begun: Sequence[Beginning]) -> str:
    """The line where there is nothing to draw."""
    last = begun[-1].prepared
    if not all(beginning.prepared.ledger.succeeded() for beginning in begun):
        last.ledger.finish(last.plan)
    total = sum_of(beginning.tally for beginning in begun)
    write_card(last.ledger.store, last.plan, total, last.recipe.schema)
    return f"nothing to do: {shown(last.ledger.store.uri)} is complete ({counts(total)})"


def made(begun: Sequence[Beginning], total: Tally, seconds: float) -> str:
    """The last line: what was made, where, how to open it, what there is to look at. Writes the dataset's card."""
    last = begun[-1].prepared
    store = last.ledger.store
    write_card(store, last.plan, total, last.recipe.schema)
    opened = f" ({loading(store.uri)})" if last.plan.sink == "parquet" and total.ok else ""
    parts = f"{counts(total)} in {duration(seconds)} -> {shown(store.uri)}{opened}"
    return "; ".join([parts, *show(begun, total)])


def show(begun: Sequence[Beginning], total: Tally) -> Iterator[str]:
    """Write what shows a run to people, and say where it is.

    The run is done by now: what goes wrong here is said, and is no failure of the run.
    """
    store, sink = begun[-1].prepared.ledger.store, begun[-1].prepared.plan.sink

    def contact_sheet() -> str:
        from batchsd.contact import CONTACT, write_contact_sheet

        markers = (marker for beginning in begun for marker in beginning.prepared.ledger.markers())
        write_contact_sheet(store, [table for marker in markers for table in _table(marker)])
        return CONTACT

    def report() -> str:
        from batchsd.report import REPORT, write_report

        write_report(store.uri, store, REPORT, REPORT_ROWS)
        return REPORT

    sheet = [("contact sheet", contact_sheet)] if sink == "parquet" and total.ok else []
    for name, write in (*sheet, ("report", report)):
        try:
            yield f"{name}: {shown(f'{store.uri}/{write()}')}"
        except Exception as error:
            yield f"no {name} ({redact(' '.join(str(error).split())) or type(error).__name__})"


def _table(marker: Marker) -> Iterator[tuple[str, int]]:
    """A Parquet shard's table in `data/` with its rows: where failed rows lie aside, those with a picture."""
    names = [place_of(file.name) for file in marker.files]
    rows = marker.rows if len(names) == 1 else marker.ok
    yield from ((name, rows) for name in names if name.startswith(f"{DATA}/"))


def loading(uri: str) -> str:
    """How `datasets` opens a run of Parquet files."""
    if "://" in uri:
        return f'load_dataset("parquet", data_files="{uri}/{DATA}/*.parquet")'
    return f'load_dataset("{shown(uri)}")'


def shown(place: str | Path) -> str:
    """A path as a person would type it from here; a URI as it is."""
    path = Path(place)
    here = "://" not in str(place) and path.is_relative_to(Path.cwd())
    return str(path.relative_to(Path.cwd())) if here else str(place)
