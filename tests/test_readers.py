"""Whole runs read by other people's readers, each an oracle: equal rows, ids and pixels, failed rows present.

One run a sink: 12 rows in shards of 4, one of which fails; then an edited prompt, so that there are more markers than
shards.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from batchsd.cli import commands

ROWS, FAILED, EDITED = 12, 5, 9
IDS = [f"row/{i}.x" for i in range(ROWS)]  # hostile to file names
PROMPTS = ["a red cube, on the left", "Negative prompt: none", 'a "quoted" <b>cone</b>, \n two lines'] * 4
KINDS = ("png", "jpg", "webp")
Runs = Callable[[str], Path]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Runs:
    """The folder of a sink's run, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("runs")
    made: dict[str, Path] = {}

    def run(*words: str | Path) -> None:
        result = CliRunner().invoke(commands, ["run", *map(str, words), "--local"], catch_exceptions=False)
        assert result.exit_code == 0, result.output

    def make(sink: str) -> Path:
        if sink not in made:
            here = folder / sink
            here.mkdir()
            rows: dict[str, list[object]] = {"id": list(IDS), "prompt": list(PROMPTS), "seed": list(range(ROWS))}
            rows["height"] = [17 if i == FAILED else 16 for i in range(ROWS)]
            pq.write_table(pa.table(rows), here / "prompts.parquet")
            kind = {"parquet": "png", "webdataset": "webp", "folder": "jpeg"}[sink]
            (here / "job.toml").write_text(
                f'[input]\nmanifest = "prompts.parquet"\n[model]\npath = "{checkpoint}"\ndevice = "cpu"\n'
                f'[sampler]\nsteps = 2\nheight = 16\nwidth = 16\n[output]\nuri = "run"\nsink = "{sink}"\n'
                f'rows_per_shard = 4\nimage = {{ format = "{kind}" }}\n[run]\nmax_failed = 1\n'
            )
            run(here / "job.toml")
            rows["prompt"][EDITED] = "a blue cone"
            pq.write_table(pa.table(rows), here / "prompts.parquet")
            run(here / "job.toml", "--update")
            markers = list((here / "run/__batchsd/ledger/0001").glob("*.json"))
            assert len(markers) == 4, "one more than there are shards"
            made[sink] = here / "run"
        return made[sink]

    return make


def cells(run: Path) -> dict[str, bytes | None]:
    """Each row's file bytes, by pyarrow alone."""
    table = pq.read_table(run / "data")
    pictures = [cell and cell["bytes"] for cell in table["image"].to_pylist()]
    return dict(zip(table["id"].to_pylist(), pictures, strict=True))


def same(found: Image.Image, data: bytes | None) -> bool:
    assert data is not None
    return bool(np.array_equal(np.asarray(found.convert("RGB")), np.asarray(Image.open(io.BytesIO(data)))))


# --- Parquet ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_loads_a_parquet_run_by_its_folder(runs: Runs, streaming: bool, tmp_path: Path) -> None:
    from datasets import load_dataset

    run = runs("parquet")
    rows = list(load_dataset(str(run), split="train", streaming=streaming, cache_dir=str(tmp_path)))
    pictures = cells(run)
    assert [row["id"] for row in rows] == IDS
    for i, row in enumerate(rows):
        assert row["status"] == ("bad_input" if i == FAILED else "ok")
        assert row["image"] is None if i == FAILED else same(row["image"], pictures[row["id"]])
    assert rows[EDITED]["prompt"] == "a blue cone" and "17" in rows[FAILED]["error"]


def test_pandas_polars_duckdb_and_pyarrow_agree(runs: Runs) -> None:
    import duckdb
    import pandas
    import polars

    run, pictures = runs("parquet"), cells(runs("parquet"))
    files = str(run / "data" / "*.parquet")
    found = {
        "pandas": pandas.read_parquet(run / "data").to_dict("records"),
        "polars": polars.read_parquet(files).to_dicts(),
        "duckdb": duckdb.sql(f"select * from read_parquet('{files}')").to_arrow_table().to_pylist(),
    }
    for reader, rows in found.items():
        assert [row["id"] for row in rows] == IDS, reader
        assert [row["status"] for row in rows].count("ok") == ROWS - 1, reader
        for row in rows:
            assert (row["image"] or {"bytes": None})["bytes"] == pictures[row["id"]], reader
    counted = duckdb.sql(f"select status, count(*) from read_parquet('{files}') group by all order by all").fetchall()
    assert counted == [("bad_input", 1), ("ok", ROWS - 1)]


def test_data_alone_can_be_audited(runs: Runs) -> None:
    """The resolved job, the plan's hash, the inputs' hashes and the versions are in each file's own metadata."""
    for file in sorted((runs("parquet") / "data").iterdir()):
        told = json.loads(pq.read_schema(file).metadata[b"batchsd"])
        assert told["job"]["sampler"]["steps"] == 2 and told["plan"] and told["checkpoint"]
        (given,) = told["input"]["files"]
        assert given["name"] == "prompts.parquet" and len(given["sha256"]) == 64
        assert {"batchsd", "torch"} <= set(told["versions"])


