"""What an output row holds: the manifest's columns, the settings that were used, the picture and its fate.

Our columns always have our types (`steps` is int32, whatever integer the manifest used) and hold the values
as used; all other manifest columns travel untouched. Every field is nullable, every shard has one schema.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from batchsd.job import Job
from batchsd.job_errors import suggestion
from batchsd.redact import redact
from batchsd.types import Record, UsageError
from batchsd.values import SCORE, value_of

# Exactly this, nullable and in this order: anything else loads as plain dicts in `datasets`.
IMAGE_TYPE = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])

RESOLVED: Mapping[str, pa.DataType] = {
    "prompt": pa.string(),
    "negative_prompt": pa.string(),
    "seed": pa.int64(),
    "steps": pa.int32(),
    "guidance_scale": pa.float64(),
    "height": pa.int32(),
    "width": pa.int32(),
    "scheduler": pa.string(),
    "task": pa.string(),
    "repeat_index": pa.int32(),
}
"""What a row may ask, as used. A manifest may hold all but `repeat_index`."""

MADE: dict[str, pa.DataType] = {
    "image": IMAGE_TYPE,
    "status": pa.string(),
    "error": pa.string(),
    "tokens_cut": pa.int32(),
    "row_hash": pa.string(),
    "model": pa.string(),
    "batchsd": pa.string(),
    "mean": pa.float64(),
    "deviation": pa.float64(),
    "dhash": pa.string(),
}
"""What only the run can know."""

ON_REQUEST: Mapping[str, tuple[pa.DataType, Callable[[Job], bool]]] = {
    "estimated_depth": (IMAGE_TYPE, lambda job: job.conditioning.keep_depth),
}
"""What tasks make on the way (`Record.made`), and whether a job wants it as a column."""

INPUT_COLUMNS = (*(name for name in RESOLVED if name != "repeat_index"), "id", "strength")
IMAGE_INPUTS = ("init_image", "depth", "mask", "control_image")

OURS, MANIFEST = (
    b"batchsd",
    b"batchsd.manifest",
)  # field metadata: which of our values, or which manifest column


@dataclass(frozen=True, slots=True)
class Column:
    """One output column: `ours` names our value, else `manifest` the column that travels."""

    name: str
    type: pa.DataType
    ours: str | None = None
    manifest: str | None = None


def manifest_column(name: str, job: Job) -> str:
    """The manifest's name of one of our columns."""
    return job.input.columns.get(name, name)


def travelling(manifest_schema: pa.Schema, job: Job) -> list[str]:
    """The manifest columns that go to the output: all, but condition images held as bytes.

    Those stay behind unless `output.keep_inputs`; paths travel.
    """
    images = {manifest_column(name, job) for name in IMAGE_INPUTS}
    return [
        field.name
        for field in manifest_schema
        if job.output.keep_inputs or field.name not in images or not holds_bytes(field.type)
    ]


def layout(manifest_schema: pa.Schema, job: Job) -> list[Column]:
    """The output's columns in order. Raises UsageError where a rename is unknown or two bear one name."""
    renames = job.output.columns
    scores = job.output.scores
    made = MADE | {name: kind for name, (kind, wanted) in ON_REQUEST.items() if wanted(job)}
    known = {*RESOLVED, *made, *INPUT_COLUMNS, *IMAGE_INPUTS, *job.input.columns, *manifest_schema.names, *scores}
    for ours in renames:
        if ours not in known:
            raise UsageError(f"{job.where('output.columns')}: no column {ours!r}{suggestion(ours, known)}")
    columns = [
        _manifest_column(manifest_schema.field(name), job) for name in travelling(manifest_schema, job)
    ]
    placed = {column.ours for column in columns}
    for ours, kind in {**RESOLVED, **made}.items():
        if ours not in placed:
            columns.append(Column(renames.get(ours, ours), kind, ours=ours))
    columns += [Column(renames.get(name, name), pa.float64(), ours=SCORE + name) for name in scores]
    _check_names_differ(columns, job)
    return columns


def _manifest_column(field: pa.Field, job: Job) -> Column:
    ours = _takes_place(field.name, job)
    if ours:
        return Column(job.output.columns.get(ours, ours), RESOLVED[ours], ours=ours)
    return Column(_new_name(field.name, job), field.type, manifest=field.name)


def _takes_place(name: str, job: Job) -> str | None:
    """The value of ours that is written in place of a manifest column.

    The manifest's own `prompt` becomes the prompt as used. A column that input.columns maps to one of ours
    stays beside it, unless output.columns gives ours that very name.
    """
    if name in RESOLVED and name != "repeat_index" and manifest_column(name, job) == name:
        return name
    mapped = [ours for ours, theirs in job.input.columns.items() if theirs == name and ours in RESOLVED]
    return next((ours for ours in mapped if job.output.columns.get(ours, ours) == name), None)


def _new_name(name: str, job: Job) -> str:
    mapped = [ours for ours, theirs in job.input.columns.items() if theirs == name]
    for ours in (name, *mapped):
        if ours in job.output.columns and ours not in {*RESOLVED, *MADE, *ON_REQUEST}:
            return job.output.columns[ours]
    return name


