"""`batchsd run` with a null model, poison rows, and a process that ends itself at a named step of the protocol.

    python tests/chaos_driver.py FOLDER STEP batchsd-arguments...

All but the engine is the real thing: command line, lock, plan, Ray actors, reader, sink, ledger. Every row that is
drawn, and every kill, is one line in FOLDER. STEP is for the driver, as `marker: after`; "" is none.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fakes
import null_model
from null_model import picture_of

from batchsd.bench import Source, Workbench
from batchsd.job import pixel_settings
from batchsd.reader import Reader
from batchsd.recipe import Recipe
from batchsd.rows import Names, row_hasher
from batchsd.store import Store, open_store
from batchsd.types import Record, Request, Shard, Sink

SECONDS = 0.02  # a row
KINDS = ("oom", "nan", "flat", "raises", "kills", "hangs")  # what a prompt may ask for
WORKER_STEPS = ("stage: after", "draw: within", "hand_in: before", "hand_in: after")


def write_line(path: Path, **values: Any) -> None:
    """One line, whole, whoever else writes."""
    with open(path, "ab", buffering=0) as file:
        file.write(json.dumps(values).encode() + b"\n")


def end_here(folder: Path, who: str, step: str) -> None:
    write_line(folder / "kills", who=who, step=step)
    os.kill(os.getpid(), signal.SIGKILL)


def once(folder: Path, step: str) -> bool:
    """True for the first that asks, of all processes there will be."""
    try:
        os.close(os.open(folder / f"once-{step.replace(': ', '-')}", os.O_CREAT | os.O_EXCL))
        return True
    except FileExistsError:
        return False


def draw(folder: Path, request: Request) -> Record:
    """What the prompt asks for."""
    if request.error:
        return Record(request, request.error.status, str(request.error))
    write_line(folder / "drawn", key=request.key)
    if request.prompt == "kills":
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
    if request.prompt == "hangs":
        time.sleep(3600)
    if request.prompt == "raises":
        raise RuntimeError("a row that makes the engine raise")
    if request.prompt in ("oom", "nan", "flat"):
        return Record(request, request.prompt, "as planted")
    if int(request.key[2:]) % 20 == 7 and int(request.key[2:]) > 200 and once(folder, "draw: within"):
        end_here(folder, "worker", "draw: within")
    return Record(request, "ok", image=picture_of(request), height=16, width=16)


def generate(folder: Path, sources: Iterable[Source | None]) -> Iterator[tuple[Shard, Record]]:
    return fakes.lanes(sources, seconds=SECONDS, record=partial(draw, folder))


class WorkerStore:
    """A worker's store; the first worker that comes to a step, in the run's second quarter, ends there."""

    def __init__(self, store: Store, folder: Path) -> None:
        self._store, self._folder = store, folder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def scratch(self, folder: str) -> Path:
        path = self._store.scratch(folder)
        self._maybe_end(folder, "stage: after")
        return path

    def hand_in(self, folder: str) -> None:
        self._maybe_end(folder, "hand_in: before")
        self._store.hand_in(folder)
        self._maybe_end(folder, "hand_in: after")

    def _maybe_end(self, folder: str, step: str) -> None:
        shard = int(folder.rpartition("/")[2].partition(".")[0])
        if shard >= 3 * (1 + WORKER_STEPS.index(step)) and once(self._folder, step):
            end_here(self._folder, "worker", step)


def build(folder: Path, recipe: Recipe, names: Names, sink: Sink) -> Workbench:
    write_line(folder / "workers", pid=os.getpid())
    reader = Reader(recipe.manifest, recipe.job, names, row_hasher(recipe.checkpoint, pixel_settings(recipe.job)))
    store: Any = WorkerStore(open_store(recipe.uri), folder)
    return Workbench(partial(generate, folder), reader.read, 1, sink, recipe.schema, store)


class DriverStore:
    """The driver's store, which ends the process at `step`, where it can the second time that it comes there."""

    def __init__(self, store: Store, folder: Path, step: str) -> None:
        self._store, self._folder, self._step = store, folder, step
        self._left = 1 if step.split(":")[0] in ("plan", "lock", "success", "suspects", "status") else 2

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._store, name)
        return partial(self._around, name, operation) if callable(operation) else operation

    def _around(self, operation: str, call: Callable[..., Any], *arguments: Any) -> Any:
        named = what(operation, arguments[0])
        self._maybe_end(f"{named}: before")
        result = call(*arguments)
        self._maybe_end(f"{named}: after")
        return result

    def _maybe_end(self, step: str) -> None:
        if step == self._step:
            self._left -= 1
            if not self._left:
                end_here(self._folder, "driver", step)


def what(operation: str, name: Any) -> str:
    """The step of the protocol that an operation of the store is."""
    if operation == "publish":
        return "publish"
    for part in ("staging", "suspects", "plans", "lock", "status", "SUCCESS", "ledger", "logs"):
        if f"__batchsd/{part}" in str(name) and operation in ("create_only", "put", "remove"):
            names = {"staging": "sweep", "plans": "plan", "ledger": "marker", "SUCCESS": "success", "logs": "log"}
            return names.get(part, part)
    return operation


def main(folder: Path, step: str, arguments: list[str]) -> None:
    from ray import cloudpickle

    from batchsd import cli, prepare, retrying
    from batchsd.deadlines import Patience
    from batchsd.place import Place

    for module in (fakes, null_model):  # the actors cannot import test files
        cloudpickle.register_pickle_by_value(module)
    retrying.WAITS = (0.5, 2.0)
    prepare.patient = lambda store: DriverStore(retrying.patient(store), folder, step)  # type: ignore[assignment]

    def executor(self: Place, recipe: Recipe, log: Callable[[str], None], end: Callable[[str], None]) -> Any:
        from batchsd.seats import RayActors, Reserve

        self.connect().nodes()
        made = partial(build, folder, recipe, recipe.reader().names, recipe.sink())  # without torch: quick to start
        return RayActors(made, 2, Reserve(), log, Patience.of(recipe.job.run.timeout))

    Place.executor = executor  # type: ignore[method-assign]
    sys.argv = ["batchsd", *arguments]
    cli.main()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
