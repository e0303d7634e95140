"""The commands as a person meets them: what they print, what they leave, and the code they exit with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchsd.cli import main

Run = Callable[..., int]


@pytest.fixture
def job(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job of 8 rows in an empty folder, which is the current one."""
    prompts = {"id": [f"row{i}" for i in range(8)], "prompt": ["a red cube"] * 8, "mood": ["calm"] * 8}
    pq.write_table(pa.table(prompts), tmp_path / "prompts.parquet")
    (tmp_path / "job.toml").write_text(
        f'[input]\nmanifest = "prompts.parquet"\n[model]\npath = "{checkpoint}"\ndevice = "cpu"\n'
        '[sampler]\nsteps = 2\nheight = 16\nwidth = 16\n[output]\nuri = "out/run1"\nrows_per_shard = 4\n'
    )
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("BATCHSD_", "RAY_"))]:
        monkeypatch.delenv(name)
    return tmp_path / "job.toml"


@pytest.fixture
def batchsd(monkeypatch: pytest.MonkeyPatch) -> Run:
    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["batchsd", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0)

    return run


def test_run_makes_a_dataset_and_says_where(
    job: Path, batchsd: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    assert batchsd("run", "job.toml") == 0
    out = capsys.readouterr().out.strip().splitlines()
    assert len(out) == 1
    assert out[0].startswith("8 pictures, 0 failed in ")
    where = '-> out/run1 (load_dataset("out/run1")); contact sheet: out/run1/contact.png; report: out/run1/report.html'
    assert out[0].endswith(where)
    rows = datasets.load_dataset("out/run1", split="train", cache_dir="cache")
    assert rows["id"] == [f"row{i}" for i in range(8)]
    assert rows["mood"] == ["calm"] * 8 and rows["status"] == ["ok"] * 8
    assert rows[0]["image"].size == (16, 16)
    marker = json.loads(Path("out/run1/__batchsd/ledger/0001/00001.json").read_text())
    assert (marker["rows"], marker["attempt"]) == (4, 1)

    before = {path: path.stat().st_mtime_ns for path in Path("out/run1/data").iterdir()}
    assert batchsd("run", "job.toml") == 0
    assert capsys.readouterr().out == "nothing to do: out/run1 is complete (8 pictures, 0 failed)\n"
    assert {path: path.stat().st_mtime_ns for path in before} == before

    assert batchsd("run", "job.toml", "--set", "sampler.steps=3") == 2
    said = capsys.readouterr()
    assert said.out == "" and "sampler.steps: 2 -> 3" in said.err and "Traceback" not in said.err

    assert batchsd("status", "out/run1", "--json") == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["state"], status["rows"], status["done"], status["left"]) == ("done", 8, 8, 0)
    assert (status["shards"], status["shards_done"], status["failed"]) == (2, 2, {})


def test_a_limited_run_goes_beside_the_whole_one(job: Path, batchsd: Run) -> None:
    assert batchsd("run", "job.toml", "--limit", "3") == 0
    assert not Path("out/run1").exists()
    assert pq.read_table("out/run1-limit-3/data").column("id").to_pylist() == ["row0", "row1", "row2"]


