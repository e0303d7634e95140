"""The tar sink, read back by the standard library, `webdataset` and `datasets`."""

import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from PIL import Image

from batchsd.columns import picture_column
from batchsd.sinks.aside import Aside
from batchsd.sinks.webdataset import TarSink
from batchsd.testing import check_sink, example_records, example_schema

SINK = Aside(TarSink())
NAME = "train-00000-of-00001"


def write(folder, records, name=NAME):
    folder.mkdir(parents=True, exist_ok=True)
    writer = SINK.open(folder, name, example_schema())
    for record in records:
        writer.add(record)
    writer.close()
    return folder / f"{name}.tar"


def pictures(folder):
    """In row order: the tar's pictures, and None for each key that is in the failed table."""
    (tar,) = folder.glob("*.tar")
    with tarfile.open(tar) as file:
        members = {m.name: file.extractfile(m).read() for m in file}
    rows = {json.loads(members[f"{name[:-4]}.json"])["id"]: members[name] for name in members if name.endswith(".png")}
    failed = pq.read_table(folder / "failed").to_pylist()
    rows |= {row["id"]: row["image"] for row in failed}
    assert len(rows) == len(failed) + len(members) / 3
    return [rows[record.request.key] for record in example_records()]


def test_contract(tmp_path):
    check_sink(SINK, tmp_path, pictures)


def test_members_are_ustar_without_time_or_owner(tmp_path):
    path = write(tmp_path, example_records(4))
    with tarfile.open(path) as file:
        names = file.getnames()
        stamps = {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in file}
    assert names[:4] == ["00000-000000.png", "00000-000000.txt", "00000-000000.json", "00000-000001.png"]
    assert "00000-000002.png" not in names  # failed: absent, not half there
    assert stamps == {(0, 0, 0, "", 0o644)}
    assert path.read_bytes()[257:263] == b"ustar\0"


def test_a_map_that_was_made_on_the_way_stands_beside_the_picture(tmp_path):
    """And the picture is still the one that is read back."""
    (record,) = example_records(1)
    path = write(tmp_path, [replace(record, made={"estimated_depth": b"map"})])
    with tarfile.open(path) as file:
        assert file.getnames()[:2] == ["00000-000000.estimated_depth.png", "00000-000000.png"]
    ((_, row),) = TarSink().reread(lambda name: (tmp_path / name).open("rb"), NAME, example_schema(), True)
    assert row[picture_column(example_schema())] == {"path": "00000-000000.png", "bytes": record.image}


def test_webdataset_reads_it(tmp_path):
    wds = pytest.importorskip("webdataset")
    records = [r for r in example_records(7) if r.image]
    samples = list(wds.WebDataset(str(write(tmp_path, example_records(7))), shardshuffle=False, empty_check=False))
    assert [sample["png"] for sample in samples] == [r.image for r in records]
    assert [sample["txt"].decode() for sample in samples] == [r.request.prompt for r in records]
    assert [json.loads(sample["json"])["id"] for sample in samples] == [r.request.key for r in records]


def test_datasets_reads_it(tmp_path):
    records = example_records(7)
    path = str(write(tmp_path, records))
    loaded = load_dataset("webdataset", data_files=path, cache_dir=str(tmp_path / "cache"))["train"]
    good = [r for r in records if r.image]
    assert [row["json"]["id"] for row in loaded] == [r.request.key for r in good]
    for row, record in zip(loaded, good, strict=True):
        assert np.array_equal(np.asarray(row["png"]), np.asarray(Image.open(io.BytesIO(record.image))))


def test_an_abandoned_tar_has_no_name(tmp_path):
    writer = SINK.open(tmp_path, NAME, example_schema())
    writer.add(example_records(1)[0])
    assert [path.name for path in tmp_path.iterdir()] == [f"{NAME}.tar.partial"]


def test_a_shard_of_failed_rows_alone_has_no_tar(tmp_path):
    write(tmp_path, [r for r in example_records(9) if r.image is None])
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")] == [f"failed/{NAME}.parquet"]


def test_a_shard_without_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="without rows"):
        write(tmp_path, [])
