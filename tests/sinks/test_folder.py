"""The folder sink, read back by `datasets`' ImageFolder and by Parquet alone."""

import io
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from PIL import Image

from batchsd.sinks import folder as sink
from batchsd.sinks.aside import Aside
from batchsd.sinks.folder import FolderSink, with_file_names
from batchsd.testing import check_sink, example_records, example_schema

SINK = Aside(FolderSink())
NAMES = ("train-00000-of-00002", "train-00001-of-00002")


def write(folder, records, name=NAMES[0]):
    folder.mkdir(parents=True, exist_ok=True)
    writer = SINK.open(folder, name, example_schema())
    for record in records:
        writer.add(record)
    writer.close()
    return folder / name


def pictures(folder):
    (table,) = folder.glob("*/metadata.parquet")
    rows = {row["id"]: (table.parent / row["file_name"]).read_bytes() for row in pq.read_table(table).to_pylist()}
    rows |= {row["id"]: row["image"] for row in pq.read_table(folder / "failed").to_pylist()}
    return [rows[record.request.key] for record in example_records()]


def test_contract(tmp_path):
    check_sink(SINK, tmp_path, pictures)


def test_imagefolder_reads_two_shards(tmp_path):
    records = example_records(8)
    told = [replace(r, request=replace(r.request, negative_prompt=None)) for r in records[:4]] + records[4:]
    write(tmp_path / "data", told[:4], NAMES[0])  # a column that is null in the first shard alone
    write(tmp_path / "data", told[4:], NAMES[1])
    loaded = load_dataset("imagefolder", data_dir=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))["train"]
    good = {r.request.key: r for r in told if r.image}
    assert sorted(loaded["id"]) == sorted(good)
    for row in loaded:
        record = good[row["id"]]
        assert row["negative_prompt"] == record.request.negative_prompt
        assert np.array_equal(np.asarray(row["image"]), np.asarray(Image.open(io.BytesIO(record.image))))


def test_folders_are_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(sink, "FOLDER_ROWS", 3)
    monkeypatch.setattr(sink, "GROUP_ROWS", 2)
    shard = write(tmp_path, example_records(8))
    assert {path.name: len(list(path.iterdir())) for path in shard.iterdir() if path.is_dir()} == {
        "000": 2, "001": 2, "002": 2,
    }  # fmt: skip
    assert pq.read_metadata(shard / "metadata.parquet").num_row_groups == 3


def test_a_renamed_picture_column_keeps_its_name(tmp_path):
    from batchsd.columns import to_table

    schema = example_schema()
    place = schema.get_field_index("image")
    schema = schema.set(place, schema.field("image").with_name("shot"))
    table = to_table([example_records(1)[0]], schema, NAMES[0])
    assert with_file_names(table, ["000/x.png"]).schema.names[place] == "shot_file_name"


def test_a_shard_without_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="without rows"):
        write(tmp_path, [])
