"""Reads shards row by row, in bounded memory: row groups by pages, batches by their decoded size, images ahead.

    row group -> pieces -> rows -> (in threads: images read and decoded, values checked, hashed) -> Requests

A worker keeps one Reader. It remembers where it stopped, so that neighbouring shards of one huge row group
are decoded once; only columns that the output or a task needs are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from posixpath import dirname
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from batchsd import columns
from batchsd.ahead import THREADS, ahead
from batchsd.cells import Cells
from batchsd.find import open_parquet, reading
from batchsd.images import File, decoded_ahead, looked_at
from batchsd.job import Job
from batchsd.manifest import InputFile, Manifest
from batchsd.rows import InvalidText, Names, Resolver, parse_template
from batchsd.types import Request, Shard, UsageError
from batchsd.web import Web

BATCH_ROWS = 1024
BATCH_BYTES = 32 * 2**20  # decoded; a row that is larger comes alone


@dataclass(slots=True)
class Cursor:
    """A file being read, and the row that comes next."""

    file: int
    row: int
    pieces: Iterator[pa.RecordBatch]
    rest: pa.RecordBatch | None = None

    def take(self, count: int) -> Iterator[pa.RecordBatch]:
        """The next `count` rows, in pieces of at most BATCH_BYTES."""
        while count:
            piece = self.rest if self.rest is not None else next(self.pieces, None)
            if piece is None:
                raise EOFError
            now, self.rest = piece.slice(0, count), None
            if piece.num_rows > count:
                self.rest = piece.slice(count)
            self.row += now.num_rows
            count -= now.num_rows
            yield now


@dataclass(frozen=True, slots=True)
class Row:
    """A manifest row: its number in its file, its values by the manifest's names, and its columns that travel."""

    file: InputFile
    number: int
    values: Mapping[str, Any]
    travelling: pa.Table


OpenImage = Callable[[str, bytes, int], bytes]
"""What is done at once with the file of an image column, which so many rows will use. It may raise RowError."""


