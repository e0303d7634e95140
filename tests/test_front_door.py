"""The front door: light to import, and everything it promises is there."""

import json
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import batchsd

ROOT = Path(batchsd.__file__).parent.parent


def modules_after(code: str) -> set[str]:
    """Names of the modules that a fresh interpreter holds after running the code."""
    script = f"{code}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


@pytest.mark.parametrize("code", ["import batchsd", "import batchsd.types", "import batchsd.hookspecs"])
def test_import_is_light(code):
    heavy = {"torch", "ray", "transformers", "diffusers", "numpy", "pyarrow"}
    assert modules_after(code) & heavy == set()


def test_a_scheduler_is_named_without_torch():
    """A plan needs the names of schedulers, and a finished job nothing more."""
    assert "torch" not in modules_after("import batchsd; batchsd.Scheduler")


def test_every_public_name_is_there():
    from batchsd.diffusion.scheduler import Scheduler

    assert batchsd.Scheduler is Scheduler
    assert [name for name in batchsd.__all__ if getattr(batchsd, name, None) is None] == []
    with pytest.raises(AttributeError, match="'Schedular'"):
        batchsd.Schedular  # noqa: B018


def test_version_has_one_source():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"] and "version" not in project["project"]
    assert project["tool"]["hatch"]["version"]["path"] == "batchsd/__init__.py"
    assert version("batchsd") == batchsd.__version__
