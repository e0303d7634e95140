"""jobs/depth.toml as it ships (but for the number of steps), and bad depth maps as rows of a job: on the shipped model,
with its depth network."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from batchsd.cli import commands

ROOT = Path(__file__).parent.parent


def run(*arguments: str | Path) -> None:
    done = CliRunner().invoke(commands, ["run", *map(str, arguments), "--local"])
    assert done.exit_code == 0, done.output


def rows_of(folder: Path) -> dict[str, dict]:
    files = sorted((folder / "data").glob("*.parquet"))
    return {row["id"]: row for path in files for row in pq.read_table(path).to_pylist()}


def opened(cell: dict) -> Image.Image:
    return Image.open(io.BytesIO(cell["bytes"]))


def test_the_shipped_job_draws_over_given_and_estimated_maps(tmp_path: Path) -> None:
    run(ROOT / "jobs" / "depth.toml", "--set", f"output.uri={tmp_path / 'run'}", "--set", "sampler.steps=4")
    rows = rows_of(tmp_path / "run")
    manifest = {row["id"]: row for row in pq.read_table(ROOT / "jobs" / "depth.parquet").to_pylist()}
    assert rows.keys() == manifest.keys() and len(rows) == 28
    for key, row in rows.items():
        given = manifest[key]
        assert row["status"] == "ok" and opened(row["image"]).size == (64, 64), row["error"]
        for name in ("depth", "init_image"):  # output.keep_inputs: the bytes that the row brought
            assert (row[name] or {}).get("bytes") == (given[name] or {}).get("bytes"), (key, name)
        assert (row["estimated_depth"] is None) == (given["depth"] is not None)
    for key in (key for key, row in rows.items() if row["estimated_depth"] is not None):
        # The estimated map is of the scene that the other rows brought as a true map.
        true = np.asarray(opened(rows[f"{key[:-1]}0"]["depth"]), float)
        found = opened(rows[key]["estimated_depth"])
        assert found.mode == "I;16"
        assert np.corrcoef(np.asarray(found.resize((64, 64)), float).ravel(), true.ravel())[0, 1] > 0.9, key


def npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


RAMP = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
HOLE = np.where(RAMP > 0.9, np.nan, RAMP)

MAPS: dict[str, tuple[bytes, str]] = {  # a map, and a piece of the error; "" is a picture
    "ramp": (npy(RAMP), ""),
    "NaN": (npy(HOLE), "depth: 410 of its 4,096 numbers are NaN or infinite"),
    "infinite": (npy(np.where(RAMP > 0.9, np.inf, RAMP)), "depth: 410 of its 4,096 numbers are NaN or infinite"),
    "beyond float32": (npy(RAMP.astype(np.float64) * 1e300), "numbers are NaN or infinite"),
    "flat": (npy(np.full((64, 64), 7.0)), ""),
    "one number": (npy(np.ones((1, 1))), ""),
    "four dimensions": (npy(np.ones((2, 3, 8, 8))), "depth: an array of shape (2, 3, 8, 8)"),
    "no numbers": (npy(np.ones((0, 8))), "depth: 8 x 0 pixels"),
    "complex": (npy(RAMP.astype(np.complex64)), "type complex64; give height x width of plain numbers"),
    "texts": (npy(np.array([["a", "b"]])), "give height x width of plain numbers"),
    "cut off": (npy(RAMP)[:900], "depth: cannot be decoded"),
    "integers": (npy((RAMP * 1000).astype(np.int16)), ""),
    "one axis more": (npy(RAMP[None]), ""),
    "last": (npy(1 - RAMP), ""),
}
JOB = """
[input]
manifest = "{name}.parquet"
[model]
path = "tiny-scenes-depth"
[conditioning]
task = "depth"
[sampler]
steps = 3
[output]
uri = "{name}"
[run]
deterministic = true
batch_size = 4
max_failed = 1.0
"""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict], dict[str, dict]]:
    """The rows of a job of all these maps, and of one without the bad ones."""
    folder = tmp_path_factory.mktemp("maps")
    parts = {"all": MAPS, "good": {name: MAPS[name] for name in MAPS if not MAPS[name][1]}}
    for name, maps in parts.items():
        table = [{"id": key, "prompt": "a large red cube", "seed": 5, "depth": d} for key, (d, _) in maps.items()]
        pq.write_table(pa.Table.from_pylist(table), folder / f"{name}.parquet")
        (folder / f"{name}.toml").write_text(JOB.format(name=name))
        run(folder / f"{name}.toml")
    return rows_of(folder / "all"), rows_of(folder / "good")


def test_bad_maps_say_why_and_harm_nobody(drawn: tuple[dict[str, dict], dict[str, dict]]) -> None:
    rows, without = drawn
    assert rows.keys() == MAPS.keys()
    for name, (_, message) in MAPS.items():
        row = rows[name]
        if message:
            assert (row["status"], row["image"]) == ("bad_image", None), name
            assert message in row["error"] and "\n" not in row["error"], row["error"]
        else:
            assert row["status"] == "ok" and row["image"]["bytes"] == without[name]["image"]["bytes"], name


def test_the_scale_of_a_map_is_nothing(drawn: tuple[dict[str, dict], dict[str, dict]]) -> None:
    rows, _ = drawn
    pictures = [np.asarray(opened(rows[name]["image"]), float) for name in ("ramp", "integers", "last")]
    near, far = (np.abs(pictures[0] - other).mean() for other in pictures[1:])
    assert near < 2 < far, "a map's scale is nothing, its order is all"