# --- WebDataset and ImageFolder --------------------------------------------------------------------------


def members(run: Path) -> dict[str, tuple[str, bytes]]:
    """By the standard library: key -> (id, picture bytes)."""
    found: dict[str, dict[str, bytes]] = {}
    for tar in sorted((run / "data").glob("*.tar")):
        with tarfile.open(tar) as file:
            for member in file:
                key, _, extension = member.name.partition(".")
                reader = file.extractfile(member)
                assert reader is not None
                found.setdefault(f"{tar.stem}/{key}", {})[extension] = reader.read()
    pictures = {key: next(parts[kind] for kind in KINDS if kind in parts) for key, parts in found.items()}
    return {key: (json.loads(parts["json"])["id"], pictures[key]) for key, parts in found.items()}


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_loads_a_webdataset_run_by_its_folder(runs: Runs, streaming: bool, tmp_path: Path) -> None:
    from datasets import load_dataset

    run = runs("webdataset")
    rows = list(load_dataset(str(run), split="train", streaming=streaming, cache_dir=str(tmp_path)))
    expected = dict(members(run).values())
    good = [key for i, key in enumerate(IDS) if i != FAILED]
    assert [row["json"]["id"] for row in rows] == good == list(expected)
    assert all(same(row["webp"], expected[row["json"]["id"]]) for row in rows)
    failed = pq.read_table(run / "failed")
    assert failed["id"].to_pylist() == [IDS[FAILED]] and failed["status"].to_pylist() == ["bad_input"]


def test_webdataset_reads_its_tars(runs: Runs) -> None:
    import webdataset

    run = runs("webdataset")
    tars = [str(path) for path in sorted((run / "data").glob("*.tar"))]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("pil"))
    expected = dict(members(run).values())
    assert [sample["json"]["id"] for sample in samples] == list(expected)
    assert all(same(sample["webp"], expected[sample["json"]["id"]]) for sample in samples)
    assert samples[2]["txt"] == PROMPTS[2]


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_loads_an_imagefolder_run_by_its_folder(runs: Runs, streaming: bool, tmp_path: Path) -> None:
    from datasets import load_dataset

    run = runs("folder")
    rows = list(load_dataset(str(run), split="train", streaming=streaming, cache_dir=str(tmp_path)))
    assert sorted(row["id"] for row in rows) == sorted(key for i, key in enumerate(IDS) if i != FAILED)
    files = {str(path): path.read_bytes() for path in (run / "data").rglob("*.jpg")}
    assert len(files) == ROWS - 1
    for row in rows:
        assert any(same(row["image"], data) for data in files.values())


# --- what a picture says of itself ------------------------------------------------------------------------


@pytest.mark.parametrize("sink, extension", [("parquet", "png"), ("webdataset", "webp"), ("folder", "jpg")])
def test_pictures_tell_prompt_and_origin_to_other_tools(
    runs: Runs, sink: str, extension: str, tmp_path: Path
) -> None:
    """sd-parsers reads the parameters, exiftool the IPTC mark; a prompt that looks like a header misleads neither."""
    from sd_parsers import ParserManager

    program = shutil.which("exiftool")
    if program is None:
        pytest.skip("exiftool is not installed (Debian: libimage-exiftool-perl)")
    run, key = runs(sink), IDS[0]
    data = {
        "parquet": lambda: cells(run)[key],
        "webdataset": lambda: dict(members(run).values())[key],
        "folder": lambda: next(p for p in sorted((run / "data").rglob("*.jpg"))).read_bytes(),
    }[sink]()
    assert data is not None
    file = tmp_path / f"picture.{extension}"
    file.write_bytes(data)
    info = ParserManager().parse(file)
    assert info is not None
    (prompt,) = info.prompts
    assert prompt.value.strip() == PROMPTS[0]
    (sampler,) = info.samplers
    assert (str(sampler.parameters["steps"]), sampler.name) == ("2", "DPM++ 2M")
    told = subprocess.run([program, "-j", "-DigitalSourceType", str(file)], capture_output=True, text=True, check=True)
    (found,) = json.loads(told.stdout)
    assert "trainedAlgorithmicMedia" in found["DigitalSourceType"] or "Algorithm" in found["DigitalSourceType"]


def test_export_gives_the_same_rows_in_other_layouts(runs: Runs, tmp_path: Path) -> None:
    for source in ("parquet", "webdataset", "folder"):
        for target in ("parquet", "webdataset", "folder"):
            to = tmp_path / f"{source}-{target}"
            words = ["export", str(runs(source)), "--sink", target, "--to", str(to)]
            result = CliRunner().invoke(commands, words, catch_exceptions=False)
            assert result.exit_code == 0 and result.output.startswith("12 rows")
            assert count_pictures(to, target) == ROWS - 1, f"{source} as {target}"


def count_pictures(folder: Path, sink: str) -> int:
    if sink == "parquet":
        return sum(data is not None for data in cells(folder).values())
    if sink == "webdataset":
        return len(members(folder))
    return len([path for path in (folder / "data").rglob("*") if path.suffix.strip(".") in KINDS])
