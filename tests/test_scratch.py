from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from batchsd.scratch import Scratch, disk_trouble
from batchsd.types import InfrastructureError


def age(folder: Path) -> None:
    os.utime(folder, (0, time.time() - 3600))


def test_what_a_dead_worker_left_is_removed_and_a_living_ones_is_not(tmp_path: Path) -> None:
    living = Scratch(tmp_path)
    alive = living.make("staging/00001.alive")
    child = os.fork()
    if child == 0:
        (Scratch(tmp_path).make("staging/00002.dead") / "x").write_bytes(b"x" * 100)
        os._exit(9)
    os.waitpid(child, 0)
    (tmp_path / "thesis.tex").write_text("years of work")
    dead = tmp_path / "batchsd-00002.dead"
    assert dead.is_dir()
    young = Scratch(tmp_path).make("staging/00003.new")
    assert dead.is_dir(), "its maker may not have locked it yet"
    for folder in (alive, dead, young):
        age(folder)
    Scratch(tmp_path).make("staging/00004.next")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "batchsd-00001.alive", "batchsd-00003.new", "batchsd-00004.next", "thesis.tex",
    ]  # fmt: skip


def test_trouble_names_the_place_and_the_room(tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError, match=r"nowhere/x: No space left on device \([\d,]+ MiB free there\); run"):
        with disk_trouble(tmp_path / "nowhere/x"):
            raise OSError(28, "No space left on device")
