"""A store whose failures may pass: each operation of the driver is tried three times, with a pause between.

Object stores do the same for each of their requests, so only local folders (a full disk, a quota, a network file
system that comes back) are wrapped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO, TypeVar

from batchsd.store import LocalStore, Store
from batchsd.types import InfrastructureError

Given = TypeVar("Given")

WAITS = (2.0, 10.0)  # seconds between the tries
WAVE = 1024  # small files, read again together where one of them fails


class Retrying:
    """Passes everything on to `store`; raises its InfrastructureError where the last try fails too."""

    def __init__(self, store: Store, waits: Sequence[float]) -> None:
        self.uri = store.uri
        self._store, self._waits = store, waits

    def create_only(self, name: str, data: bytes) -> bool:
        tries = 0

        def create() -> bool:
            nonlocal tries
            tries += 1
            return self._store.create_only(name, data)

        # A try that failed may have come as far as the name: then what stands there is ours.
        return self._tried(create) or (tries > 1 and self._store.read(name) == data)

    def put(self, name: str, data: bytes) -> None:
        self._tried(lambda: self._store.put(name, data))

    def read(self, name: str) -> bytes | None:
        return self._tried(lambda: self._store.read(name))

    def read_each(self, names: Iterable[str]) -> Iterator[bytes | None]:
        waiting = iter(names)
        while wave := list(islice(waiting, WAVE)):
            yield from self._tried(lambda: list(self._store.read_each(wave)))  # noqa: B023 (called at once)

    def open(self, name: str) -> BinaryIO | None:
        return self._tried(lambda: self._store.open(name))

    def entries(self, folder: str) -> Iterator[tuple[str, int]]:
        return iter(self._tried(lambda: list(self._store.entries(folder))))

    def children(self, folder: str) -> list[str]:
        return self._tried(lambda: self._store.children(folder))

    def publish(self, pairs: Sequence[tuple[str, str]]) -> bool:
        return self._tried(lambda: self._store.publish(pairs))

    def remove(self, folder: str) -> None:
        self._tried(lambda: self._store.remove(folder))

    def tidy(self, folder: str) -> None:
        self._store.tidy(folder)

    def scratch(self, folder: str) -> Path:
        return self._store.scratch(folder)

    def hand_in(self, folder: str) -> None:
        self._store.hand_in(folder)

    def _tried(self, operation: Callable[[], Given]) -> Given:
        for wait in self._waits:
            try:
                return operation()
            except InfrastructureError:
                time.sleep(wait)
        return operation()


def patient(store: Store) -> Store:
    """The store, with tries where it has none of its own."""
    return Retrying(store, WAITS) if isinstance(store, LocalStore) else store


class Backoff:
    """Counts failures in a row, of any number of workers; those that come while all wait are the same one."""

    def __init__(self, waits: Sequence[float], clock: Callable[[], float] = time.monotonic) -> None:
        self._waits, self._clock = waits, clock
        self._count, self._until = 0, 0.0

    def failed(self, cause: str) -> float:
        """Seconds to wait before the next try. Raises InfrastructureError where that was the last."""
        now = self._clock()
        if now >= self._until:
            if self._count == len(self._waits):
                raise InfrastructureError(f"{cause} ({self._count + 1} tries)")
            self._until = now + self._waits[self._count]
            self._count += 1
        return self._until - now

    def worked(self) -> None:
        self._count = 0

    @property
    def waiting(self) -> bool:
        return self._clock() < self._until
