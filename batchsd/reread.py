"""A finished run, read again: its files become records as the engine once gave them.

    for shard in shards(run): for record in records(shard): ...

Rows that were put aside come back to their places: a picture's name tells its row, failed rows fill the gaps.
Parquet brings the manifest's columns back as they were; of other layouts only what those can hold.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchsd import plugins
from batchsd.columns import MANIFEST, ON_REQUEST, OURS, picture_column
from batchsd.job import Job
from batchsd.ledger import Ledger, ledgers, place_of
from batchsd.marker import Marker, Tally
from batchsd.plan import Plan, shards_of
from batchsd.published import Rereads, Row, reread
from batchsd.recipe import sink_of
from batchsd.rows import Refused, key_text
from batchsd.sinks.aside import Aside
from batchsd.sinks.parquet import ParquetSink
from batchsd.store import Store, open_store
from batchsd.types import Record, Request, Shard, Sink, UsageError
from batchsd.values import Wanted, remembered, row_index

BATCH = 100  # rows: one row group


@dataclass(frozen=True)
class WrittenShard:
    """One committed shard: its name and its files (the failed rows' last, where they lie apart).

    `sink` reads them again, but for Parquet's, whose manifest columns come back as Arrow has them, to the nanosecond.
    """

    store: Store
    plan: Plan
    marker: Marker
    shard: Shard
    files: tuple[str, ...]
    schema: pa.Schema
    sink: Sink | None

    @property
    def name(self) -> str:
        return self.shard.name

    @property
    def rows(self) -> int:
        return self.marker.rows

    def key(self, index: int, id: Any) -> str:
        """What people call one of its rows: the manifest's id, else `<manifest file>:<row>`."""
        place = f"{self.plan.files[self.shard.file]['name']}:{self.shard.start + index // self.plan.repeat}"
        try:
            return place if id is None or id != id else key_text("id", id) or place
        except Refused:  # such a row was refused
            return str(id)

    @property
    def id_column(self) -> str:
        """The manifest's name of its ids."""
        return self.plan.job["input"]["columns"].get("id", "id")


def open_run(run: str) -> tuple[Plan, list[Ledger]]:
    """The newest plan, and the ledgers of all, of a run. Raises UsageError where there is none."""
    found = ledgers(open_store(run))
    plan = found[-1].plan() if found else None
    if plan is None:
        raise UsageError(f"{run}: no run of batchsd is here (no plan)")
    return plan, found


def shards(run: str) -> list[WrittenShard]:
    """The committed shards, in order. Raises UsageError where there is none, or the layout does not read back."""
    newest, plans = open_run(run)
    sink = None if newest.sink == "parquet" else sink_of_run(run, newest)
    found = []
    for ledger in plans:
        if (plan := ledger.plan()) is None:
            continue
        planned, schema = shards_of(plan), schema_in(plan)
        for marker in ledger.markers():
            files = sorted((place_of(file.name) for file in marker.files), key=lambda name: name.startswith("failed/"))
            found.append(WrittenShard(ledger.store, plan, marker, planned[marker.shard], tuple(files), schema, sink))
    if not found:
        raise UsageError(f"{run}: no shard is done yet; run the job first")
    return found


def sink_of_run(run: str, plan: Plan) -> Sink:
    """The sink that wrote a run. Raises UsageError where it cannot read what it wrote."""
    job = Job.model_validate_json(json.dumps(plan.job))
    sink = sink_of(job, plugins.build(job.plugins, Path()))
    if not isinstance(sink, Rereads):
        raise UsageError(f"{run}: its sink {plan.sink!r} does not read back what it wrote")
    return sink


def schema_in(plan: Plan) -> pa.Schema:
    """The run's output schema, with the metadata that its sink was given."""
    schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(plan.arrow)))
    told = json.loads(schema.metadata[b"batchsd"]) | {"plan": plan.hash}
    return schema.with_metadata({**schema.metadata, b"batchsd": json.dumps(told, sort_keys=True).encode()})


def sum_of_shards(shards: Iterable[WrittenShard]) -> Tally:
    """What they hold, of all their plans together."""
    total = Tally()
    for shard in shards:
        total.add(shard.marker)
    return total


def ours_to_columns(schema: pa.Schema) -> dict[str, str]:
    """Which column holds which of our values: a job may have renamed them."""
    return {f.metadata[OURS].decode(): f.name for f in schema if OURS in (f.metadata or {})}


def rows(shard: WrittenShard, pictures: Wanted) -> Iterator[Row]:
    """The shard's rows in order: our values, the manifest's id, and the bytes of the pictures that are wanted."""
    wanted = [
        field
        for field in shard.schema
        if (OURS in field.metadata and field.metadata[OURS].decode() not in ON_REQUEST)
        or field.metadata.get(MANIFEST) == shard.id_column.encode()
    ]
    return reread(shard.store, shard.sink or Aside(ParquetSink()), shard.shard, pa.schema(wanted), pictures)


def records(shard: WrittenShard) -> Iterator[Record]:
    """The shard's rows in order, whole."""
    if shard.sink is not None:
        found = reread(shard.store, shard.sink, shard.shard, shard.schema, True)
        yield from (_from_values(row, shard, index) for index, row in enumerate(found))
        return
    if len(shard.files) == 1:
        yield from (_record(row, i, shard) for i, row in enumerate(_rows(shard.store, shard.files[0])))
        return
    good, failed = (_rows(shard.store, file) for file in shard.files)
    following = next(good, None)
    for index in range(shard.rows):
        if following is not None and _index(following) == index:
            yield _record(following, index, shard)
            following = next(good, None)
        else:
            yield _record(next(failed), index, shard)


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


def _record(row: pa.Table, index: int, shard: WrittenShard) -> Record:
    named = ours_to_columns(row.schema)
    value: dict[str, Any] = {ours: row[column][0].as_py() for ours, column in named.items()}
    given = [field for field in row.schema if MANIFEST in (field.metadata or {})]
    columns = row.select([field.name for field in given])
    return _made(value, columns.rename_columns([field.metadata[MANIFEST].decode() for field in given]), index, shard)


def _from_values(row: Row, shard: WrittenShard, index: int) -> Record:
    """Of a layout that holds values as JSON has them: dates are text there, and columns of bytes are absent."""
    arrays = {}
    for field in shard.schema:
        name = (field.metadata or {}).get(MANIFEST, b"").decode()
        if name:
            arrays[name] = _typed(row.travelled.get(name), field.type)
    ours = {name: row.ours.get(name) for name in ours_to_columns(shard.schema)}
    return _made(ours, pa.table(arrays), index, shard)


def _typed(value: Any, kind: pa.DataType) -> pa.Array:
    try:
        return pa.array([value], kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([value]).cast(kind)


def _made(value: Mapping[str, Any], columns: pa.Table, index: int, shard: WrittenShard) -> Record:
    id = columns[shard.id_column][0].as_py() if shard.id_column in columns.column_names else None
    request = Request(
        key=shard.key(index, id),
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
