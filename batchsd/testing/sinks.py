"""A sink's contract: tried on a few small rows, of which some failed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from batchsd.testing.tasks import example_request
from batchsd.types import Record, Sink

if TYPE_CHECKING:
    import pyarrow as pa


def example_schema() -> pa.Schema:
    """The output schema of a small run over a manifest of `id`, `prompt` and `topics` (a list of texts)."""
    import pyarrow as pa

    from batchsd.columns import output_schema
    from batchsd.job import Input, Job, Model, Output

    job = Job(input=Input(manifest="prompts.parquet"), model=Model(path="tiny"), output=Output(uri="out"))
    manifest = pa.schema({"id": pa.string(), "prompt": pa.string(), "topics": pa.list_(pa.string())})
    return output_schema(manifest, job, {"model": "tiny", "version": "0"})


def example_records(count: int = 7) -> list[Record]:
    """Rows of `example_schema`: small PNG pictures of one colour each; every third row failed."""
    import numpy as np
    import pyarrow as pa

    from batchsd.encode import encoder

    encode = encoder({})
    schema = pa.schema({"id": pa.string(), "prompt": pa.string(), "topics": pa.list_(pa.string())})
    records = []
    for i in range(count):
        row = {"id": f"no. {i}/é", "prompt": f"picture {i}", "topics": ["a", None] * (i % 2)}
        request = example_request(
            key=row["id"], index=i, prompt=row["prompt"], columns=pa.Table.from_pylist([row], schema)
        )
        if i % 3 == 2:
            records.append(Record(request, "bad_input", "this row was made to fail"))
        else:
            data, extension = encode(np.full((64, 96, 3), i, np.uint8))
            records.append(Record(request, "ok", None, data, extension, 64, 96))
    return records


def check_sink(sink: Sink, folder: Path, read_back: Callable[[Path], Sequence[bytes | None]]) -> None:
    """A sink's promises, tried in an empty `folder`.

    `read_back` opens the folder of one finished shard, as the sink's users would, and gives each row's
    picture file in row order, None for a failed row. Every record is a row; the shard is not complete before
    `close`; the same records give the same bytes; names begin with the shard's (below `failed/` too); nothing is
    written outside the folder that was given.
    """
    assert isinstance(sink, Sink), f"{sink!r} is not a sink: it needs `open(folder, name, schema)`"
    name = "train-00003-of-00010"
    records = example_records()
    before, first = _write_shard(sink, folder / "first", name, records)
    read = list(read_back(folder / "first"))
    assert len(read) == len(records), f"{len(records)} records became {len(read)} rows"
    for i, record in enumerate(records):
        assert read[i] == record.image, f"row {i} ({record.status}) does not read back as it was given"

    early = [file for file, digest in first.items() if before.get(file) == digest]
    assert first and len(early) < len(first), f"{', '.join(early) or 'nothing'}: complete before `close`"
    wrong = [file for file in first if not file.removeprefix("failed/").startswith(name)]
    assert not wrong, f"{', '.join(wrong)}: names must begin with the shard's name, {name}"

    _, second = _write_shard(sink, folder / "second", name, records)
    changed = sorted({file for file, _ in first.items() ^ second.items()})
    assert not changed, f"{', '.join(changed)}: the same records gave other bytes"
    _check_two_open(sink, folder / "both", records, first)
    outside = sorted(path.name for path in folder.iterdir() if path.name not in ("first", "second", "both"))
    assert not outside, f"{', '.join(outside)}: written outside the folder that was given"


def _write_shard(
    sink: Sink, folder: Path, name: str, records: Sequence[Record]
) -> tuple[dict[str, str], dict[str, str]]:
    """Write one shard; give its files (name to sha256) just before `close`, and after it."""
    folder.mkdir()
    writer = sink.open(folder, name, example_schema())
    missing = [method for method in ("add", "close") if not callable(getattr(writer, method, None))]
    assert not missing, f"open() gave a {type(writer).__name__} without {' and '.join(missing)}"
    for record in records:
        writer.add(record)
    before = _files(folder)
    writer.close()
    return before, _files(folder)


def _check_two_open(sink: Sink, folder: Path, records: Sequence[Record], alone: dict[str, str]) -> None:
    """A worker has two shards open, in turns: neither may change the other."""
    folder.mkdir()
    one = sink.open(folder, "train-00003-of-00010", example_schema())
    two = sink.open(folder, "train-00004-of-00010", example_schema())
    for record in records:
        one.add(record)
        two.add(record)
    two.close()
    one.close()
    found = _files(folder)
    wrong = [file for file, digest in alone.items() if found.get(file) != digest]
    assert not wrong, f"{', '.join(wrong)}: other bytes when a second shard was open"


def _files(folder: Path) -> dict[str, str]:
    """Every file below the folder, with its sha256."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}
