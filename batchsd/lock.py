"""One driver at a time on a run folder: a lock file with a heartbeat, taken over when its holder falls silent.

It saves work, no more: that nothing is lost or doubled rests on create-only markers alone. Clocks of two
machines are never compared: whoever waits watches whether the beat changes.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from typing import Any

from batchsd.store import Store
from batchsd.types import InfrastructureError

LOCK = "__batchsd/lock.json"
BEAT_EVERY = 10.0  # seconds
SILENT = 60.0  # seconds without a beat, after which a holder is taken for dead
POLL = 1.0  # seconds
SETTLE = 1.0  # seconds in which of several that take over the last one to write shows


class Lock:
    """Hold it as a context around all that a driver does; `check` raises once another has taken over."""

    def __init__(
        self, store: Store, silent: float = SILENT, beat_every: float = BEAT_EVERY, settle: float = SETTLE
    ) -> None:
        self._store = store
        self._silent, self._beat_every, self._settle = silent, beat_every, settle
        self._nonce = secrets.token_hex(8)
        self._beats = 0
        self._end = threading.Event()
        self._trouble: InfrastructureError | None = None
        self._thread = threading.Thread(target=self._beat_on, name="heartbeat", daemon=True)

    def __enter__(self) -> Lock:
        """Raises InfrastructureError where another driver is alive: found within `silent` seconds."""
        if not self._store.create_only(LOCK, self._claim()):
            self._wait_for_the_dead()
            self._store.put(LOCK, self._claim())
            time.sleep(self._settle)
            if not self._mine():
                raise self._taken()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join(timeout=self._beat_every)
        with suppress(InfrastructureError):  # of a storage that fails now the run knows already
            if self._mine():
                self._store.remove(LOCK)

    def check(self) -> None:
        """Raises InfrastructureError where the lock is lost, or the storage is."""
        if self._trouble is not None:
            raise self._trouble

    def _wait_for_the_dead(self) -> None:
        first, since = read_lock(self._store), time.monotonic()
        while time.monotonic() - since < self._silent:
            now = read_lock(self._store)
            if now is None or gone(now):
                return
            if first is not None and (now["nonce"], now["beat"]) != (first["nonce"], first["beat"]):
                raise self._taken()
            first = now
            time.sleep(min(POLL, self._silent / 10))

    def _beat_on(self) -> None:
        while not self._end.wait(self._beat_every):
            try:
                if not self._mine():
                    self._trouble = self._taken()
                    return
                self._store.put(LOCK, self._claim())
            except InfrastructureError as error:
                self._trouble = error
                return

    def _mine(self) -> bool:
        standing = read_lock(self._store)
        return standing is not None and standing["nonce"] == self._nonce

    def _claim(self) -> bytes:
        self._beats += 1
        values = {**here(), "nonce": self._nonce, "beat": self._beats, "at": round(time.time(), 1)}
        return json.dumps(values).encode()

    def _taken(self) -> InfrastructureError:
        holder = read_lock(self._store) or {}
        return InfrastructureError(
            f"{self._store.uri}: another run (process {holder.get('pid')} on {holder.get('host')}) is at work "
            "here; wait for its end, or stop it and run the same command again"
        )


def read_lock(store: Store) -> dict[str, Any] | None:
    """Who holds the lock, and its last beat."""
    data = store.read(LOCK)
    return None if data is None else json.loads(data)


def here() -> dict[str, Any]:
    """This process, as others may ask after it. `space`: process ids mean nothing in another container."""
    return {"host": socket.gethostname(), "space": process_space(), "pid": os.getpid()}


def process_space() -> str:
    """The kernel's boot and the process namespace, where the kernel tells."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def gone(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that is no more: then nobody need wait."""
    if not holder["space"] or holder["space"] != process_space():
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return zombie(holder["pid"])


def zombie(pid: int) -> bool:
    """Dead, but not yet collected by its parent."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
