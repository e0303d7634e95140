"""A plan and a finished run in a few lines for people."""

from __future__ import annotations

from pathlib import Path

from batchsd.card import write_card
from batchsd.ledger import Tally
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
    folder = Path(prepared.ledger.store.uri)
    write_card(prepared.ledger.store, prepared.plan, total, prepared.recipe.schema)
    parts = f"{counts(total)} in {duration(seconds)} -> {shown(folder)}"
    if prepared.plan.sink != "parquet" or not list((folder / "data").glob("*.parquet")):
        return parts
    from batchsd.contact import write_contact_sheet

    sheet = folder / "contact.png"
    write_contact_sheet(folder, sheet)
    return f'{parts} (load_dataset("{shown(folder)}")); contact sheet: {shown(sheet)}'


def shown(path: str | Path) -> str:
    """A path as a person would type it from here."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
