"""A manifest is one table in many Parquet files, known by their footers; shards are slices of its files.

Nothing here reads rows: `open_manifest` checks files, schema, mapping and template before anything loads,
and `shards` cuts each file into runs of rows. `batchsd.reader` reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

import pyarrow as pa

from batchsd import columns
from batchsd.find import Disk, Found, find, find_all, open_parquet, reading, sha256
from batchsd.job import Job
from batchsd.job_errors import suggestion
from batchsd.plan import cut
from batchsd.rows import Names, parse_template
from batchsd.types import Shard, UsageError

MAX_SHARDS = 99_999  # `datasets` silently loads only a part of files numbered with more than five digits

# What only a decompression bomb does, all three at once. Text packs 5 to 20 times, pictures not at all.
BOMB_BYTES, BOMB_RATIO, BOMB_ROW_BYTES = 256 * 2**20, 200, 64 * 2**10

NOT_BY_ROW = ("lora", "loras")  # what people hope for; ignored in silence, their pictures would lack it
TEXT_COLUMNS = ("prompt", "negative_prompt", "scheduler", "task")
NUMBER_COLUMNS = ("seed", "steps", "guidance_scale", "height", "width")


@dataclass(frozen=True, slots=True)
class InputFile:
    """One Parquet file, and the rows of it that are to be drawn: `count` from `first` on.

    `name` is its path below the manifest's root: it names rows, as `<name>:<row>`.
    """

    name: str
    path: str
    size: int
    mtime_ns: int
    sha256: str
    row_groups: tuple[int, ...]
    first: int
    count: int

    @property
    def rows(self) -> int:
        """All that the footer counts."""
        return sum(self.row_groups)

    def part(self, first: int, count: int) -> InputFile:
        return replace(self, first=first, count=count)

    def facts(self) -> dict[str, Any]:
        """As plain JSON values, for the plan."""
        facts = {**asdict(self), "row_groups": list(self.row_groups), "rows": self.count}
        return {name: value for name, value in facts.items() if name != "count"}


@dataclass(frozen=True, slots=True)
class Manifest:
    """The ordered files and their one schema. Picklable: with a Job it is all that a Reader needs."""

    disk: Disk
    files: tuple[InputFile, ...]
    schema: pa.Schema

    @property
    def rows(self) -> int:
        return sum(file.count for file in self.files)

    def head(self, limit: int) -> Manifest:
        """The first `limit` rows alone."""
        kept, left = [], limit
        for file in self.files:
            if left > 0:
                kept.append(file.part(file.first, min(file.count, left)))
                left -= file.count
        return replace(self, files=tuple(kept))

    def shards(self, rows_per_shard: int, repeat: int, plan: int = 1) -> list[Shard]:
        """The rows, cut (see `plan.cut`). Raises UsageError beyond 99,999 shards."""
        count = max(1, rows_per_shard // repeat)
        total = sum(-(-file.count // count) for file in self.files)
        if total > MAX_SHARDS:
            # Every file ends with a shorter shard: leave each of them one.
            room = max(1, MAX_SHARDS - len(self.files))
            raise UsageError(
                f"output.rows_per_shard = {rows_per_shard:,} makes {total:,} shards, at most {MAX_SHARDS:,}: "
                f"use {-(-self.rows // room) * repeat:,} or more"
            )
        return cut([(file.first, file.count) for file in self.files], rows_per_shard, repeat, plan)


def divide(
    manifest: Manifest, planned: Sequence[Sequence[Mapping[str, Any]]]
) -> tuple[list[Manifest], Manifest | None]:
    """The parts of the manifest that earlier plans took (each one's files, in its order), and what is new, if any.

    A file that has grown is known up to where it was planned; its further rows are new. Raises UsageError where
    a planned file is no more.
    """
    now = {file.name: file for file in manifest.files}
    ends: dict[str, int] = {}
    parts = []
    for files in planned:
        slices = []
        for before in files:
            file, first = now.get(before["name"]), before.get("first", 0)
            if file is None:
                raise UsageError(
                    f"the manifest's file {before['name']} is gone; pictures of it are in the output: put it back, or "
                    "give another output.uri (--new names one) to draw what is left"
                )
            slices.append(file.part(first, min(before["rows"], max(0, file.rows - first))))
            ends[file.name] = max(ends.get(file.name, 0), first + before["rows"])
        parts.append(replace(manifest, files=tuple(slices)))
    new = [file.part(ends.get(file.name, 0), file.rows - ends.get(file.name, 0)) for file in manifest.files]
    if planned:
        new = [file for file in new if file.count > 0]
    return parts, replace(manifest, files=tuple(new)) if new else None


Known = Mapping[tuple[str, int, int], str]
"""(name, size, mtime_ns) -> sha256 of files that an earlier plan has hashed."""


def open_manifest(job: Job, known: Known | None = None, names: Names | None = None) -> Manifest:
    """Find the job's manifest files, read their footers, and check them against the job.

    Files in `known` are not hashed again; with `names`, input.columns may only say columns that rows or tasks
    have. Raises UsageError: nothing there, not Parquet, empty, conflicting
    types, a missing prompt, a bad mapping or template, or a column that clashes with one of the output's.
    """
    where = job.where("input.manifest")
    try:
        wanted = job.input.manifest
        disk, found = find(wanted) if isinstance(wanted, str) else find_all(wanted)
        opened = [_open(disk, file) for file in found]
        schema = unify([(file.name, schema) for file, (_, schema) in zip(found, opened, strict=True)])
    except UsageError as error:
        raise UsageError("\n".join(f"{where}: {line}" for line in str(error).splitlines())) from None
    if not sum(sum(groups) for groups, _ in opened):
        raise UsageError(f"{where}: the manifest is empty ({_files(found)}, no rows)")
    check_columns(schema, job, names)
    files = []
    for file, (groups, _) in zip(found, opened, strict=True):
        digest = (known or {}).get((file.name, file.size, file.mtime_ns)) or sha256(
            disk, file.path, file.path
        )
        seen = (file.name, file.path, file.size, file.mtime_ns)
        files.append(InputFile(*seen, digest, groups, first=0, count=sum(groups)))
    return Manifest(disk, tuple(files), schema)


def _files(found: Sequence[Found]) -> str:
    return found[0].name if len(found) == 1 else f"{len(found)} files"


def _open(disk: Disk, file: Found) -> tuple[tuple[int, ...], pa.Schema]:
    parquet = open_parquet(disk, file.path, file.path)
    with parquet, reading(file.path, disk):
        metadata = parquet.metadata
        _refuse_bombs(file, metadata)
        groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
        return groups, parquet.schema_arrow


def _refuse_bombs(file: Found, metadata: Any) -> None:
    """A page is decompressed whole, whatever is read of it: kilobytes can ask for gigabytes of memory."""
    for g in range(metadata.num_row_groups):
        group = metadata.row_group(g)
        if group.total_byte_size < BOMB_BYTES:
            continue
        for c in range(group.num_columns):
            chunk = group.column(c)
            size, stored = chunk.total_uncompressed_size, chunk.total_compressed_size
            if size >= max(BOMB_BYTES, BOMB_RATIO * stored, BOMB_ROW_BYTES * group.num_rows):
                raise UsageError(
                    f"{file.path}: column {chunk.path_in_schema!r} packs {size:,} bytes into {stored:,}, "
                    f"{size // max(1, group.num_rows):,} a row; refused, as it could fill the memory"
                )


# --- schema --------------------------------------------------------------------------------------------


def plain(kind: pa.DataType) -> pa.DataType:
    """The type without its encoding: dictionaries and views hold the same values, few readers take them."""
    if pa.types.is_dictionary(kind):
        return plain(kind.value_type)
    if kind == pa.string_view():
        return pa.string()
    return pa.binary() if kind == pa.binary_view() else kind


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def unify(schemas: Sequence[tuple[str, pa.Schema]]) -> pa.Schema:
    """One schema over (file name, schema): columns in order of appearance, every field nullable.

    A column that a file lacks, or holds only nulls of, is null there. Raises UsageError where two files give
    a column different types (string and large_string are one).
    """
    types: dict[str, tuple[pa.DataType, str]] = {}
    for file, schema in schemas:
        for name in schema.names:
            if len(schema.get_all_field_indices(name)) > 1:
                raise UsageError(f"{file}: two columns are called {name!r}; rename one")
            kind = plain(schema.field(name).type)
            before, first = types.get(name, (pa.null(), file))
            common = _common(before, kind)
            if common is None:
                raise UsageError(
                    f"column {name!r} is {before} in {first} but {kind} in {file}; write both with one type"
                )
            types[name] = (common, file if before == pa.null() else first)
    return pa.schema([pa.field(name, kind) for name, (kind, _) in types.items()])


def _common(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The type that holds both, if there is one."""
    if one == other or other == pa.null():
        return one
    if one == pa.null():
        return other
    return pa.string() if is_text(one) and is_text(other) else None


def check_columns(schema: pa.Schema, job: Job, names: Names | None = None) -> None:
    """Whether the schema fits the job: mapping, template, prompt, types, and the names of the output."""
    where = job.where("input.manifest")
    for ours, theirs in job.input.columns.items():
        if names:
            known = {*columns.INPUT_COLUMNS, *columns.IMAGE_INPUTS, *chain(*names.tasks.values())}
            if ours not in known:
                raise UsageError(
                    f"{job.where(f'input.columns.{ours}')}: unknown column{suggestion(ours, known)}"
                )
        if theirs not in schema.names:
            raise UsageError(
                f"{job.where(f'input.columns.{ours}')}: the manifest has no column {theirs!r}"
                f"{_hint(theirs, schema)}"
            )
    for name in NOT_BY_ROW:
        if name in schema.names:
            raise UsageError(
                f"{where}: column {name!r}: LoRAs are merged when the model loads, one set for a whole run "
                "(model.loras), not row by row; make a run for each set, or give the column another name"
            )
    _check_prompt(schema, job)
    for ours in TEXT_COLUMNS + NUMBER_COLUMNS:
        theirs = columns.manifest_column(ours, job)
        if theirs not in schema.names or (ours == "prompt" and job.input.prompt is not None):
            continue
        kind = schema.field(theirs).type
        is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
        fits = is_text(kind) if ours in TEXT_COLUMNS else is_number
        if not fits and kind != pa.null():
            wanted = "text" if ours in TEXT_COLUMNS else "a number"
            raise UsageError(
                f"{where}: column {theirs!r} is {kind}, but {ours} must be {wanted}; "
                "write it so, or give the column another name"
            )
    columns.layout(schema, job)


def _check_prompt(schema: pa.Schema, job: Job) -> None:
    template = parse_template(job)
    for name in template.columns if template else ():
        if name not in schema.names:
            raise UsageError(
                f"{job.where('input.prompt')}: the template names {{{name}}}, "
                f"but the manifest has no such column{_hint(name, schema)}"
            )
        kind = schema.field(name).type
        if pa.types.is_nested(kind) or columns.holds_bytes(kind):
            raise UsageError(f"{job.where('input.prompt')}: column {name!r} is {kind}, which is no text")
    if template is None and columns.manifest_column("prompt", job) not in schema.names:
        raise UsageError(
            f"{job.where('input.manifest')}: no column 'prompt' (it has: {', '.join(schema.names)}) - "
            'name yours with input.columns = { prompt = "..." }, or build one with input.prompt = "a {...}"'
        )


def _hint(name: str, schema: pa.Schema) -> str:
    close = suggestion(name, schema.names)
    return close if "did you mean" in close else f"; it has: {', '.join(schema.names)}"
