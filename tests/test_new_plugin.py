"""What `batchsd new-plugin` writes works before a line of it is edited: its test, its job, its package."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from batchsd.cli import commands
from batchsd.new_plugin import KINDS, SKELETONS, new_plugin
from batchsd.plugins import build
from batchsd.types import UsageError

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one new plugin of each kind, called `my-<kind>`."""
    folder = tmp_path_factory.mktemp("new")
    for kind in KINDS:
        new_plugin(f"my-{kind}", kind, folder)
    return folder


def test_every_kind_has_its_skeleton_and_every_register_hook_its_kind() -> None:
    from batchsd import hookspecs

    assert {path.name for path in SKELETONS.iterdir() if (path / "mine.py").exists()} == set(KINDS)
    hooks = {name.removeprefix("register_")[:-1] for name in vars(hookspecs) if name.startswith("register_")}
    assert hooks == {"scheduler" if kind == "sampler" else kind for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_its_own_tests_pass_at_once(
    kind: str, every_kind: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(every_kind / f"my-{kind}")
    tests = vars(importlib.import_module(f"test_my_{kind}"))
    ran = [name for name in tests if name.startswith("test_")]
    for name in ran:
        tests[name](**({"tmp_path": tmp_path} if "tmp_path" in inspect.signature(tests[name]).parameters else {}))
    assert "test_contract" in ran


def test_pytest_in_its_folder(every_kind: Path) -> None:
    """As the author runs it, with nothing of the package installed."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    folder = every_kind / "my-score"
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr


def test_one_job_on_all_five(every_kind: Path) -> None:
    """A job with the new sampler, task, score, filter and sink together."""
    import zipfile

    (every_kind / "job.toml").write_text(
        f"plugins = {[f'./my-{kind}/my_{kind}.py' for kind in KINDS]}\n"
        '[input]\nmanifest = "my-task/prompts.parquet"\n[model]\npath = "tiny-scenes"\n'
        '[conditioning]\ntask = "my_task"\n[sampler]\nscheduler = "my_sampler"\nsteps = 3\nguidance_scale = 2.0\n'
        '[output]\nuri = "all"\nrows_per_shard = 6\n'
        'sink = "my_sink"\nscores = ["my_score"]\nfilters = ["my_filter", "my_score <= 1"]\n'
    )
    CliRunner().invoke(commands, ["run", str(every_kind / "job.toml"), "--local"], catch_exceptions=False)
    (file,) = (every_kind / "all" / "data").glob("*.zip")
    with zipfile.ZipFile(file) as opened:
        assert len(opened.namelist()) == 7  # six pictures and the rows
        assert b'"my_score": 0.' in opened.read("rows.jsonl")
    manifest = pq.read_table(every_kind / "my-task" / "prompts.parquet")
    assert set(manifest.column_names) == {"id", "prompt", "also"}


@pytest.mark.parametrize("kind", KINDS)
def test_its_own_job_and_project(kind: str, every_kind: Path) -> None:
    from batchsd.job import load
    from batchsd.prepare import check_registered

    folder = every_kind / f"my-{kind}"
    job = load(folder / "job.toml", (), {})
    check_registered(job, build(job.plugins, Path()))
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    assert project["project"]["entry-points"]["batchsd"] == {f"my-{kind}": f"my_{kind}"}
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"] == [f"my_{kind}.py"]
    assert "mine" not in "".join(file.read_text() for file in folder.glob("*.[pt]*") if file.suffix != ".parquet")


def test_the_command_says_what_comes_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(commands, ["new-plugin", "redness"], catch_exceptions=False)
    assert done.output.splitlines() == [
        "wrote redness/redness.py (a score: edit this), and beside it test_redness.py, job.toml, prompts.parquet, "
        "pyproject.toml",
        "try it: cd redness && pytest -q && batchsd run job.toml",
    ]
    assert "scores = [\"redness\"]" in (tmp_path / "redness" / "job.toml").read_text()


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("My Score", "score", "'My Score' is no name for a package: small letters, digits and dashes: my-score"),
        ("../x", "score", "'../x' is no name for a package"),
        ("there", "score", "there is there already, and nothing is overwritten"),
        ("json", "sink", "'json' means something in this Python already"),
        ("class", "task", "'class' means something in this Python already"),
        ("euler", "sampler", "scheduler 'euler' is registered by both 'batchsd' and './euler.py'"),
        ("parquet", "sink", "sink 'parquet' is registered by both"),
    ],
)
def test_names_that_do_not_do(name: str, kind: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError) as error:
        new_plugin(name, kind, tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
