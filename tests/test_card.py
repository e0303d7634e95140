"""`load_dataset(RUN)` for each layout, after a real run with more shards than one, some rows failed."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from PIL import Image

from batchsd.cli import commands
from batchsd.types import UsageError

IDS = [f"row.{i}" for i in range(11)]
GOOD = [name for i, name in enumerate(IDS) if i % 5 != 3]


@pytest.fixture(scope="module")
def draw(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory):
    top = tmp_path_factory.mktemp("runs")
    prompts = [None if i % 5 == 3 else f"a red cube {i}" for i in range(11)]
    negative = [None] * 6 + ["blue"] * 5  # null in the whole first shard
    table = {"id": IDS, "prompt": prompts, "negative_prompt": negative, "tags": [["a"], None] * 5 + [["b"]]}
    pq.write_table(pa.table(table), top / "rows.parquet")

    def run(sink: str, *sets: str) -> Path:
        out = top / "-".join([sink, *(s.replace("=", "-") for s in sets)])
        job = top / "job.toml"
        job.write_text(
            f'[input]\nmanifest = "rows.parquet"\n[model]\npath = "{checkpoint}"\n[sampler]\nsteps = 1\n'
            f'[output]\nuri = "{out}"\nsink = "{sink}"\nrows_per_shard = 3\n[run]\nmax_failed = 5\n'
        )
        if not out.exists():
            arguments = ["run", str(job), "--local", *(word for s in sets for word in ("--set", s))]
            commands.main(arguments, standalone_mode=False)
        return out

    return run


def load(run: Path, *name: str, **options: object):
    return load_dataset(str(run), *name, cache_dir=str(run.parent / "cache"), **options)["train"]


def pixels(picture: Image.Image) -> bytes:
    return np.asarray(picture.convert("RGB")).tobytes()


@pytest.fixture(scope="module")
def expected(draw) -> dict[str, bytes]:
    """Pixels of each good row, read with pyarrow from the plain Parquet run."""
    rows = [row for path in sorted((draw("parquet") / "data").iterdir()) for row in pq.read_table(path).to_pylist()]
    return {row["id"]: pixels(Image.open(io.BytesIO(row["image"]["bytes"]))) for row in rows if row["image"]}


def test_parquet_inline(draw, expected) -> None:
    rows = load(draw("parquet"))
    assert rows["id"][:] == IDS
    assert [row["image"] is not None for row in rows] == [name in GOOD for name in IDS]


def test_parquet_aside(draw, expected) -> None:
    run = draw("parquet", "output.failed=aside")
    rows = load(run)
    assert {row["id"]: pixels(row["image"]) for row in rows} == expected
    failed = load(run, "failed")
    assert sorted([*rows["id"], *failed["id"]]) == sorted(IDS)
    assert set(failed["status"]) == {"bad_input"} and all(failed["error"])


@pytest.mark.parametrize("streaming", [False, True])
def test_webdataset(draw, expected, streaming: bool) -> None:
    run = draw("webdataset")
    rows = list(load(run, streaming=streaming))
    assert {row["json"]["id"]: pixels(row["png"]) for row in rows} == expected
    assert {row["json"]["id"]: row["json"]["negative_prompt"] for row in rows}["row.10"] == "blue"


def test_folder(draw, expected) -> None:
    run = draw("folder")
    rows = load(run)
    assert {row["id"]: pixels(row["image"]) for row in rows} == expected
    failed = load_dataset("parquet", data_files=f"{run}/failed/*.parquet", cache_dir=str(run.parent / "cache"))
    assert sorted([*rows["id"], *failed["train"]["id"]]) == sorted(IDS)


def test_two_runs_give_the_same_files(draw) -> None:
    """The side table, the tars: bytes of a run do not depend on when it was made."""
    from batchsd.ledger import Ledger
    from batchsd.store import open_store

    run = draw("webdataset")
    first = {f.name: f.sha256 for m in Ledger(open_store(str(run))).markers() for f in m.files}
    run.rename(run.parent / "kept")
    again = {f.name: f.sha256 for m in Ledger(open_store(str(draw("webdataset")))).markers() for f in m.files}
    assert first == again and any(name.startswith("failed/") for name in first)


def test_the_card_holds_the_job(draw) -> None:
    text = (draw("parquet") / "README.md").read_text()
    assert '"steps": 1' in text and "checkpoint" in text


@pytest.mark.parametrize("sets", [(), ("output.failed=aside",)])
def test_an_export_equals_a_run(draw, sets: tuple[str, ...]) -> None:
    """Exported to tars, a Parquet run gives the files that a run with that sink gives."""
    run, target = draw("parquet", *sets), draw("parquet", *sets).parent / f"tars{len(sets)}"
    commands.main(["export", str(run), "--sink", "webdataset", "--to", str(target)], standalone_mode=False)
    tars = {path.name: path.read_bytes() for path in (target / "data").iterdir()}
    wanted = {path.name: path.read_bytes() for path in (draw("webdataset") / "data").iterdir()}
    assert len(tars) == 4 and tars == wanted
    assert len(list(load(target))) == len(GOOD)
    with pytest.raises(UsageError, match="is not empty"):
        commands.main(["export", str(run), "--sink", "webdataset", "--to", str(target)], standalone_mode=False)


def test_the_report_is_there_at_the_end_of_a_run(draw) -> None:
    run = draw("parquet")
    page = (run / "report.html").read_text()
    assert page.count("data:image/webp;base64,") >= len(GOOD)
    assert "bad_input" in page and "row.3" in page and "&#34;steps&#34;: 1" in page
    assert "batchsd report" in page  # strips are not drawn here
    commands.main(["report", str(run), "--strips", "0", "--to", f"{run.parent}/again.html"], standalone_mode=False)
    assert (run.parent / "again.html").read_text() == page


@pytest.mark.parametrize("sink", ["webdataset", "folder"])
def test_the_report_of_every_layout_shows_the_same(draw, sink: str) -> None:
    pages = [(draw(layout) / "report.html").read_text() for layout in ("parquet", sink)]
    shown = [re.findall(r'alt="(.*?)" title="(.*?)" src="(.*?)"', page) for page in pages]
    assert sorted(shown[0]) == sorted(shown[1]) and len(shown[0]) >= len(GOOD)
    assert [page.count("bad_input") for page in pages] == [1, 1]


def test_a_report_that_fails_is_a_remark(draw, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from batchsd import report

    def fail(*arguments: object) -> None:
        raise ZeroDivisionError("no rows at s3://key:secret@bucket\nfor ever")

    monkeypatch.setattr(report, "survey", fail)
    run = draw("parquet", "sampler.guidance_scale=3")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("; no report (no rows at s3://<redacted>@bucket for ever)") and "contact.png" in line
    assert not (run / "report.html").exists() and (run / "__batchsd/SUCCESS.json").exists()
