"""The sink's contract, and its files as the sqlite3 command reads them."""

from __future__ import annotations

import errno
import json
import sqlite3
from pathlib import Path

import batchsd_sqlite
import pytest

from batchsd.testing import check_sink, example_records, example_schema


def read(folder: Path, columns: str = "image") -> list[tuple]:
    (file,) = folder.glob("*.sqlite")
    with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as database:
        return database.execute(f"select {columns} from pictures order by rowid").fetchall()


def test_contract(tmp_path: Path) -> None:
    check_sink(batchsd_sqlite.register_sinks()["sqlite"], tmp_path, lambda folder: [image for (image,) in read(folder)])


def test_a_full_disk_is_said_as_the_system_says_it(tmp_path: Path) -> None:
    writer = batchsd_sqlite.SqliteSink().open(tmp_path, "train-00000-of-00001", example_schema())
    writer.database.execute("PRAGMA max_page_count = 3")
    with pytest.raises(OSError) as error:
        for record in example_records(60):
            writer.add(record)
    assert error.value.errno == errno.ENOSPC and error.value.filename.endswith("train-00000-of-00001.sqlite.partial")


def test_every_column_is_there(tmp_path: Path) -> None:
    writer = batchsd_sqlite.SqliteSink().open(tmp_path, "train-00000-of-00001", example_schema())
    records = example_records()
    for record in records:
        writer.add(record)
    writer.close()
    rows = read(tmp_path, "id, topics, status, error, seed, typeof(guidance_scale)")
    assert len(rows) == len(records)
    for row, record in zip(rows, records, strict=True):
        (given,) = record.request.columns.to_pylist()
        assert row[0] == given["id"] and json.loads(row[1]) == given["topics"]
        assert row[2:] == (record.status, record.error, record.request.seed, "real")
