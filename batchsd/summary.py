"""A plan and a finished run in a few lines for people."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from batchsd.card import write_card
from batchsd.ledger import DATA, Marker, Tally, place_of
from batchsd.prepare import Prepared
from batchsd.progress import duration, failures


def plan_lines(prepared: Prepared, where: str) -> list[str]:
    """What `run` would make, and how far that is. Raises UsageError where the folder holds something else."""
    plan, ledger = prepared.plan, prepared.ledger
    standing = ledger.check(plan)
    tally = ledger.tally()
    if standing is None:
        state = "new"
    elif len(tally.done) == plan.shards:
        state = f"complete ({counts(tally)}): nothing to do"
    else:
        state = f"{len(tally.done):,} of {plan.shards:,} shards done ({counts(tally)})"
    rows, model = prepared.recipe.manifest.rows, prepared.recipe.job.model.path
    files = f"{len(plan.files)} file{'s' if len(plan.files) > 1 else ''}"
    return [
        f"input   {files}, {rows:,} rows, {plan.repeat} picture{'s' if plan.repeat > 1 else ''} a row",
        f"model   {model} ({plan.hard['checkpoint'][:12]}), {plan.hard['model.dtype']}",
        f"output  {shown(ledger.store.uri)}: {plan.rows:,} pictures in {plan.shards:,} shards of at most "
        f"{plan.rows_per_shard:,}, {plan.sink}",
        f"where   {where}",
        f"state   {state}",
    ]


def counts(tally: Tally) -> str:
    """`47 pictures, 1 failed (1 oom)`."""
    return f"{tally.ok:,} pictures, {failures(tally.failed)}"


def made(prepared: Prepared, total: Tally, seconds: float) -> str:
    """The last line: what was made, where, and how to open it. Writes the dataset's card and the contact sheet."""
    store = prepared.ledger.store
    write_card(store, prepared.plan, total, prepared.recipe.schema)
    parts = f"{counts(total)} in {duration(seconds)} -> {shown(store.uri)}"
    if prepared.plan.sink != "parquet" or not total.ok:
        return parts
    from batchsd.contact import CONTACT, write_contact_sheet

    tables = [table for marker in prepared.ledger.markers() for table in _table(marker)]
    write_contact_sheet(store, tables)
    return f"{parts} ({loading(store.uri)}); contact sheet: {shown(f'{store.uri}/{CONTACT}')}"


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
