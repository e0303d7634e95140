"""A finished run, read again: its Parquet files become records as the engine once gave them.

    for shard in shards(run): for record in records(shard): ...

Rows that were put aside come back to their places: a picture's name tells its row, failed rows fill the gaps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchsd.columns import MANIFEST, ON_REQUEST, OURS, picture_column
from batchsd.ledger import Ledger, ledgers, place_of
from batchsd.plan import Plan
from batchsd.store import Store, open_store
from batchsd.types import Record, Request, UsageError
from batchsd.values import remembered, row_index

BATCH = 100  # rows: one row group


@dataclass(frozen=True)
class WrittenShard:
    """One committed shard: its name and its tables (the failed rows' last, where they lie apart)."""

    store: Store
    name: str
    rows: int
    files: tuple[str, ...]


def open_run(run: str) -> tuple[Plan, list[Ledger]]:
    """The newest plan, and the ledgers of all, of a run whose layout is Parquet. Raises UsageError for others."""
    found = ledgers(open_store(run))
    plan = found[-1].plan() if found else None
    if plan is None:
        raise UsageError(f"{run}: no run of batchsd is here (no plan)")
    if plan.sink != "parquet":
        raise UsageError(f"{run}: its layout is {plan.sink!r}; reports and exports are made from parquet runs")
    return plan, found


def shards(run: str) -> list[WrittenShard]:
    """The committed shards, in order. Raises UsageError where there is none."""
    _, plans = open_run(run)
    found = []
    for marker in (marker for ledger in plans for marker in ledger.markers()):
        files = sorted((place_of(file.name) for file in marker.files), key=lambda name: name.startswith("failed/"))
        found.append(WrittenShard(plans[0].store, PurePosixPath(files[0]).stem, marker.rows, tuple(files)))
    if not found:
        raise UsageError(f"{run}: no shard is done yet; run the job first")
    return found


def schema_of(run: str) -> pa.Schema:
    """The run's output schema, with the metadata that its sink was given."""
    shard = shards(run)[0]
    with _open(shard.store, shard.files[0]) as file:
        return file.schema_arrow


def ours_to_columns(schema: pa.Schema) -> dict[str, str]:
    """Which column holds which of our values: a job may have renamed them."""
    return {f.metadata[OURS].decode(): f.name for f in schema if OURS in (f.metadata or {})}


def records(shard: WrittenShard) -> Iterator[Record]:
    """The shard's rows in order."""
    if len(shard.files) == 1:
        yield from (_record(row, i, shard.name) for i, row in enumerate(_rows(shard.store, shard.files[0])))
        return
    good, failed = (_rows(shard.store, file) for file in shard.files)
    following = next(good, None)
    for index in range(shard.rows):
        if following is not None and _index(following) == index:
            yield _record(following, index, shard.name)
            following = next(good, None)
        else:
            yield _record(next(failed), index, shard.name)


def _open(store: Store, name: str) -> pq.ParquetFile:
    file = store.open(name)
    if file is None:
        raise UsageError(f"{store.uri}/{name} is missing; `batchsd verify` lists what else is")
    return pq.ParquetFile(file, page_checksum_verification=True)


def _rows(store: Store, name: str) -> Iterator[pa.Table]:
    """One-row tables."""
    with _open(store, name) as file:
        for batch in file.iter_batches(BATCH):
            table = pa.Table.from_batches([batch], file.schema_arrow)
            yield from (table.slice(i, 1) for i in range(table.num_rows))


def _index(row: pa.Table) -> int:
    return row_index(row[picture_column(row.schema)][0].as_py()["path"])


def _record(row: pa.Table, index: int, shard: str) -> Record:
    named = ours_to_columns(row.schema)
    value: dict[str, Any] = {ours: row[column][0].as_py() for ours, column in named.items()}
    given = [field for field in row.schema if MANIFEST in (field.metadata or {})]
    columns = row.select([field.name for field in given])
    columns = columns.rename_columns([field.metadata[MANIFEST].decode() for field in given])
    key = columns["id"][0].as_py() if "id" in columns.column_names else None
    request = Request(
        key=f"{shard}:{index}" if key is None else str(key),
        index=index,
        inputs={},
        columns=columns,
        row_hash=value["row_hash"] or "",
        **{name: value[name] for name in _ASKED},
    )
    cell = value["image"] or {"bytes": None, "path": "x.png"}
    extension = cell["path"].rpartition(".")[2]
    size = value["height"], value["width"]
    made = {name: value[name]["bytes"] for name in ON_REQUEST if value.get(name)}
    beside = {"made": made, "tokens_cut": value["tokens_cut"], **remembered(value)}
    return Record(request, value["status"], value["error"], cell["bytes"], extension, *size, **beside)


_ASKED = (
    "repeat_index", "prompt", "negative_prompt", "seed", "steps", "guidance_scale", "height", "width",
    "scheduler", "task",
)  # fmt: skip
