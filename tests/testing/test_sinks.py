"""The sink's contract: each broken promise is found (sinks/test_parquet.py runs it on ours)."""

import json
import time

import pytest

from batchsd.testing import check_sink, example_records, example_schema


class Lines:
    """A good sink of few lines: one JSON line a row, the picture in hex; named only when whole."""

    suffix = ".jsonl"

    def open(self, folder, name, schema):
        return Lines.Writer(folder, name, self)

    class Writer:
        def __init__(self, folder, name, sink):
            self.folder, self.name, self.sink, self.rows = folder, name, sink, []

        def add(self, record):
            self.rows.append(self.sink.line(record))

        def close(self):
            (self.folder / f"{self.name}{self.sink.suffix}").write_text("\n".join(self.rows))

    def line(self, record):
        return json.dumps(record.image.hex() if record.image else None)


def read_back(folder):
    (file,) = folder.iterdir()
    cells = [json.loads(line) for line in file.read_text().splitlines()]
    return [cell and bytes.fromhex(cell) for cell in cells]


def test_a_good_sink_passes(tmp_path):
    check_sink(Lines(), tmp_path, read_back)


class DropsFailed(Lines):
    class Writer(Lines.Writer):
        def add(self, record):
            if record.image:
                super().add(record)

    def open(self, folder, name, schema):
        return self.Writer(folder, name, self)


class Streams(DropsFailed):
    class Writer(Lines.Writer):
        def add(self, record):
            super().add(record)
            super().close()


class Stamps(Lines):
    def line(self, record):
        return super().line(record) + " " * (time.perf_counter_ns() % 97)


class Renames(DropsFailed):
    class Writer(Lines.Writer):
        def close(self):
            self.name = f"my-{self.name}"
            super().close()


class Litters(DropsFailed):
    class Writer(Lines.Writer):
        def close(self):
            super().close()
            (self.folder.parent / "index.json").write_text("{}")


class Shares(DropsFailed):
    """Keeps its rows in the sink, where two open shards meet."""

    def open(self, folder, name, schema):
        writer = self.Writer(folder, name, self)
        writer.rows = self.__dict__.setdefault("rows", [])
        return writer

    class Writer(Lines.Writer):
        def close(self):
            super().close()
            self.rows.clear()


class Half(DropsFailed):
    class Writer:
        def __init__(self, *_):
            pass

        def add(self, record):
            pass


class Spoils(Lines):
    def line(self, record):
        return json.dumps("00") if record.request.index == 4 else super().line(record)


@pytest.mark.parametrize(
    "sink, words",
    [
        (DropsFailed(), "7 records became 5 rows"),
        (Streams(), "train-00003-of-00010.jsonl: complete before `close`"),
        (Stamps(), "train-00003-of-00010.jsonl: the same records gave other bytes"),
        (Renames(), "my-train-00003-of-00010.jsonl: names must begin with the shard's name"),
        (Litters(), "index.json: written outside the folder"),
        (Shares(), "other bytes when a second shard was open"),
        (Half(), "open() gave a Writer without close"),
        (Spoils(), "row 4 (ok) does not read back as it was given"),
        (print, "is not a sink"),
    ],
)
def test_broken_sink_is_found(sink, words, tmp_path):
    with pytest.raises(AssertionError) as error:
        check_sink(sink, tmp_path, read_back)
    assert words in str(error.value)


def test_example_rows_fit_the_example_schema():
    from batchsd.columns import to_table

    table = to_table(example_records(7), example_schema(), "train-00000-of-00001")
    assert table.column("status").to_pylist() == ["ok", "ok", "bad_input"] * 2 + ["ok"]
    assert table.column("image").null_count == 2
    assert table.schema.field("topics").type.value_type == "string"
