"""Kills at every step of a run, found by counting what the run does to its storage: there is no list of steps to keep.

    local disk    each change of a file or folder that Python makes (its audit events)
    S3            each request that changes something

From the n-th on none is carried out any more: what is left is what a SIGKILL would leave.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from batchsd import object_store

CHANGES = {f"os.{name}" for name in ("rename", "link", "symlink", "remove", "rmdir", "mkdir", "truncate")}
READS = ("Get", "Head", "List")


class Killed(BaseException):
    """Nothing catches it, and nothing that would clean up after it reaches the storage."""


class Steps:
    """Counts changes while a run is watched; from the `last` on all of them raise Killed."""

    def __init__(self) -> None:
        self.last: int | None = None
        self.count = 0

    def step(self) -> None:
        if self.last is not None:
            self.count += 1
            if self.count > self.last:
                raise Killed

    def killed_at(self, last: int, run: Callable[[], None]) -> bool:
        """Run until before the change of number `last`, from 0; False where it came to its end."""
        self.last, self.count = last, 0
        try:
            run()
        except Killed:
            return True
        finally:
            self.last = None
        return False


@lru_cache(maxsize=1)
def disk_steps() -> Steps:
    """Audit hooks cannot be taken away again: there is one, asleep between runs."""
    steps = Steps()

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            steps.step()

    sys.addaudithook(watch)
    return steps


def request_steps() -> Steps:
    """Of the process-wide S3 client."""
    steps, client = Steps(), object_store.client()
    real = client._make_api_call

    def call(operation: str, arguments: Any) -> Any:
        if not operation.startswith(READS):
            steps.step()
        elif steps.last is not None and steps.count > steps.last:
            raise Killed
        return real(operation, arguments)

    client._make_api_call = call
    return steps
