"""Scores as columns and filters that reject: the order, the failures, and a run of a whole job with both."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchsd import Filter, Score
from batchsd.cli import main
from batchsd.filters import parse
from batchsd.judging import MOST, Choice, Choices, Verdict, judging
from batchsd.testing import example_request
from batchsd.types import UsageError


def pictures(*values: int) -> list[np.ndarray]:
    return [np.full((8, 8, 3), value, np.uint8) for value in values]


def look(scores: dict, filters: list, drawn: list[np.ndarray], keep: bool = False) -> list[Verdict]:
    def choice(name, function):
        kind = Score if name in scores else Filter
        return Choice(name, kind.of(function), "./mine.py", {})

    chosen = [parse(one, "") if isinstance(one, str) else choice(one.__name__, one) for one in filters]
    step = judging(Choices(tuple(choice(*pair) for pair in scores.items()), tuple(chosen), keep), "cpu", is_memory)
    assert step is not None
    return step([example_request(index=i) for i in range(len(drawn))], drawn)


def is_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError)


def first_pixel(requests, drawn):
    return [picture[0, 0, 0] for picture in drawn]


def dark(requests, drawn):
    return ["too dark" if picture[0, 0, 0] < 100 else None for picture in drawn]


def test_every_picture_has_its_scores_and_the_first_filter_that_rejects_has_the_word():
    found = look({"red": first_pixel}, ["red < 200", dark, "mean > 0.9"], pictures(10, 150, 180, 250), keep=True)
    assert [verdict.scores for verdict in found] == [{"red": 10.0}, {"red": 150.0}, {"red": 180.0}, {"red": 250.0}]
    assert [(verdict.status, verdict.reason) for verdict in found] == [
        ("rejected", "dark: too dark"),
        ("rejected", f"mean is {150 / 255:.6g}, wanted > 0.9"),
        ("rejected", f"mean is {180 / 255:.6g}, wanted > 0.9"),
        ("rejected", "red is 250, wanted < 200"),
    ]
    assert all(verdict.keeps_picture for verdict in found)
    assert not look({}, [dark], pictures(1))[0].keeps_picture


def test_later_filters_are_not_asked_about_rejected_pictures():
    asked = []

    def count(requests, drawn):
        asked.append([request.index for request in requests])
        return [None] * len(drawn)

    look({"red": first_pixel}, ["red > 100", count], pictures(10, 150, 20, 180))
    assert asked == [[1, 3]]


def test_one_bad_picture_is_one_failed_row():
    def touchy(requests, drawn):
        if any(picture[0, 0, 0] == 13 for picture in drawn):
            raise ValueError("unlucky")
        return [0.5] * len(drawn)

    good, bad, also = look({"touchy": touchy}, [], pictures(1, 13, 2))
    assert good == also == Verdict({"touchy": 0.5})
    assert (bad.status, bad.keeps_picture) == ("error", False)
    assert bad.reason is not None
    assert bad.reason.startswith("score 'touchy' (plugin './mine.py'): ValueError: unlucky (")
    assert __file__ in bad.reason


def test_memory_is_a_status_of_its_own_and_ends_no_job():
    def hungry(requests, drawn):
        raise MemoryError("no room")

    found = look({}, [hungry], pictures(*range(2 * MOST)))
    assert {verdict.status for verdict in found} == {"oom"}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda requests, drawn: [], "gave 0 answers for 1 pictures"),
        (lambda requests, drawn: 5, "TypeError: 'int' object is not iterable"),
        (lambda requests, drawn: ["high"] * len(drawn), "a score is a number or None, not str"),
        (lambda requests, drawn: [True] * len(drawn), "a score is a number or None, not bool"),
        (lambda requests, drawn: drawn[0].fill(0), "assignment destination is read-only"),
        (lambda drawn: [1.0], "takes 1 positional argument but 2 were given"),
    ],
)
def test_a_plugin_that_always_fails_ends_the_job(answer, words):
    (one,) = look({"odd": answer}, [], pictures(1))
    assert one.status == "error" and one.reason is not None and words in one.reason
    with pytest.raises(UsageError, match=f"^score 'odd' .* it failed on {MOST} pictures in a row: mend it"):
        look({"odd": answer}, [], pictures(*range(MOST)))


def test_a_filter_must_give_reasons_not_truths():
    (one,) = look({}, [lambda requests, drawn: [True]], pictures(1))
    assert one.status == "error" and "a text, or None; not True" in str(one.reason)


def test_no_number_is_null_and_passes_no_bound():
    def odd(requests, drawn):
        return [np.float32("nan"), None, np.float32(0.5), np.array(2.0)]

    found = look({"odd": odd}, ["odd > 0"], pictures(1, 2, 3, 4))
    assert [verdict.scores["odd"] for verdict in found] == [None, None, 0.5, 2.0]
    assert [verdict.status for verdict in found] == ["rejected", "rejected", "ok", "ok"]


def test_what_does_not_load_is_named():
    def load(settings, device):
        raise OSError("no weights")

    with pytest.raises(UsageError, match="^score 'a' .plugin 'p'. does not load: OSError: no weights"):
        judging(Choices((Choice("a", Score(load), "p", {}),)), "cpu", is_memory)
    with pytest.raises(UsageError, match="^filter 'a' .plugin 'p'.: load gave list, not a function"):
        judging(Choices((), (Choice("a", Filter(lambda settings, device: []), "p", {}),)), "cpu", is_memory)


# -- a whole job

PLUGIN = """
import batchsd

