"""The chaos run: a job on real Ray actors whose processes are killed in every step of the protocol.

    pytest -m chaos -s          (about ten minutes on two cores)

Rows that kill, hang or make the engine raise are planted. Workers are killed at random and at each of their steps,
the driver at each of its own, the disk is filled once (or the object store fails at random); the same command is
run again until it is through. Then every row must be there once, and exactly the planted ones failed.
"""

from __future__ import annotations

import http.client
import http.server
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chaos_driver import KINDS, WORKER_STEPS
from s3 import moto, point_at

pytestmark = pytest.mark.chaos

HERE = Path(__file__).parent
DRIVER_STEPS = (
    "plan: before", "plan: after", "lock: after", "status: after", "marker: before", "marker: after",
    "publish: after", "sweep: after", "suspects: before", "suspects: after", "log: after", "success: before",
    "success: after",
)  # fmt: skip
LIFE = 300  # seconds, after which a driver that does not come to its step is killed where it is
STATUS = {"raises": "error", "kills": "crashed", "hangs": "timeout", "null": "bad_input"}


class Chaos:
    """One run folder, and all that is done to it. `folder` holds what the processes write down."""

    def __init__(self, folder: Path, uri: str, rows: int, seed: int) -> None:
        self.folder, self.uri, self.rows = folder, uri, rows
        self.rng = random.Random(seed)
        self.planted = self._plant()
        self.ends: Counter[str] = Counter()
        self.said: list[str] = []
        (folder / "job.toml").write_text(
            '[input]\nmanifest = "prompts.parquet"\n[model]\npath = "tiny-scenes"\ndevice = "cpu"\n'
            f'[sampler]\nsteps = 1\n[output]\nuri = "{uri}"\nrows_per_shard = 20\nembed = []\n'
            "[run]\nmax_failed = 1.0\ntimeout = 6\n[ray]\nworkers = 2\n"
        )

    def _plant(self) -> dict[int, str]:
        """Two rows of each kind, one of them near the beginning."""
        kinds = [*KINDS, "null"]
        early = self.rng.sample(range(5, self.rows // 4), len(kinds))
        late = self.rng.sample(range(self.rows // 2, self.rows), len(kinds))
        planted = dict(zip([*early, *late], [*kinds, *kinds], strict=True))
        prompts = [None if (kind := planted.get(i)) == "null" else kind or f"row {i}" for i in range(self.rows)]
        ids = [f"id{i}" for i in range(self.rows)]
        pq.write_table(pa.table({"id": ids, "prompt": prompts}), self.folder / "prompts.parquet")
        return planted

    def lines(self, name: str) -> list[dict]:
        path = self.folder / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @contextmanager
    def driver(self, step: str = "") -> Iterator[subprocess.Popen[str]]:
        script = [sys.executable, str(HERE / "chaos_driver.py"), str(self.folder), step]
        command = [*script, "run", str(self.folder / "job.toml"), "--address", "local"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent}:{HERE}"}
        with open(self.folder / "stderr", "w") as stderr:
            process = subprocess.Popen(command, stdout=stderr, stderr=stderr, text=True, env=environment)
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def live(self, step: str = "", seconds: float = LIFE, killing: bool = True) -> int:
        """One life of the driver; workers are killed at random meanwhile. Gives how it ended."""
        with self.driver(step) as process:
            end, next_kill = time.monotonic() + seconds, time.monotonic() + self.rng.uniform(5, 20)
            while process.poll() is None and time.monotonic() < end:
                time.sleep(0.1)
                if killing and time.monotonic() > next_kill:
                    next_kill = time.monotonic() + self.rng.uniform(8, 25)
                    self._kill_a_worker()
            if process.poll() is None:
                write = {"who": "driver", "step": "at random"}
                with open(self.folder / "kills", "a") as file:
                    file.write(json.dumps(write) + "\n")
        said = (self.folder / "stderr").read_text()
        self.said.append(said)
        code = process.returncode
        self.ends[str(code)] += 1
        assert "Traceback" not in said, said
        return code

    def _kill_a_worker(self) -> None:
        for worker in reversed(self.lines("workers")):
            with suppress(OSError):
                if "ray::" in Path(f"/proc/{worker['pid']}/cmdline").read_text():
                    os.kill(worker["pid"], signal.SIGKILL)
                    with open(self.folder / "kills", "a") as file:
                        file.write(json.dumps({"who": "worker", "step": "at random"}) + "\n")
                    return

    def through(self, in_the_middle: Callable[[], None]) -> int:
        """Every step once, two lives of a random length, then until it is done. Gives the number of starts."""
        starts = 0
        for step in DRIVER_STEPS:
            starts += 1
            if step.startswith("success"):
                while self.live(step) == 3:  # a shard that was killed too often: a retry helps
                    starts += 1
            else:
                self.live(step)
            if step == "publish: after":
                in_the_middle()
                for _ in range(2):
                    starts += 1
                    self.live(seconds=self.rng.uniform(20, 40))
        while (code := self.live(killing=False)) != 0:
            starts += 1
            assert code == 3 and starts < 60, self.said[-1]
        return starts + 1

    def check(self, rows: list[dict]) -> None:
        """Every row once, in order; exactly the planted ones failed; every kill landed where it was to."""
        assert [row["id"] for row in rows] == [f"id{i}" for i in range(self.rows)]
        failed = {i: row["status"] for i, row in enumerate(rows) if row["status"] != "ok"}
        wanted = {i: STATUS.get(kind, kind) for i, kind in self.planted.items()}
        # A row that hangs for seconds, alone, may be killed at random there more often than it is found silent.
        hung = {i for i, status in wanted.items() if status == "timeout" and failed.get(i) == "crashed"}
        assert failed == wanted | dict.fromkeys(hung, "crashed")
        assert all((row["image"] is None) == (i in self.planted) for i, row in enumerate(rows))
        landed = Counter((kill["who"], kill["step"]) for kill in self.lines("kills"))
        missing = [step for step in DRIVER_STEPS if not landed["driver", step]]
        missing += [step for step in WORKER_STEPS if not landed["worker", step]]
        assert not missing, f"no kill landed in {missing}; landed: {landed}"
        assert sum(count for (who, _), count in landed.items() if who == "driver") >= 10
        assert landed["worker", "at random"] >= 3

    def report(self, minutes: float, starts: int) -> str:
        drawn = Counter(line["key"] for line in self.lines("drawn"))
        landed = Counter(f"{kill['who']}, {kill['step']}" for kill in self.lines("kills"))
        kills = "".join(f"\n  {count:3d}  {where}" for where, count in sorted(landed.items()))
        again = sum(count - 1 for count in drawn.values())
        return (
            f"\n{self.uri}: {self.rows} rows, {len(self.planted)} planted; {starts} starts in {minutes:.1f} min, "
            f"{len(self.lines('workers'))} workers; drawn again: {again}; lost 0, doubled 0\n"
            f"drivers ended with {dict(self.ends)}; {sum(landed.values())} kills (poison rows not counted):{kills}"
        )


def batchsd(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    return subprocess.run(
        [sys.executable, "-m", "batchsd", *arguments], capture_output=True, text=True, env=environment, check=False
    )


@contextmanager
def small_disk(path: Path, megabytes: int) -> Iterator[Path]:
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", path], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small disk needs the right to mount: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def fill_the_disk_once(chaos: Chaos, disk: Path) -> None:
    """The run ends by itself with exit 3, naming the path and what is free; nothing is lost."""
    balloon = disk / "balloon"
    done = len(list((disk / "run/__batchsd/ledger/0001").glob("*.json")))
    with chaos.driver() as process:
        while len(list((disk / "run/__batchsd/ledger/0001").glob("*.json"))) < done + 2:
            assert process.poll() is None, (chaos.folder / "stderr").read_text()
            time.sleep(0.05)
        with balloon.open("wb") as file, suppress(OSError):
            while True:
                file.write(bytes(2**20))
        with balloon.open("ab", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(512))
        assert process.wait(timeout=240) == 3
    said = (chaos.folder / "stderr").read_text()
    assert "No space left on device (0 MiB free there)" in said and "Traceback" not in said, said
    chaos.ends["3, the disk was full"] += 1
    balloon.unlink()


def test_on_a_small_local_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 48) as disk:
        chaos = Chaos(tmp_path, f"{disk}/run", rows=2000, seed=int(os.environ.get("CHAOS_SEED", "1")))
        began = time.monotonic()
        starts = chaos.through(lambda: fill_the_disk_once(chaos, disk)) + 1
        files = sorted((disk / "run/data").glob("*.parquet"))
        chaos.check([row for file in files for row in pq.ParquetFile(file).read().to_pylist()])
        assert list((disk / "run/__batchsd/staging").iterdir()) == []
        assert list((disk / "run/__batchsd/suspects").iterdir()) == []
        assert (verified := batchsd("verify", f"{disk}/run")).returncode == 0, verified.stdout + verified.stderr
        assert shutil.disk_usage(disk).used < 40 * 2**20
        print(chaos.report((time.monotonic() - began) / 60, starts))


class Unreliable(http.server.BaseHTTPRequestHandler):
    """Stands before an S3, and fails one request in twenty: before or after it was done, with or without an answer."""

    protocol_version = "HTTP/1.1"
    behind = ""
    rng = random.Random(0)

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fate = self.rng.random()
        if fate < 0.02:
            return self._answer(503, {}, b"<Error><Code>SlowDown</Code></Error>")
        there = http.client.HTTPConnection(self.behind, timeout=60)
        there.request(self.command, self.path, body, dict(self.headers))
        answer = there.getresponse()
        data, headers = answer.read(), dict(answer.getheaders())
        if fate < 0.035:
            return self._answer(500, {}, b"<Error><Code>InternalError</Code></Error>")
        if fate < 0.05:
            self.close_connection = True  # done, but nobody hears of it
            return None
        return self._answer(answer.status, headers, data)

    def _answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("transfer-encoding", "connection", "date", "server", "content-length"):
                self.send_header(name, value)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def unreliable(endpoint: str) -> Iterator[str]:
    Unreliable.behind = urllib.parse.urlsplit(endpoint).netloc
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Unreliable)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()


def test_on_an_object_store_that_fails_at_random(tmp_path: Path) -> None:
    from batchsd import object_store

    with moto() as endpoint, unreliable(endpoint) as flaky, pytest.MonkeyPatch.context() as patch:
        point_at(endpoint, patch)
        object_store.client().create_bucket(Bucket="chaos")
        patch.setenv("AWS_ENDPOINT_URL", flaky)
        chaos = Chaos(tmp_path, "s3://chaos/run", rows=600, seed=int(os.environ.get("CHAOS_SEED", "2")))
        began = time.monotonic()
        starts = chaos.through(lambda: None)
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        object_store.client.cache_clear()
        store = object_store.client()
        pages = store.get_paginator("list_objects_v2").paginate(Bucket="chaos", Prefix="run/")
        names = sorted(found["Key"] for page in pages for found in page["Contents"])
        tables = [name for name in names if name.startswith("run/data/") and name.endswith(".parquet")]
        bodies = [store.get_object(Bucket="chaos", Key=name)["Body"].read() for name in tables]
        chaos.check([row for body in bodies for row in pq.read_table(pa.BufferReader(body)).to_pylist()])
        assert not [name for name in names if "/staging/" in name or "/suspects/" in name]
        assert (verified := batchsd("verify", "s3://chaos/run")).returncode == 0, verified.stdout + verified.stderr
        print(chaos.report((time.monotonic() - began) / 60, starts))
    object_store.client.cache_clear()
