"""A row drawn again from its run folder alone: the stored picture is the oracle, and damage to it must show."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from batchsd.cli.operate import reproduce
from batchsd.drive import drive
from batchsd.executor import InProcess
from batchsd.job import load
from batchsd.prepare import prepare
from batchsd.reproduce import Run, difference, pixels_of
from batchsd.revise import begin_run
from batchsd.stop import Stop
from batchsd.types import UsageError

SINKS = ("parquet", "webdataset", "folder")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """One run a layout, of a text row, an init-image row, a twin of the first's id, and a row that was refused."""
    folder = tmp_path_factory.mktemp("reproduce")
    Image.new("RGB", (16, 16), "teal").save(folder / "init.png")
    table = {
        "id": ["one", "two", "one", "bad"],
        "prompt": ["a red cube", "a blue cone", "a green sphere", None],
        "task": [None, "image", None, None],
        "init_image": [None, "init.png", None, None],
        "strength": [None, 0.5, None, None],
        "height": [None, None, 24, None],
    }
    pq.write_table(pa.table(table), folder / "prompts.parquet")
    text = (
        f'plugins = ["./mine.py"]\n[input]\nmanifest = "prompts.parquet"\nrepeat = 2\n[model]\npath = "{checkpoint}"\n'
        'device = "cpu"\n[sampler]\nsteps = 3\n[output]\nrows_per_shard = 4\nuri = "parquet"\n'
        'columns = { prompt = "text" }\n[run]\nmax_failed = 9\n'
    )
    (folder / "job.toml").write_text(text)
    (folder / "mine.py").write_text("import batchsd\n@batchsd.hookimpl\ndef shard_started(shard): pass\n")
    for sink in SINKS:
        failed = "inline" if sink == "parquet" else "aside"
        sets = [f"output.sink={sink}", f"output.uri={folder}/{sink}", f"output.failed={failed}"]
        (part,) = prepare(load(folder / "job.toml", sets, {}), 1, False)
        (begun,) = begin_run([part])
        limits = (Stop(5), 9, lambda snapshot: None, lambda text: None)
        drive(part.ledger, part.plan, begun.tally, part.shards, InProcess(part.recipe), *limits)
    (folder / "prompts.parquet").unlink()  # the run folder is enough
    return folder


def said(run: Path, *options: str) -> tuple[int, str]:
    result = CliRunner().invoke(reproduce, [str(run), *options], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize("wanted", ["two", "prompts.parquet:0", "prompts.parquet:2"])
def test_a_row_comes_again_as_it_was(runs: Path, sink: str, wanted: str) -> None:
    code, text = said(runs / sink, "--id", wanted, "--repeat", "1")
    assert code == 0, text
    assert "the same picture: pixels differ by 0 of 255 at most" in text and "(repeat 1)" in text
    assert "every version is the same" in text


def test_repeats_are_different_pictures(runs: Path) -> None:
    run = Run(str(runs / "parquet"))
    one, other = (run.find("two", repeat).row.ours for repeat in (0, 1))
    assert one["seed"] != other["seed"] and one["image"]["bytes"] != other["image"]["bytes"]


def test_what_cannot_be_found_or_drawn_is_said(runs: Path, tmp_path: Path) -> None:
    def refused(message: str, *options: str) -> None:
        with pytest.raises(UsageError, match=message):
            said(runs / "parquet", *options)

    refused("2 rows have the id 'one'; give the place of one: prompts.parquet:0 .*, prompts.parquet:2 ", "--id", "one")
    refused("no row has the id 'three'", "--id", "three")
    refused("row 'two' has no repeat 2", "--id", "two", "--repeat", "2")
    refused("prompts.parquet:3 .* was refused .*prompt", "--id", "bad")
    wanted = json.loads((runs / "parquet/__batchsd/plans/0001.json").read_text())["hard"]["checkpoint"]
    refused(f"(?s)drawn with checkpoint {wanted}; --model says", "--id", "two", "--model", f"{tmp_path}/gone")
    refused(f"(?s)drawn with checkpoint {wanted}; --model says", "--id", "two", "--model", "tiny-scenes")
    with pytest.raises(UsageError, match="no run of batchsd"):
        said(tmp_path, "--id", "two")


def test_a_moved_checkpoint_and_a_moved_run(runs: Path, checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "parquet", tmp_path / "run")
    shutil.copytree(checkpoint, tmp_path / "model")
    code, text = said(tmp_path / "run", "--id", "two", "--model", f"{tmp_path}/model", "--to", f"{tmp_path}/both.png")
    assert code == 0 and "by 0 of 255" in text
    both = np.asarray(Image.open(tmp_path / "both.png"))
    assert both.shape == (16, 40, 3) and (both[:, :16] == both[:, 24:]).all()


def test_other_pictures_and_versions_are_told(runs: Path, tmp_path: Path) -> None:
    """The stored picture of one row is replaced, and the marker says another torch."""
    run = tmp_path / "run"
    shutil.copytree(runs / "parquet", run)
    path = run / "data/train-00000-of-00002.parquet"
    table = pq.read_table(path)
    images = table["image"].to_pylist()
    images[2]["bytes"] = images[0]["bytes"]
    changed = table.set_column(table.schema.get_field_index("image"), table.schema.field("image"), [images])
    pq.write_table(changed, path)
    marker = run / "__batchsd/ledger/0001/00000.json"
    values = json.loads(marker.read_text())
    values["facts"]["torch"] = "1.0"
    marker.write_text(json.dumps(values))
    code, text = said(run, "--id", "two")
    assert code == 1 and "another picture" in text
    assert "torch: 1.0 then, " in text


def test_the_difference_is_counted() -> None:
    one = np.zeros((2, 2, 3), np.uint8)
    other = one.copy()
    other[0, 0, 1], other[1, 1, 0] = 200, 3
    found = difference(one, other)
    assert (found.largest, found.mean, found.share) == (200, 203 / 12, 0.5)
    assert difference(one, np.zeros((4, 2, 3), np.uint8)).share == 1.0
    assert pixels_of(_png(other)).tolist() == other.tolist()


def _png(image_HW3: np.ndarray) -> bytes:
    import io

    buffer = io.BytesIO()
    Image.fromarray(image_HW3).save(buffer, "png")
    return buffer.getvalue()
