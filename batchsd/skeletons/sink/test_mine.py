"""The contract of sinks, the zip read back by Python's own module."""

import json
import zipfile

from mine import register_sinks

from batchsd.testing import check_sink


def read(folder):
    """The picture files of a shard in row order, None for a failed row."""
    (file,) = folder.glob("*.zip")
    with zipfile.ZipFile(file) as opened:
        rows = [json.loads(line) for line in opened.read("rows.jsonl").splitlines()]
        return [opened.read(row["file"]) if "file" in row else None for row in rows]


def test_contract(tmp_path):
    check_sink(register_sinks()["mine"], tmp_path, read)
