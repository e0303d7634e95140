"""Storage that is full or fails: never a row's fault, nothing is lost, and the same command goes on."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fakes import draw, lanes, plan_of, published, run_all, shards_of, workbench

from batchsd import retrying
from batchsd.drive import drive
from batchsd.executor import InProcess
from batchsd.ledger import Ledger
from batchsd.marker import Tally
from batchsd.retrying import patient
from batchsd.stop import Stop
from batchsd.store import LocalStore
from batchsd.types import InfrastructureError, Record, Request

SHARDS = shards_of(8, 4)
PICTURE = 64 * 1024  # bytes: 256 kB a shard, 2 MB in all


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Three megabytes."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(path)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small disk needs the right to mount: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def large(request: Request) -> Record:
    noise = request.seed.to_bytes(8, "little") * (PICTURE // 8)
    return replace(draw(request), image=bytes(a ^ (i >> 8) & 255 for i, a in enumerate(noise)))


def run(root: Path, record: Any) -> Tally:
    ledger, store = Ledger(patient(LocalStore(root))), LocalStore(root)
    plan, executor = ledger.begin(plan_of(SHARDS)), InProcess(partial(workbench, store, partial(lanes, record=record)))
    limits = (Stop(5), 0, lambda at: None, lambda text: None)
    return drive(ledger, plan, ledger.roll_forward(), SHARDS, executor, *limits)


def test_a_full_disk_ends_in_3_and_the_next_run_goes_on(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "WAITS", (0.05, 0.05))
    balloon = disk / "balloon"

    def fills(request: Request) -> Record:
        if request.seed == 14:
            with balloon.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(4096))
        return large(request)

    with pytest.raises(InfrastructureError, match=r"No space left on device \(0 MiB free there\)") as full:
        run(disk / "run", fills)
    assert full.value.exit_code == 3 and str(disk / "run") in str(full.value)
    kept = {path: path.read_bytes() for path in (disk / "run/data").iterdir()}
    assert 2 <= len(kept) < 8
    balloon.unlink()
    tally = run(disk / "run", large)
    assert (tally.rows, tally.ok) == (32, 32)
    assert [key for key, _ in published(disk / "run")] == [f"row{i}" for i in range(32)]
    assert all(path.read_bytes() == content for path, content in kept.items())


class Failing(LocalStore):
    """Every second hand-in fails."""

    calls = 0

    def hand_in(self, folder: str) -> None:
        Failing.calls += 1
        if Failing.calls % 2:
            raise InfrastructureError("Input/output error")
        super().hand_in(folder)


def test_storage_that_comes_back_costs_time_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "WAITS", (0.01, 0.01))
    said: list[str] = []
    store = Failing(tmp_path)
    tally = run_all(store, SHARDS, executor=InProcess(partial(workbench, store)), log=said.append)
    assert (tally.rows, tally.ok) == (32, 32) and not list((tmp_path / "__batchsd").glob("suspects/*"))
    assert any("the storage fails, trying again" in line for line in said)