def test_plan_and_dry_run_write_nothing(job: Path, batchsd: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert batchsd("plan", "job.toml") == 0
    plan = capsys.readouterr().out
    assert "1 file, 8 rows, 1 picture a row" in plan
    assert "8 pictures in 2 shards of at most 4, parquet" in plan and "2 shards, new" in plan
    assert batchsd("run", "job.toml", "--dry-run", "--set", "ray.workers=2", "--address", "local") == 0
    assert "2 Ray actors here" in capsys.readouterr().out
    assert not Path("out").exists()


def test_failed_rows_above_the_limit_end_in_1(
    job: Path, batchsd: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["a red cube", None, "", "a red cube", *["a blue cube"] * 4]
    pq.write_table(pa.table({"prompt": prompts}), "prompts.parquet")
    run = partial(batchsd, "run", "job.toml", "--set", "output.rows_per_shard=8")
    assert run() == 1
    told = capsys.readouterr()
    assert "1 row failed (1 bad_input), run.max_failed allows 0.08; all others are drawn" in told.err
    assert "7 pictures, 1 failed (1 bad_input) in" in told.out
    assert run() == 1
    assert "nothing to do" in capsys.readouterr().out
    assert run("--set", "run.max_failed=1") == 0
    assert "nothing to do" in capsys.readouterr().out
    table = pq.read_table("out/run1/data")
    assert table.column("status").to_pylist() == ["ok", "bad_input", *["ok"] * 6]
    assert table.column("image").null_count == 1


def test_validate_lists_bad_rows(job: Path, batchsd: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert batchsd("validate", "job.toml") == 0
    assert capsys.readouterr().out == "8 rows, 0 bad\n"
    pq.write_table(pa.table({"id": ["x", "y"], "prompt": ["a", "b"], "steps": [4, -1]}), "prompts.parquet")
    assert batchsd("validate", "job.toml") == 1
    bad, total = capsys.readouterr().out.splitlines()
    assert bad.startswith("y: steps: -1") and total == "2 rows, 1 bad"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nothing.toml"], "batchsd: nothing.toml: no such job file"),
        (["run", "job.toml", "--set", "sampler.stepz=3"], "unknown setting"),
        (["run", "job.toml", "--set", "sampler.scheduler=eulr"], "'eulr' is unknown"),
        (["run", "job.toml", "--set", "input.manifest=x.parquet"], "no such file"),
        (["run", "job.toml", "--set", "model.path=./x"], "model.path"),
        (["run", "job.toml", "--set", "output.uri=job.toml"], "is a file"),
        (["run", "job.toml", "--address", "http://127.0.0.1:8265"], "ray job submit"),
        (["run", "job.toml", "--frobnicate"], "No such option"),
        (["status", "nowhere"], "no run of batchsd"),
        (["paint"], "No such command"),
    ],
)
def test_mistakes_are_one_message_and_2(
    job: Path, batchsd: Run, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert batchsd(*arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and message in said.err and "Traceback" not in said.err
    assert not Path("out").exists()


def test_a_foreign_folder_is_left_alone(job: Path, batchsd: Run, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out/run1").mkdir(parents=True)
    Path("out/run1/thesis.tex").touch()
    assert batchsd("run", "job.toml") == 2
    assert "thesis.tex" in capsys.readouterr().err
    assert [path.name for path in Path("out/run1").iterdir()] == ["thesis.tex"]


def test_plugins_and_schema_are_json(job: Path, batchsd: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert batchsd("plugins", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"name": "parquet", "kind": "sink", "owner": "batchsd"}.items() <= next(
        row for row in rows if row["name"] == "parquet"
    ).items()
    assert batchsd("plugins") == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["kind", "name", "owner"] and len(lines) == len(rows)
    assert batchsd("schema") == 0
    assert "sampler" in json.loads(capsys.readouterr().out)["properties"]


LOUD = """
import batchsd
print("hello from a plugin")

@batchsd.hookimpl
def register_filters():
    return {"loud": batchsd.Filter.of(lambda requests, pictures: [None for _ in pictures])}
"""


def test_json_stands_alone_on_stdout(job: Path, batchsd: Run, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever plugins and libraries say goes to stderr; a mistake leaves stdout empty."""

    def said(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "batchsd", *arguments, "--json"]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    Path("loud.py").write_text(LOUD)
    loud = said("plugins", "job.toml", "--set", 'plugins=["./loud.py"]')
    assert "hello from a plugin" in loud.stderr and "loud" in {row["name"] for row in json.loads(loud.stdout)}
    wrong = said("status", "nowhere")
    assert (wrong.returncode, wrong.stdout) == (2, "") and "no run of batchsd is here" in wrong.stderr
    assert batchsd("run", "job.toml", "--local") == 0
    capfd.readouterr()
    assert batchsd("status", "out/run1", "--json") == 0
    assert json.loads(capfd.readouterr().out)["done"] == 8
    assert batchsd("status", "out/run1", "--watch", "--json") == 0
    (watched,) = capfd.readouterr().out.splitlines()
    assert json.loads(watched)["state"] == "done"
    assert batchsd("inspect", "tiny-scenes", "--json") == 0
    assert json.loads(capfd.readouterr().out)["networks"]


def test_ray_run_with_clean_output(job: Path, batchsd: Run, capfd: pytest.CaptureFixture[str]) -> None:
    assert batchsd("run", "job.toml", "--address", "local", "--set", "ray.workers=2") == 0
    said = capfd.readouterr()
    assert len(said.out.splitlines()) == 1 and said.out.startswith("8 pictures, 0 failed in ")
    assert "2 Ray actors here" in said.err
    assert pq.read_table("out/run1/data").column("id").to_pylist() == [f"row{i}" for i in range(8)]


def test_edit_update_retry_verify(job: Path, batchsd: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert batchsd("run", "job.toml") == 0
    old = pq.read_table("out/run1/data").column("image").to_pylist()
    prompts = pq.read_table("prompts.parquet").to_pydict()
    prompts["prompt"][6] = "a blue cone"
    pq.write_table(pa.table(prompts), "prompts.parquet")
    assert batchsd("run", "job.toml") == 2
    assert "--update takes up rows" in capsys.readouterr().err
    assert batchsd("run", "job.toml", "--update") == 0
    assert "4 done, 1 shard built anew" in capsys.readouterr().err
    new = pq.read_table("out/run1/data").column("image").to_pylist()
    assert [i for i in range(8) if old[i] != new[i]] == [6]
    assert batchsd("retry", "out/run1") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert batchsd("verify", "out/run1") == 0
    assert capsys.readouterr().out.startswith("2 shards, 8 rows, 8 pictures, ")
    assert batchsd("run", "job.toml", "--new") == 0
    (beside,) = Path("out").glob("run1-*")
    assert pq.read_table(beside / "data").column("image").to_pylist() == new
    next(Path("out/run1/data").iterdir()).unlink()
    assert batchsd("verify", "out/run1") == 1
    Path("out/run1/__batchsd/lock.json").write_text(
        json.dumps({"host": "h", "space": "", "pid": 1, "nonce": "n", "beat": 1, "at": 0})
    )
    assert batchsd("status", "out/run1") == 0


@contextmanager
def started(arguments: list[str], file: str) -> Iterator[subprocess.Popen[str]]:
    """A run in a process of its own, once it has written that file."""
    command = [sys.executable, "-m", "batchsd", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
    ) as process:
        try:
            until = time.monotonic() + 150
            while not Path(file).exists() and process.poll() is None and time.monotonic() < until:
                time.sleep(0.02)
            assert Path(file).exists(), "the run did not come so far"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("number", "code", "where"),
    [(signal.SIGTERM, 75, ["--local"]), (signal.SIGINT, 130, ["--address", "local"])],
    ids=["SIGTERM, in-process", "Ctrl-C, Ray"],
)
def test_signals_stop_cleanly_and_the_next_run_goes_on(
    job: Path, batchsd: Run, number: signal.Signals, code: int, where: list[str]
) -> None:
    prompts = {"id": [f"row{i}" for i in range(64)], "prompt": ["a red cube"] * 64}
    pq.write_table(pa.table(prompts), "prompts.parquet")
    slow = [
        "job.toml",
        "--set",
        "output.rows_per_shard=2",
        "--set",
        "ray.workers=2",
        "--set",
        "sampler.steps=16",
    ]
    with started(["run", *slow, *where], "out/run1/__batchsd/ledger/0001/00000.json") as process:
        os.killpg(process.pid, number)  # as a terminal does: to all of its processes
        _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert "run the same command again" in said and "Traceback" not in said
    status = json.loads(Path("out/run1/__batchsd/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("stopped", code)
    assert 0 < status["done"] < 64
    assert batchsd("run", *slow, "--local") == 0
    assert pq.read_table("out/run1/data").column("id").to_pylist() == prompts["id"]


def test_commands_that_need_no_model_import_none() -> None:
    code = (
        "import sys, batchsd.cli, batchsd.status, batchsd.cluster, batchsd.place, batchsd.prepare;"
        "print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
