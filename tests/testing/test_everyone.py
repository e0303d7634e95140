"""Everyone keeps the contracts: what is built in, by name, and each package of plugins/. One without is found here."""

from __future__ import annotations

from pathlib import Path

import pytest
from sinks import test_folder, test_parquet, test_webdataset
from tasks.test_contract import ROWS

import batchsd
from batchsd.plugins import build
from batchsd.testing import check_sink

from . import test_schedulers

BUILTIN = build([], Path())
PLUGINS = sorted(path.parent for path in (Path(batchsd.__file__).parent.parent / "plugins").glob("*/pyproject.toml"))
READ_BACK = {
    "parquet": test_parquet.pictures,
    "webdataset": test_webdataset.pictures,
    "folder": test_folder.pictures,
}


def test_no_kind_is_forgotten() -> None:
    """What is built in is of the kinds below: a new kind wants its contract here."""
    assert {kind for kind, _ in BUILTIN.owners} == {"scheduler", "task", "sink"}


@pytest.mark.parametrize("name", BUILTIN.sinks)
def test_every_sink(name: str, tmp_path: Path) -> None:
    check_sink(BUILTIN.sinks[name], tmp_path, READ_BACK[name])


def test_every_task_has_rows_in_its_contract() -> None:
    assert {task for task, *_ in ROWS} == set(BUILTIN.tasks)


def test_every_scheduler_is_among_those_checked() -> None:
    assert set(test_schedulers.BUILTIN) == set(BUILTIN.schedulers)
    marks = {mark.args[0]: mark.args[1] for mark in test_schedulers.test_builtin_keeps_the_contract.pytestmark}
    assert set(marks["name"]) == set(BUILTIN.schedulers)


@pytest.mark.parametrize("folder", PLUGINS, ids=lambda folder: folder.name)
def test_every_package_runs_the_contract_of_each_thing_it_brings(folder: Path) -> None:
    module = folder.name.replace("-", "_")
    registry = build([module], Path())
    kinds = {kind for (kind, _), owner in registry.owners.items() if owner == module}
    said = (folder / f"test_{module}.py").read_text()
    assert kinds and {kind for kind in kinds if f"check_{kind}(" not in said} == set()
    names = [name for (_, name), owner in registry.owners.items() if owner == module]
    if len(names) < 10:  # the diffusers package tests its list as a whole
        assert [name for name in names if f'"{name}"' not in said] == []
