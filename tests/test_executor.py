"""The worker in this process: rows that end it or hang it, each start in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fakes import draw, expected, lanes, published, run_all, shards_of, workbench

from batchsd.deadlines import Patience
from batchsd.executor import InProcess
from batchsd.ledger import Ledger
from batchsd.store import LocalStore
from batchsd.types import InfrastructureError, Record, Request, Shard

SHARDS = shards_of(4, 6)


def die(request: Request) -> Record:
    os.kill(os.getpid(), signal.SIGKILL)
    return draw(request)


def hang(request: Request) -> Record:
    time.sleep(600)
    return draw(request)


def start(root: Path, poison: dict[str, Any], said: Path, shards: Sequence[Shard] = SHARDS) -> int:
    """`batchsd run --local` with an engine in which some rows do more than draw; gives the exit status."""

    def record(request: Request) -> Record:
        return poison.get(request.key, draw)(request)

    def end(reason: str) -> None:
        said.write_text(reason)
        os._exit(3)

    child = os.fork()
    if child == 0:
        try:
            build = partial(workbench, LocalStore(root), partial(lanes, record=record))
            patience = Patience(3, 3) if hang in poison.values() else Patience()
            run_all(LocalStore(root), shards, executor=InProcess(build, patience, end), max_failed=9)
            os._exit(0)
        except InfrastructureError as error:
            end(str(error))
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(
    ("poison", "ends"),
    [
        ({"row8": die}, [-9] * 4 + [0]),  # once with its neighbours, three times alone
        ({"row0": die, "row23": die}, [-9] * 9 + [0]),  # and once alone, before a good row was known
        ({"row8": hang}, [3] * 4 + [0]),
    ],
    ids=["kills", "first and last kill", "hangs"],
)
def test_repeated_starts_find_the_row(tmp_path: Path, poison: dict[str, Any], ends: list[int]) -> None:
    root, said = tmp_path / "run", tmp_path / "said"
    assert [start(root, poison, said) for _ in ends] == ends
    rows = published(root)
    assert [key for key, picture in rows if picture is None] == list(poison)
    assert [row for row in rows if row[0] not in poison] == [row for row in expected(SHARDS) if row[0] not in poison]
    kind = "timeout" if hang in poison.values() else "crashed"
    assert json.loads((root / "__batchsd/SUCCESS.json").read_text())["failed"] == {kind: len(poison)}
    assert list((root / "__batchsd/suspects").iterdir()) == []
    if kind == "timeout":
        assert said.read_text() == "no sign of progress for 3 s; run the same command again: it finds the row by itself"
        logs = [path.read_text() for path in (root / "__batchsd/logs").iterdir()]
        assert all("time.sleep(600)" in log for log in logs), "where it hung"


def test_the_only_row_of_a_run_is_found_too(tmp_path: Path) -> None:
    ends = [-9] * 4 + [0]
    assert [start(tmp_path / "run", {"row0": die}, tmp_path / "said", shards_of(1, 1)) for _ in ends] == ends
    assert published(tmp_path / "run") == [("row0", None)]
    assert Ledger(LocalStore(tmp_path / "run")).tally().failed == {"crashed": 1}


def test_where_all_rows_kill_the_machine_is_named_not_the_rows(tmp_path: Path) -> None:
    everywhere, said = {f"row{i}": die for i in range(24)}, tmp_path / "said"
    codes = [start(tmp_path / "run", everywhere, said) for _ in range(7)]
    assert codes == [-9] * 6 + [3] and "5 workers in a row died before" in said.read_text()
    assert start(tmp_path / "run", {}, said) == 0, "mended"
    assert published(tmp_path / "run") == expected(SHARDS)


def test_a_kill_from_outside_costs_no_row(tmp_path: Path) -> None:
    """The process is killed at every fifth row in turn, as by a user or a machine short of memory."""
    deaths = 0
    for at in range(1, 40, 5):
        drawn = 0

        def count(request: Request, at: int = at) -> Record:
            nonlocal drawn
            drawn += 1
            return die(request) if drawn == at else draw(request)

        poison = {f"row{i}": count for i in range(24)}
        if start(tmp_path, poison, tmp_path / "said") == 0:
            break
        deaths += 1
    assert deaths > 2
    start(tmp_path, {}, tmp_path / "said")
    assert published(tmp_path) == expected(SHARDS)
    assert not Ledger(LocalStore(tmp_path)).tally().failed


def test_a_clean_end_leaves_no_suspects(tmp_path: Path) -> None:
    def refuse(request: Request) -> Record:
        raise KeyboardInterrupt

    poison = {"row8": refuse}
    with pytest.raises(KeyboardInterrupt):
        record = lambda request: poison.get(request.key, draw)(request)  # noqa: E731
        run_all(LocalStore(tmp_path), SHARDS, partial(lanes, record=record))
    assert list((tmp_path / "__batchsd/suspects").iterdir()) == []