def _check_names_differ(columns: Sequence[Column], job: Job) -> None:
    counts = Counter(column.name for column in columns)
    twice = [column for column in columns if counts[column.name] > 1]
    if not twice:
        return
    name = twice[0].name
    ours = next((column.ours.removeprefix(SCORE) for column in twice if column.name == name and column.ours), None)
    if ours is None or name in job.output.columns.values():
        raise UsageError(
            f"{job.where('output.columns')}: two output columns would be called {name!r}; choose another name"
        )
    of_manifest = any(column.name == name and not column.ours for column in twice)
    where, what = ("input.manifest", "the manifest's column") if of_manifest else ("output.scores", "the score")
    raise UsageError(
        f"{job.where(where)}: {what} {name!r} bears the name of an output column - "
        f'rename ours: output.columns = {{ {ours} = "{ours}_out" }}'
    )


def output_schema(manifest_schema: pa.Schema, job: Job, metadata: Mapping[str, Any]) -> pa.Schema:
    """The one schema of all shards of a run.

    `metadata` is ours (JSON values: `model` and `version`, which fill the columns `model` and `batchsd`, the
    plan's hash, versions) and is stored under the key `batchsd` together with the job, redacted; the key
    `huggingface` makes `datasets` show pictures.
    """
    fields = []
    for column in layout(manifest_schema, job):
        origin = {OURS: column.ours} if column.ours else {MANIFEST: column.manifest}
        fields.append(pa.field(column.name, column.type, nullable=True, metadata=origin))
    pictures = {field.name: {"_type": "Image"} for field in fields if field.type == IMAGE_TYPE}
    ours = {**metadata, "job": redact(job.resolved()), "job_hash": job.hash()}
    return pa.schema(
        fields,
        metadata={
            "huggingface": json.dumps({"info": {"features": pictures}}),
            "batchsd": json.dumps(ours, sort_keys=True),
        },
    )


def to_table(records: Sequence[Record], schema: pa.Schema, name: str) -> pa.Table:
    """Finished rows as a table of `output_schema`; `name` is the shard's (`train-00042-of-00391`).

    A failed row has a null picture. Settings of a row that never ran are null where they were refused.
    """
    facts, columns = _parsed(schema)
    given = pa.concat_tables([record.request.columns for record in records])
    arrays = []
    for column in columns:
        if column.ours is None:
            arrays.append(given.column(column.manifest).combine_chunks())
        else:
            value = value_of(column.ours)
            arrays.append(pa.array([value(record, name, facts) for record in records], type=column.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def row_json(record: Record, schema: pa.Schema, name: str) -> str:
    """The row as one JSON object: every column but those that hold bytes; dates as text, NaN as null."""
    facts, columns = _parsed(schema)
    row = {}
    for column in columns:
        if column.bytes:
            continue
        if column.ours is None:
            value = record.request.columns.column(column.manifest)[0].as_py()
        else:
            value = value_of(column.ours)(record, name, facts)
            if value is not None and not column.plain:
                value = pa.scalar(value, type=column.type).as_py()  # as a table holds it
        row[column.name] = value
    return json.dumps(json_value(row), ensure_ascii=True, sort_keys=True)


def row_values(record: Record, schema: pa.Schema, name: str) -> dict[str, Any]:
    """A finished row as plain Python values by output column, for sinks; `schema` and `name` are what `open` got.

    The picture is `{"bytes", "path"}`, None where there is none.
    """
    (row,) = to_table([record], schema, name).to_pylist()
    return dict(row)


def facts_of(schema: pa.Schema) -> Mapping[str, Any]:
    """Our metadata of an output schema: `model`, `version`, the job."""
    return _parsed(schema)[0]


@dataclass(frozen=True, slots=True)
class _Parsed(Column):
    """A column of an output schema. `bytes`: it holds binary; `plain`: Python's values are the table's."""

    bytes: bool = False
    plain: bool = False


def _parsed(schema: pa.Schema) -> tuple[Mapping[str, Any], Sequence[_Parsed]]:
    """Metadata and columns of an output schema, read once: a worker writes all its rows with one schema."""
    last = _LAST.get("schema")
    if last is None or last[0] is not schema:
        columns = []
        for field in schema:
            ours, manifest = (field.metadata.get(key, b"").decode() or None for key in (OURS, MANIFEST))
            kind = field.type
            plain = kind in (pa.string(), pa.int32(), pa.int64())
            columns.append(_Parsed(field.name, kind, ours, manifest, holds_bytes(kind), plain))
        last = _LAST["schema"] = (schema, json.loads(schema.metadata[b"batchsd"]), columns)
    return last[1], last[2]


_LAST: dict[str, tuple[pa.Schema, Mapping[str, Any], Sequence[_Parsed]]] = {}


def json_value(value: Any) -> Any:
    """A cell as `row_json` holds it."""
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): json_value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def picture_column(schema: pa.Schema) -> str:
    """The output's name of the picture that was drawn; kept inputs may be pictures too."""
    return next(field.name for field in schema if (field.metadata or {}).get(OURS) == b"image")


def holds_bytes(kind: pa.DataType) -> bool:
    """Whether a type is binary, or holds binary within."""
    types = pa.types
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return True
    return any(holds_bytes(kind.field(i).type) for i in range(kind.num_fields))