@dataclass(slots=True)
class Reader:
    """Reads the shards of a manifest as Requests. Made on a worker, of a Manifest and a Job.

    `hasher` comes from `rows.row_hasher`. Without `travelling` a Request's `columns` hold nothing (`scan`).
    """

    manifest: Manifest
    job: Job
    names: Names
    hasher: Callable[[Mapping[str, Any]], str]
    travelling: bool = True
    open_image: OpenImage = decoded_ahead
    _cursor: Cursor | None = field(default=None, init=False, repr=False)
    _plan: _Columns = field(init=False, repr=False)
    _resolver: Resolver = field(init=False, repr=False)
    _web: Web | None = field(init=False, repr=False)
    _pool: ThreadPoolExecutor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        hosts = self.job.input.allow_hosts
        self._web = Web(hosts) if hosts else None
        self._pool = ThreadPoolExecutor(THREADS, "images")  # no thread starts before there is work
        self._plan = _Columns.of(self.manifest.schema, self.job, self.names, self.travelling)
        self._resolver = Resolver(self.job, self.names, self.hasher, parse_template(self.job))

    def read(self, shard: Shard) -> Iterator[Request]:
        """The shard's requests in row order, `repeat` to a row. A refused row has its `error` set.

        Where tasks take images, rows are read some way ahead, in threads. Raises UsageError where the file is
        damaged or has changed since the plan.
        """
        rows = self._rows(shard)
        found = ahead(self._requests, rows, self._pool, held) if self._plan.images else map(self._requests, rows)
        index = 0
        for requests in found:
            for request in requests:
                yield replace(request, index=index)
                index += 1

    def _rows(self, shard: Shard) -> Iterator[Row]:
        file = self.manifest.files[shard.file]
        # The cursor is taken while in use: a second read that begins meanwhile opens its own.
        cursor, self._cursor = self._cursor, None
        if cursor is None or (cursor.file, cursor.row) != (shard.file, shard.start):
            cursor = self._open(shard.file, shard.start)
        row = shard.start
        pieces = cursor.take(shard.count)
        while row < shard.start + shard.count:
            with reading(f"{file.path}: rows from {row}", self.manifest.disk):
                try:
                    piece = next(pieces)
                except EOFError:
                    raise UsageError(
                        f"{file.path}: ends at row {row}, before the {file.rows} of its footer"
                    ) from None
            values = {name: python_values(piece.column(name)) for name in self._plan.needed}
            kept = pa.Table.from_batches([repaired(piece.select(self._plan.travelling))])
            for i in range(piece.num_rows):
                yield Row(file, row + i, {name: column[i] for name, column in values.items()}, kept.slice(i, 1))
            row += piece.num_rows
        self._cursor = cursor

    def _requests(self, row: Row) -> list[Request]:
        """The row's requests, not yet numbered."""
        cells = Cells(self.manifest.disk, dirname(row.file.path), self._web.fetch if self._web else None)
        uses = self.job.input.repeat

        def read_image(name: str, cell: Any) -> bytes:
            return self.open_image(name, cells.read(cell), uses)

        ours = {name: row.values[source] for name, source in self._plan.sources.items()}
        found = self._resolver.requests(ours, row.values, f"{row.file.name}:{row.number}", read_image)
        return [Request(index=0, columns=row.travelling, error=error, **fields) for fields, error in found]

    def _open(self, number: int, row: int) -> Cursor:
        file, disk = self.manifest.files[number], self.manifest.disk
        with reading(file.path, disk):
            info = disk.files().get_file_info(file.path)
        if (info.size, info.mtime_ns or 0) != (file.size, file.mtime_ns):
            raise UsageError(f"{file.path}: changed since the plan was made; run again to see what differs")
        return Cursor(number, row, self._pieces(file, row))

    def _pieces(self, file: InputFile, row: int) -> Iterator[pa.RecordBatch]:
        """Batches of the manifest's schema from `row` on; row groups before it are not read."""
        group, skip = 0, row
        while group < len(file.row_groups) and skip >= file.row_groups[group]:
            skip -= file.row_groups[group]
            group += 1
        with open_parquet(self.manifest.disk, file.path, file.path) as parquet:
            stored = parquet.schema_arrow
            present = [name for name in self._plan.read if name in stored.names]
            rows = batch_rows(parquet.metadata)
        encoded = [name for name in present if may_stay_encoded(stored.field(name).type)]
        with open_parquet(self.manifest.disk, file.path, file.path, encoded) as parquet:
            groups = list(range(group, len(file.row_groups)))
            batches = parquet.iter_batches(rows, row_groups=groups, columns=present, use_threads=False)
            for batch in batches:
                batch, skip = batch.slice(skip), max(0, skip - batch.num_rows)
                yield from decoded(batch, self._plan.schema)


@dataclass(frozen=True, slots=True)
class _Columns:
    """Which manifest columns are read, which become Python values, and under which name of ours."""

    read: tuple[str, ...]
    needed: tuple[str, ...]
    travelling: list[str]
    sources: Mapping[str, str]
    schema: pa.Schema

    @property
    def images(self) -> bool:
        """Whether rows bring images that a task wants."""
        return not self.sources.keys().isdisjoint(columns.IMAGE_INPUTS)

    @classmethod
    def of(cls, schema: pa.Schema, job: Job, names: Names, travelling: bool) -> _Columns:
        ours = [*columns.INPUT_COLUMNS]
        # Without a column of tasks every row has the job's, and other tasks' images stay unread.
        tasks = (
            names.tasks if columns.manifest_column("task", job) in schema.names else [job.conditioning.task]
        )
        ours += [name for task in tasks for name in names.tasks.get(task, ())]
        sources = {name: columns.manifest_column(name, job) for name in dict.fromkeys(ours)}
        sources = {name: theirs for name, theirs in sources.items() if theirs in schema.names}
        template = parse_template(job)
        needed = tuple(dict.fromkeys([*sources.values(), *(template.columns if template else ())]))
        kept = columns.travelling(schema, job) if travelling else []
        read = tuple(name for name in schema.names if name in {*needed, *kept})
        return cls(read, needed, kept, sources, pa.schema([schema.field(name) for name in read]))


