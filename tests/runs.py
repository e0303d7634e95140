"""The quickstart as a process on a cluster: begun, watched from its run folder, and checked by another reader."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq

ROOT = Path(__file__).parent.parent
SLOW = 400.0  # seconds that a step may take on a busy machine


def command(output: Path, *options: str) -> list[str]:
    """The quickstart on CPUs, in 12 shards of 4 rows."""
    sets = (f"output.uri={output}", "model.device=cpu", "output.rows_per_shard=4")
    words = [sys.executable, "-m", "batchsd", "run", str(ROOT / "jobs" / "quickstart.toml"), *options]
    for text in sets:
        words += ["--set", text]
    return words


def environment(**more: str) -> dict[str, str]:
    """This one's, with no cluster in it, and the package of this checkout."""
    left_out = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    ours = {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    return {**kept, **ours, **more}


class Started:
    """A process whose words go into a file."""

    def __init__(self, words: Sequence[str], log: Path, environ: Mapping[str, str]) -> None:
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(words, stdout=out, stderr=out, env=dict(environ), cwd=log.parent)

    @property
    def said(self) -> str:
        return self.log.read_text()

    def ends(self, code: int, seconds: float = SLOW) -> str:
        """Waits for it; what it said."""
        found = self.process.wait(seconds)
        assert found == code, f"exit {found}\n{self.said}"
        return self.said

    def until(self, what: Callable[[], object], seconds: float = SLOW) -> None:
        """Waits until `what` holds, while the process lives."""
        end = time.monotonic() + seconds
        while not what():
            assert self.process.poll() is None, f"ended with {self.process.returncode}\n{self.said}"
            assert time.monotonic() < end, f"nothing in {seconds:.0f} s\n{self.said}"
            time.sleep(0.3)


@contextmanager
def started(words: Sequence[str], log: Path, environ: Mapping[str, str]) -> Iterator[Started]:
    run = Started(words, log, environ)
    try:
        yield run
    finally:
        run.process.kill()
        run.process.wait()


def markers(output: Path) -> list[dict]:
    """What is committed."""
    return [json.loads(path.read_text()) for path in sorted(output.glob("__batchsd/ledger/0001/?????.json"))]


def who_drew(output: Path) -> dict[tuple[str, int], int]:
    """Shards by host and process."""
    drawn: dict[tuple[str, int], int] = {}
    for marker in markers(output):
        who = marker["facts"]["host"], marker["facts"]["pid"]
        drawn[who] = drawn.get(who, 0) + 1
    return drawn


def check_every_row_once(output: Path, repeat: int = 1) -> None:
    """The manifest's ids in their order, each with its pictures; `batchsd verify` finds nothing."""
    ids = pq.read_table(ROOT / "jobs" / "quickstart.parquet")["id"].to_pylist()
    files = sorted((output / "data").glob("*.parquet"))
    tables = [pq.read_table(file, columns=["id", "repeat_index", "status", "image"]) for file in files]
    rows = [row for table in tables for row in table.to_pylist()]
    assert [(row["id"], row["repeat_index"]) for row in rows] == [(i, n) for i in ids for n in range(repeat)]
    assert {row["status"] for row in rows} == {"ok"} and all(row["image"]["bytes"] for row in rows)
    words = [sys.executable, "-m", "batchsd", "verify", str(output)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=SLOW)
    assert done.returncode == 0, done.stdout + done.stderr
