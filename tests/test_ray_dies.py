"""Ray's own processes are killed beneath a run: one line, exit code 3, no row blamed, and the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from runs import check_every_row_once, command, environment, markers, started

from batchsd.ledger import Ledger
from batchsd.store import LocalStore

pytestmark = pytest.mark.cluster


def below(pid: int, name: str) -> list[int]:
    """Processes of that name among its descendants."""
    said = subprocess.run(["ps", "-eo", "pid=,ppid=,comm="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in said.splitlines()]
    found, family = [], {pid}
    for _ in rows:  # a generation each time
        family |= {int(child) for child, parent, _ in rows if int(parent) in family}
    found += [int(child) for child, _, command in rows if int(child) in family and command.strip() == name]
    return found


@pytest.mark.parametrize(
    ("name", "word"),
    [("raylet", "Ray counts this driver among the dead"), ("gcs_server", "has not answered for 40 s")],
)
def test_a_process_of_ray_dies(name: str, word: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    words = command(output, "--set", "ray.workers=2", "--set", "input.repeat=8")
    with started(words, tmp_path / "log", environment()) as process:
        process.until(lambda: len(markers(output)) > 2)
        (victim,) = below(process.process.pid, name)
        os.kill(victim, signal.SIGKILL)
        said = process.ends(3)
    assert word in said and "Traceback" not in said and "drawn alone" not in said
    assert not Ledger(LocalStore(output)).suspects(), "a row was blamed"
    done = len(markers(output))
    with started(words, tmp_path / "log2", environment()) as process:
        said = process.ends(0)
    print(done, said)
    assert 0 < done < 48 and f"384 pictures in 48 shards, {8 * done} done" in said
    check_every_row_once(output, repeat=8)
