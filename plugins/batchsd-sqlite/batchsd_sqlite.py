"""The sink `sqlite`: one SQLite file a shard, one row of the table `pictures` a row of the manifest.

    sqlite3 out/run1/data/train-00000-of-00004.sqlite "select id, prompt, length(image) from pictures"

`image` holds the picture's file, null where the row failed; lists and objects are JSON text, dates ISO text. All is
written in one transaction, in row order, so that the same rows give the same bytes.
"""

from __future__ import annotations

import errno
import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, datetime, time
from pathlib import Path

import pyarrow as pa

from batchsd import Record, hookimpl, row_values

KINDS = ((pa.types.is_boolean, "INTEGER"), (pa.types.is_integer, "INTEGER"), (pa.types.is_floating, "REAL"))


class SqliteSink:
    def open(self, folder: Path, name: str, schema: pa.Schema) -> SqliteShard:
        return SqliteShard(folder, name, schema)


class SqliteShard:
    """One open shard. The file has its name only when it is whole."""

    def __init__(self, folder: Path, name: str, schema: pa.Schema) -> None:
        self.name, self.schema = name, schema
        self.path, self.partial = folder / f"{name}.sqlite", folder / f"{name}.sqlite.partial"
        self.database = sqlite3.connect(self.partial, isolation_level=None)
        self.database.execute("PRAGMA journal_mode = OFF")
        columns = ", ".join(f"{quoted(field.name)} {kind_of(field.type)}" for field in schema)
        self.database.execute("BEGIN")
        self.database.execute(f"CREATE TABLE pictures ({columns})")
        self.insert = f"INSERT INTO pictures VALUES ({', '.join('?' * len(schema))})"

    def add(self, record: Record) -> None:
        values = row_values(record, self.schema, self.name)
        with storage(self.partial):
            self.database.execute(self.insert, [cell(values[name]) for name in self.schema.names])

    def close(self) -> None:
        with storage(self.partial):
            self.database.execute("COMMIT")
        self.database.close()
        self.partial.replace(self.path)


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """A full or failing disk as the system says it: batchsd tries again, and then names the path and the free space."""
    try:
        yield
    except sqlite3.OperationalError as error:
        full = error.sqlite_errorname == "SQLITE_FULL"
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(path)) from error


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def kind_of(kind: pa.DataType) -> str:
    if pa.types.is_struct(kind) or pa.types.is_binary(kind):
        return "BLOB"
    return next((word for matches, word in KINDS if matches(kind)), "TEXT")


def cell(value: object) -> object:
    """A value as SQLite holds it."""
    if isinstance(value, dict) and set(value) == {"bytes", "path"}:
        return value["bytes"]
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return str(value)
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    return json.dumps(value, default=str, ensure_ascii=False, sort_keys=True)


@hookimpl
def register_sinks() -> dict[str, SqliteSink]:
    return {"sqlite": SqliteSink()}
