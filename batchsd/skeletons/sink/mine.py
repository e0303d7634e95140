"""The sink `mine`, an output layout; here one zip file a shard, with the pictures and `rows.jsonl`.

A shard's files begin with its name, lie below the folder it is given, and are whole only after `close`. The same rows
must give the same bytes, so the zip tells no time.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pyarrow as pa

from batchsd import Record, hookimpl, row_values


class ZipSink:
    def open(self, folder: Path, name: str, schema: pa.Schema) -> ZipShard:
        return ZipShard(folder, name, schema)


class ZipShard:
    def __init__(self, folder: Path, name: str, schema: pa.Schema) -> None:
        self.name, self.schema = name, schema
        self.rows: list[str] = []
        self.path, self.partial = folder / f"{name}.zip", folder / f"{name}.zip.partial"
        self.zip = zipfile.ZipFile(self.partial, "w")  # noqa: SIM115

    def add(self, record: Record) -> None:
        """Rows come in order; `record.image` is the picture's file, None where `record.status` is not ok."""
        values = row_values(record, self.schema, self.name)
        pictures = {key: value for key, value in values.items() if isinstance(value, dict) and set(value) == PICTURE}
        row = {key: value for key, value in values.items() if key not in pictures}
        if record.image is not None:
            row["file"] = f"{record.request.index:06d}.{record.extension}"
            self.zip.writestr(zipfile.ZipInfo(row["file"]), record.image)
        self.rows.append(json.dumps(row, default=str, sort_keys=True))

    def close(self) -> None:
        self.zip.writestr(zipfile.ZipInfo("rows.jsonl"), "\n".join(self.rows))
        self.zip.close()
        self.partial.replace(self.path)


PICTURE = {"bytes", "path"}


@hookimpl
def register_sinks() -> dict[str, ZipSink]:
    return {"mine": ZipSink()}
