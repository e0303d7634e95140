"""The Parquet sink, read back by `datasets` and looked at through Parquet's own metadata."""

import gc
import io
import os
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from PIL import Image

from batchsd.sinks import parquet
from batchsd.sinks.parquet import ParquetSink
from batchsd.testing import check_sink, example_records, example_schema

NAME = "train-00000-of-00001"


def write(folder, records, name=NAME):
    folder.mkdir(parents=True, exist_ok=True)
    writer = ParquetSink().open(folder, name, example_schema())
    for record in records:
        writer.add(record)
    writer.close()
    return folder / f"{name}.parquet"


def pictures(folder):
    """The pictures of a finished shard as another reader of Parquet sees them."""
    (file,) = folder.iterdir()
    return [cell and cell["bytes"] for cell in pq.read_table(file).column("image").to_pylist()]


def test_contract(tmp_path):
    check_sink(ParquetSink(), tmp_path, pictures)


def test_datasets_shows_pictures(tmp_path):
    records = example_records(7)
    write(tmp_path / "run" / "data", records[:4], "train-00000-of-00002")
    write(tmp_path / "run" / "data", records[4:], "train-00001-of-00002")
    loaded = load_dataset(str(tmp_path / "run"), cache_dir=str(tmp_path / "cache"))["train"]
    assert loaded["id"] == [record.request.key for record in records]
    assert loaded["status"] == [record.status for record in records]
    for row, record in zip(loaded, records, strict=True):
        if record.image is None:
            assert row["image"] is None and row["error"] == "this row was made to fail"
        else:
            assert isinstance(row["image"], Image.Image)
            assert np.array_equal(np.asarray(row["image"]), np.asarray(Image.open(io.BytesIO(record.image))))


def test_a_shard_of_failed_rows_alone_loads(tmp_path):
    write(tmp_path / "run" / "data", [r for r in example_records(9) if r.image is None])
    loaded = load_dataset(str(tmp_path / "run"), cache_dir=str(tmp_path / "cache"))["train"]
    assert loaded["image"] == [None] * 3


def test_layout_is_what_datasets_writes(tmp_path):
    from datasets import Features
    from datasets.arrow_writer import get_parquet_column_options

    file = pq.ParquetFile(write(tmp_path, example_records(250)))
    theirs = get_parquet_column_options(Features.from_arrow_schema(example_schema()), example_schema())
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [100, 100, 50]
    seen = set()
    for i in range(file.metadata.num_columns):
        column = file.metadata.row_group(0).column(i)
        path = column.path_in_schema
        seen.add(path)
        assert column.compression == {"none": "UNCOMPRESSED", "snappy": "SNAPPY"}[theirs["compression"][path]]
        assert column.has_dictionary_page == (path in theirs["use_dictionary"]), path
        assert column.has_offset_index and column.has_column_index, path
        if path.startswith("image."):
            assert set(column.encodings) == {"PLAIN", "RLE"}  # RLE: which cells are null
    assert seen == set(theirs["compression"]) and "image.bytes" in seen


def test_pages_have_checksums(tmp_path):
    path = write(tmp_path, example_records(7))
    data = bytearray(path.read_bytes())
    picture = example_records(1)[0].image
    data[data.index(picture) + len(picture) - 1] ^= 1  # one bit of a picture turns over on the disk
    path.write_bytes(bytes(data))
    with pytest.raises(OSError, match="CRC"):
        pq.read_table(path, page_checksum_verification=True)


def test_row_groups_are_bounded_in_bytes(tmp_path, monkeypatch):
    records = [replace(r, image=b"x" * 1000) for r in example_records(8)]
    monkeypatch.setattr(parquet, "GROUP_BYTES", 3999)
    file = pq.ParquetFile(write(tmp_path, records))
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [3, 3, 2]


def test_an_abandoned_writer_leaves_no_finished_file(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "GROUP_ROWS", 2)
    writer = ParquetSink().open(tmp_path, NAME, example_schema())
    for record in example_records(5):
        writer.add(record)
    del writer
    gc.collect()
    assert not (tmp_path / f"{NAME}.parquet").exists()


def test_close_puts_the_file_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    states = []
    real = os.fsync

    def watch(descriptor):
        states.append((os.fstat(descriptor).st_size, (tmp_path / f"{NAME}.parquet").exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    path = write(tmp_path, example_records(3))
    assert states == [(path.stat().st_size, False)]
    assert [p.name for p in tmp_path.iterdir()] == [f"{NAME}.parquet"]


def test_a_shard_without_rows_is_refused(tmp_path):
    writer = ParquetSink().open(tmp_path, NAME, example_schema())
    with pytest.raises(ValueError, match="without rows"):
        writer.close()
    assert list(tmp_path.iterdir()) == []


def test_leaf_columns_of_nested_types():
    schema = pa.schema(
        {
            "shot": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
            "tags": pa.list_(pa.struct({"a": pa.int64(), "b": pa.map_(pa.string(), pa.int32())})),
            "other": pa.struct({"path": pa.string(), "bytes": pa.binary()}),
        }
    )
    plain, packed = parquet.leaf_columns(schema)
    assert plain == ["shot.bytes", "shot.path"]
    assert len(packed) == 5 and {"other.path", "other.bytes", "tags.list.element.a"} < set(packed)
