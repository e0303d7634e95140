"""Verify finds every kind of damage, and nothing in a run that is whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from null_model import job_at, run_job, write_manifest

from batchsd.columns import OURS
from batchsd.verify import Verdict, undecodable, verify


@pytest.fixture
def run(tmp_path: Path, checkpoint: Path) -> Path:
    write_manifest(tmp_path / "prompts.parquet", [f"prompt {i}" for i in range(8)])
    run_job(job_at(tmp_path, checkpoint), tmp_path / "log", failing=("id2",))
    return tmp_path / "run"


@pytest.fixture(params=["webdataset", "folder"])
def other(request: pytest.FixtureRequest, tmp_path: Path, checkpoint: Path) -> Path:
    """A run in another layout; id2 failed."""
    write_manifest(tmp_path / "prompts.parquet", [f"prompt {i}" for i in range(8)])
    job = job_at(tmp_path, checkpoint, f"output.sink={request.param}")
    run_job(job, tmp_path / "log", failing=("id2",))
    return tmp_path / "run"


def look(run: Path) -> tuple[Verdict, list[str]]:
    faults: list[str] = []
    return verify(str(run), faults.append, lambda verdict: None), faults


def first(run: Path) -> Path:
    return run / "data/train-00000-of-00002.parquet"


def change_marker(run: Path, **changes: object) -> None:
    path = run / "__batchsd/ledger/0001/00000.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip_a_byte(run: Path) -> None:
    data = bytearray(first(run).read_bytes())
    data[len(data) // 2] ^= 1
    first(run).write_bytes(data)


def spoil_a_picture(run: Path) -> None:
    """As a broken encoder would: table, marker and hashes agree, the picture is cut short."""
    import pyarrow as pa

    table = pq.read_table(first(run))
    place = next(i for i, field in enumerate(table.schema) if field.metadata.get(OURS) == b"image")
    pictures = table.column(place).to_pylist()
    pictures[1]["bytes"] = pictures[1]["bytes"][:60]
    field = table.schema.field(place)
    pq.write_table(table.set_column(place, field, pa.array(pictures, field.type)), first(run))
    data = first(run).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    file = {"name": first(run).name, "bytes": len(data), "sha256": digest}
    change_marker(run, files=[file], bytes=len(data), sha256=digest)


def test_a_whole_run(run: Path) -> None:
    verdict, faults = look(run)
    assert faults == []
    assert (verdict.shards, verdict.missing, verdict.rows, verdict.pictures) == (2, 0, 8, 7)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip_a_byte, "train-00000-of-00002.parquet: its bytes have changed"),
        (lambda run: first(run).unlink(), "train-00000-of-00002.parquet: no bytes, its marker says"),
        (lambda run: (run / "data/extra.parquet").write_bytes(b"x"), "data/extra.parquet: no marker names it"),
        (lambda run: change_marker(run, ok=4), "4 ok and 1 failed are not 4 rows"),
        (lambda run: change_marker(run, ok=4, failed={}), "shard 0: 3 pictures are whole, its marker says 4"),
        (lambda run: change_marker(run, rows=5, ok=4), "the markers hold 9 rows, the plan 8"),
        (spoil_a_picture, "00000-000001.png: "),
    ],
)
def test_damage_is_named(run: Path, damage: Callable[[Path], object], said: str) -> None:
    damage(run)
    _, faults = look(run)
    assert any(said in fault for fault in faults), faults


def test_other_layouts_are_counted_row_by_row(other: Path) -> None:
    verdict, faults = look(other)
    assert faults == []
    assert (verdict.shards, verdict.missing, verdict.rows, verdict.pictures) == (2, 0, 8, 7)


def swap(run: Path, name: str, data: bytes) -> None:
    """Replace a file of the first shard, its marker's account of it too: only its readers can tell."""
    place = run / (name if name.startswith("failed/") else f"data/{name}")
    place.write_bytes(data)
    files = json.loads((run / "__batchsd/ledger/0001/00000.json").read_text())["files"]
    told = {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    files = [told if file["name"] == name else file for file in files]
    change_marker(run, files=files, bytes=sum(file["bytes"] for file in files))


def test_a_row_that_is_lost_aside_is_missed(other: Path) -> None:
    name = "failed/train-00000-of-00002.parquet"
    table = pq.read_table(other / name)
    assert table.num_rows == 1
    pq.write_table(table.slice(0, 0), other / name)
    swap(other, name, (other / name).read_bytes())
    assert look(other)[1] == ["shard 0: its files hold 3 rows, its marker says 4"]


def test_a_picture_that_is_lost_or_cut_is_named(other: Path) -> None:
    pictures = sorted((other / "data").rglob("*.png"))
    if not pictures:  # a tar
        name = "train-00000-of-00002.tar"
        swap(other, name, (other / "data" / name).read_bytes()[:3000])
        assert f"data/{name}: cannot be read: " in look(other)[1][0]
        return
    name = pictures[0].relative_to(other / "data").as_posix()
    whole = pictures[0].read_bytes()
    swap(other, name, whole[:-40])
    assert f"data/{name}, 000000.png: " in look(other)[1][0]
    swap(other, name, whole)
    pictures[0].unlink()
    assert f"data/{name}: no bytes, its marker says {len(whole)}" in look(other)[1]


def test_a_run_that_is_not_done_is_not_at_fault(run: Path) -> None:
    (run / "__batchsd/ledger/0001/00000.json").unlink()
    first(run).unlink()
    verdict, faults = look(run)
    assert (faults, verdict.missing) == ([], 1)


def test_what_is_no_picture() -> None:
    assert "UnidentifiedImageError" in undecodable(b"no picture")