def held(requests: list[Request]) -> int:
    """Bytes of a row's images: all its repeats share them."""
    return sum(value.held for value in requests[0].inputs.values() if isinstance(value, File))


# --- decoding ------------------------------------------------------------------------------------------


def batch_rows(metadata: Any) -> int:
    """Rows a batch for about BATCH_BYTES, from the uncompressed sizes in the footer."""
    groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
    largest = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
    return max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, largest)))


def may_stay_encoded(kind: pa.DataType) -> bool:
    """Text and bytes are read as dictionaries: a few kilobytes of Parquet may repeat one long value often."""
    types = pa.types
    return (
        types.is_dictionary(kind)
        or types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_binary(kind)
        or types.is_large_binary(kind)
        or kind in (pa.string_view(), pa.binary_view())
    )


def decoded(batch: pa.RecordBatch, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The batch in the manifest's types, columns that its file lacks as nulls, cut so that each piece is at
    most BATCH_BYTES once its dictionaries are gone."""
    if batch.num_rows > 1 and decoded_bytes(batch) > BATCH_BYTES:
        half = batch.num_rows // 2
        yield from decoded(batch.slice(0, half), schema)
        yield from decoded(batch.slice(half), schema)
    elif batch.num_rows:
        arrays = [
            _as_type(batch.column(field.name), field.type)
            if field.name in batch.schema.names
            else pa.nulls(batch.num_rows, field.type)
            for field in schema
        ]
        yield pa.RecordBatch.from_arrays(arrays, schema=schema)


def decoded_bytes(batch: pa.RecordBatch) -> int:
    """Bytes of all dictionary-encoded values if each row held its own copy."""
    total = 0
    for column in batch.columns:
        if pa.types.is_dictionary(column.type) and not pa.types.is_primitive(column.type.value_type):
            lengths = pc.binary_length(column.dictionary)
            total += pc.sum(lengths.take(column.indices)).as_py() or 0
    return total


def _as_type(column: pa.Array, kind: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column if column.type == kind else column.cast(kind)


def python_values(column: pa.Array) -> list[Any]:
    """The column's values; text that is not UTF-8 as `InvalidText`, and only that."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(item) for item in column]


def _value(item: pa.Scalar) -> Any:
    try:
        return item.as_py()
    except UnicodeDecodeError as error:
        return InvalidText(error.start)


def repaired(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with each byte that is not UTF-8 replaced: one such cell makes the whole file unreadable."""
    arrays = []
    for column in batch.columns:
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            try:
                column.validate(full=True)
            except pa.ArrowInvalid:
                wide = pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary()
                raw = column.cast(wide).to_pylist()
                texts = [None if value is None else value.decode("utf-8", "replace") for value in raw]
                column = pa.array(texts, type=column.type)
        arrays.append(column)
    return pa.RecordBatch.from_arrays(arrays, schema=batch.schema)


def scan(
    manifest: Manifest, job: Job, names: Names, judge: Callable[[Request], str | None] = lambda request: None
) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) for every row that would be refused, in order; reads the columns it needs.

    Of images the headers are looked at: what is damaged further on fails when it is drawn. `judge` says what is wrong
    with a row that reads well (see `rehearsal`).
    """
    reader = Reader(manifest, job, names, hasher=lambda fields: "", travelling=False, open_image=looked_at)
    for number, file in enumerate(manifest.files):
        if not file.rows:
            continue
        whole_file = Shard(plan=1, index=0, total=1, file=number, start=0, count=file.rows)
        for request in reader.read(whole_file):
            if request.repeat_index == 0 and (wrong := request.error or judge(request)):
                yield request.key, str(wrong)
