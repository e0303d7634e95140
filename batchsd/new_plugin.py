"""`batchsd new-plugin`: a package that works as it stands, to edit.

    NAME/   name.py (the plugin)   test_name.py (its contract)   job.toml, prompts.parquet (to try it)   pyproject.toml

It is a copy of a folder of `skeletons/`, whose plugins are called `mine`.
"""

from __future__ import annotations

import keyword
import re
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

from batchsd import plugins
from batchsd.starter import PROMPTS, write_manifest
from batchsd.types import UsageError

SKELETONS = Path(__file__).parent / "skeletons"
KINDS = ("score", "filter", "sampler", "task", "sink")

JOB = """\
# batchsd run job.toml
plugins = ["./{module}.py"]     # this file, which goes to every worker; ["{name}"] once it is installed on all nodes
[input]
manifest = "prompts.parquet"
[model]
path = "tiny-scenes"
"""

PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "0.1.0"
description = "A batchsd {kind}."
requires-python = ">=3.11"
dependencies = ["batchsd"]

[project.entry-points.batchsd]
{name} = "{module}"

[tool.hatch.build.targets.wheel]
only-include = ["{module}.py"]

[tool.pytest.ini_options]
pythonpath = ["."]
"""


def new_plugin(name: str, kind: str, parent: Path) -> list[Path]:
    """Write the package `parent/name` and give its files, the plugin first. Raises UsageError; overwrites nothing."""
    if not re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", name):
        raise UsageError(f"new-plugin: {name!r} is no name for a package: small letters, digits and dashes: my-{kind}")
    folder, module = parent / name, name.replace("-", "_")
    if folder.exists():
        raise UsageError(f"new-plugin: {folder} is there already, and nothing is overwritten: choose another name")
    if keyword.iskeyword(module) or find_spec(module) is not None:
        raise UsageError(f"new-plugin: {module!r} means something in this Python already: choose another name")
    with tempfile.TemporaryDirectory() as scratch:
        made = write(name, module, kind, Path(scratch) / name)
        plugins.build([f"./{module}.py"], made)  # a scheduler called euler, say, is refused here
        try:
            shutil.copytree(made, folder)
        except OSError as error:
            raise UsageError(f"{folder}: cannot be written: {error.strerror or error}") from None
    files = (f"{module}.py", f"test_{module}.py", "job.toml", "prompts.parquet", "pyproject.toml")
    return [folder / file for file in files]


def write(name: str, module: str, kind: str, folder: Path) -> Path:
    """The whole package, in a folder that is not there yet."""
    folder.mkdir()
    for file in ("mine.py", "test_mine.py"):
        text = (SKELETONS / kind / file).read_text("utf-8")
        (folder / file.replace("mine", module)).write_text(re.sub(r"\bmine\b", module, text), "utf-8")
    words = {"name": name, "module": module, "kind": kind}
    ends = re.sub(r"\bmine\b", module, (SKELETONS / kind / "job.toml").read_text("utf-8"))
    (folder / "job.toml").write_text(JOB.format(**words) + ends, "utf-8")
    (folder / "pyproject.toml").write_text(PROJECT.format(**words), "utf-8")
    write_manifest(folder / "prompts.parquet", **({"also": PROMPTS[::-1]} if kind == "task" else {}))
    return folder