def load_left(settings, device):
    bias = float(open(settings["table"]).read()) * settings["factor"]
    return lambda requests, pictures: [float(p[:, :8].mean()) + bias for p in pictures]

def odd_rows(requests, pictures):
    return [f"row {request.key} is odd" if request.index % 2 else None for request in requests]

@batchsd.hookimpl
def register_scores():
    return {"left": batchsd.Score(load_left, files=("table",), options={"factor": 1.0})}

@batchsd.hookimpl
def register_filters():
    return {"even": batchsd.Filter.of(odd_rows)}
"""
JOB = """
plugins = ["./mine.py"]
[plugin.mine]
table = "./table.txt"
[input]
manifest = "prompts.parquet"
[model]
path = "{checkpoint}"
device = "cpu"
[sampler]
steps = 1
height = 16
width = 16
[output]
uri = "out"
rows_per_shard = 4
scores = ["left"]
filters = ["left > 1000", "even"]
"""


@pytest.fixture
def batchsd(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    pq.write_table(pa.table({"prompt": ["a red cube"] * 6}), tmp_path / "prompts.parquet")
    (tmp_path / "mine.py").write_text(dedent(PLUGIN))
    (tmp_path / "table.txt").write_text("1000")
    (tmp_path / "job.toml").write_text(JOB.format(checkpoint=checkpoint))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # the paths are the job file's

    def run(*sets: str) -> int:
        words = ["batchsd", "run", "../job.toml", "--local"]
        monkeypatch.setattr(sys, "argv", [*words, *(word for text in sets for word in ("--set", text))])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0)

    return run


def rows_of(folder: Path, table: str = "data") -> list[dict]:
    return [row for file in sorted((folder / table).glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def test_a_job_with_scores_and_filters(batchsd: Callable[..., int], tmp_path: Path, capsys) -> None:
    from PIL import Image

    assert batchsd("output.rejected=keep") == 0  # a rejection is no failure
    assert "3 pictures, 0 failed, 3 rejected in" in capsys.readouterr().out
    rows = rows_of(tmp_path / "out")
    assert [row["status"] for row in rows] == ["ok", "rejected"] * 3
    for i, row in enumerate(rows):
        drawn = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
        assert row["left"] == pytest.approx(drawn[:, :8].mean() + 1000, rel=1e-12)
        assert row["mean"] == pytest.approx(drawn.mean() / 255, rel=1e-12)
        assert row["error"] == (f"even: row prompts.parquet:{i} is odd" if i % 2 else None)
    from batchsd.verify import verify

    faults: list[str] = []
    verify(str(tmp_path / "out"), faults.append, lambda verdict: None)
    assert faults == []

    assert batchsd("output.rejected=keep", "output.filters=['left > 1000']") == 2
    assert "output.filters" in capsys.readouterr().err
    (tmp_path / "table.txt").write_text("1001")
    assert batchsd("output.rejected=keep") == 2
    assert "plugin.mine.table" in capsys.readouterr().err


def test_rejected_pictures_are_dropped_by_default(batchsd: Callable[..., int], tmp_path: Path) -> None:
    assert batchsd("output.filters=['even', 'left > 1e6']", "output.failed=aside") == 0
    rows = rows_of(tmp_path / "out", "failed")
    assert [row["image"] for row in rows] == [None] * 6
    assert all(row["left"] > 1000 and len(row["dhash"]) == 16 for row in rows)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("output.scores=['lefft']", "output.scores: 'lefft' is unknown; have left"),
        ("output.scores=['left', 'left']", "output.scores: 'left' is listed twice"),
        ("output.filters=['evn']", "output.filters: 'evn' is unknown; have even"),
        ("output.filters=['left']", "output.filters: 'left' is a number; say which ones pass: 'left > 0.5'"),
        ("output.filters=['left ! 3']", "output.filters: 'left ! 3' is not a filter"),
        ("output.filters=['right > 3']", "'right > 3' compares 'right', which is no score; have deviation, left, mean"),
        ("output.scores=[]", "output.filters: 'left > 1000' needs the score 'left' in output.scores"),
        ("plugin.mine.tabel=1", "plugin.mine.tabel: unknown setting; have factor, table"),
        ("plugin.mien.table=1", "plugin.mien: 'mien' is no plugin of this job - did you mean 'mine'?"),
        ("plugin.mine.table=table.txt", "plugin.mine.table: 'table.txt' is not a path; one beside the job is written"),
        ("plugin.mine.table=./none", "elsewhere/none"),
        ("output.rejected=maybe", "output.rejected"),
    ],
)
def test_what_is_wrong_is_said_before_anything_loads(batchsd, tmp_path, capsys, monkeypatch, setting, words) -> None:
    monkeypatch.setattr("batchsd.model.checkpoint.load", lambda *a, **k: pytest.fail("a model was loaded"))
    assert batchsd(setting) == 2
    said = capsys.readouterr().err.strip()
    assert words in said and "Traceback" not in said and len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_watcher_that_raises_is_named(batchsd: Callable[..., int], tmp_path: Path, capsys) -> None:
    with (tmp_path / "mine.py").open("a") as file:
        file.write("@batchsd.hookimpl\ndef batch_done(progress): raise RuntimeError('I saw it')\n")
    assert batchsd() == 2
    said = capsys.readouterr().err
    assert "mine.py': batch_done failed: RuntimeError: I saw it (" in said and "Traceback" not in said


def test_a_filter_that_always_raises_is_named(batchsd: Callable[..., int], tmp_path: Path, capsys) -> None:
    file = tmp_path / "mine.py"
    broken = file.read_text().replace("def odd_rows(requests, pictures):", "def odd_rows(r, p):\n    return 1 / 0")
    file.write_text(broken)
    pq.write_table(pa.table({"prompt": ["a red cube"] * 9}), tmp_path / "prompts.parquet")
    assert batchsd("run.max_failed=1.0") == 2
    said = capsys.readouterr().err
    assert "filter 'even' (plugin '" in said and "ZeroDivisionError: division by zero (" in said
    assert "mine.py:9" in said and "Traceback" not in said
