"""A plugin's sink that is half one: each way ends the job with one line that names sink, plugin and what was wrong."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from batchsd.cli import commands
from batchsd.sinks.parquet import ParquetSink
from batchsd.testing import check_sink, example_records, example_schema
from batchsd.types import UsageError
from batchsd.vouched import Vouched

NAME = "train-00001-of-00002"


class Writer:
    """A good one, a text of the number of rows, but for what a case replaces."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name, self.rows = folder, name, 0

    def add(self, record: Any) -> None:
        self.rows += 1

    def close(self) -> None:
        (self.folder / f"{self.name}.txt").write_text(str(self.rows))


class Half:
    def __init__(self, **methods: Callable[..., Any]) -> None:
        self.kind = type("Lines", (Writer,), methods)

    def open(self, folder: Path, name: str, schema: pa.Schema) -> Any:
        return self.kind(folder, name)


def raises(error: Exception) -> Callable[..., Any]:
    def method(*_: Any) -> None:
        raise error

    return method


def elsewhere(writer: Writer) -> None:
    Writer.close(writer)
    (writer.folder / "all.txt").write_text("")


CASES = {
    "no close": (Half(close=None), "open gave a Lines without close"),
    "neither": (Half(close=None, add=5), "open gave a Lines without add and close"),
    "open fails": (Half(__init__=raises(ValueError("no colour"))), "open failed: ValueError: no colour ("),
    "add fails": (Half(add=raises(KeyError("topics"))), "add failed: KeyError: 'topics' ("),
    "an error of Pillow's": (Half(add=raises(OSError("cannot identify"))), "add failed: OSError: cannot identify ("),
    "close fails": (Half(close=raises(RuntimeError("late"))), "close failed: RuntimeError: late ("),
    "nothing": (Half(close=lambda writer: None), f"close left no file whose name begins with the shard's, {NAME}"),
    "a name for all": (Half(close=elsewhere), f"left all.txt; a shard's files begin with its name, {NAME}"),
}


def write(sink: Any, folder: Path) -> None:
    writer = Vouched(sink, "lines", "./mine.py").open(folder, NAME, example_schema())
    for record in example_records():
        writer.add(record)
    writer.close()


@pytest.mark.parametrize("case", CASES)
def test_half_a_sink_is_named(case: str, tmp_path: Path) -> None:
    sink, words = CASES[case]
    with pytest.raises(UsageError) as error:
        write(sink, tmp_path)
    assert str(error.value).startswith(f"sink 'lines' (plugin './mine.py'): {words}")
    assert "\n" not in str(error.value)


def test_a_full_disk_is_no_fault_of_the_sink(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no room"):
        write(Half(add=raises(OSError(errno.ENOSPC, "no room"))), tmp_path)


def test_a_good_sink_keeps_its_contract_and_its_way_back(tmp_path: Path) -> None:
    def pictures(folder: Path) -> list[bytes | None]:
        return [cell and cell["bytes"] for cell in pq.read_table(folder)["image"].to_pylist()]

    check_sink(Vouched(ParquetSink(), "mine", "./mine.py"), tmp_path, pictures)
    assert list(Vouched(Half(), "lines", "./mine.py").reread()) == []


def test_the_job_ends_at_once(tmp_path: Path, checkpoint: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a red cube"] * 3}), tmp_path / "prompts.parquet")
    (tmp_path / "mine.py").write_text(
        "import batchsd\nclass Writer:\n    def add(self, record): pass\nclass Sink:\n"
        "    def open(self, folder, name, schema): return Writer()\n"
        "@batchsd.hookimpl\ndef register_sinks(): return {'lines': Sink()}\n"
    )
    (tmp_path / "job.toml").write_text(
        f'plugins = ["./mine.py"]\n[input]\nmanifest = "prompts.parquet"\n[model]\npath = "{checkpoint}"\n'
        '[sampler]\nsteps = 1\n[output]\nuri = "out"\nsink = "lines"\n'
    )
    with pytest.raises(UsageError, match=r"sink 'lines' \(plugin '.*mine.py'\): open gave a Writer without close"):
        CliRunner().invoke(commands, ["run", str(tmp_path / "job.toml"), "--local"], catch_exceptions=False)
    assert not list((tmp_path / "out" / "__batchsd").glob("ledger/*/*"))
