"""How far a run is, from its folder alone: markers say what is done, `status.json` what the driver said."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from batchsd.ledger import ledgers
from batchsd.lock import gone, read_lock
from batchsd.marker import sum_of
from batchsd.progress import duration, failures
from batchsd.store import open_store
from batchsd.types import UsageError

SILENT = 90.0  # seconds: three times as long as a driver waits between two words
LOOK_EVERY = 5.0  # seconds
LEISURE = 20  # a look that took a second is followed by so many of rest: a run may have 100,000 markers


def read_status(uri: str) -> dict[str, Any]:
    """One flat JSON value. Raises UsageError where there is no run.

    `done`, `failed` (by kind) and `rejected` count committed rows.
    `state` is `running`, `stopped`, `failed`, `done`, or `dead since ...` where the driver is no more, or
    neither it nor its lock's heartbeat was heard of for `SILENT` seconds.
    """
    store = open_store(uri)
    found = [(ledger, plan) for ledger in ledgers(store) if (plan := ledger.plan())]
    if not found:
        raise UsageError(f"{uri}: no run of batchsd is here (no plan)")
    first, rows = found[0][0], sum(plan.rows for _, plan in found)
    tallies, said = [ledger.tally() for ledger, _ in found], first.status() or {}
    tally = sum_of(tallies)
    state, updated = said.get("state", "planned"), said.get("updated", 0.0)
    holder = read_lock(store)
    heard = max(updated, holder["at"] if holder else 0.0)
    if state == "running" and (time.time() - heard > SILENT or (holder and gone(holder))):
        # It may have died between its last shard and its last word.
        whole = tally.rows == rows and all(ledger.succeeded() for ledger, _ in found)
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(heard))
        state = "done" if whole else f"dead since {since}, run it again"
    rate = said.get("pictures_per_second", 0.0) if state == "running" else 0.0
    return {
        "state": state,
        "reason": said.get("reason", ""),
        "exit_code": said.get("exit_code"),
        "rows": rows,
        "done": tally.rows,
        **tally.fates(),
        "left": rows - tally.rows,
        "shards": sum(plan.shards for _, plan in found),
        "shards_done": sum(len(tally.done) for tally in tallies),
        "pictures_per_second": rate,
        "seconds_left": (rows - tally.rows) / rate if rate else None,
        "updated": updated,
        "plans": [plan.hash for _, plan in found],
    }


def watch(uri: str, sleep: Callable[[float], None] = time.sleep) -> Iterator[dict[str, Any]]:
    """`read_status` again and again, until the run is no longer at work."""
    while True:
        began = time.monotonic()
        found = read_status(uri)
        yield found
        if found["state"] not in ("running", "planned"):
            return
        sleep(max(LOOK_EVERY, LEISURE * (time.monotonic() - began)))


def lines(found: dict[str, Any]) -> list[str]:
    """A status in a few lines for people."""
    text = [
        f"{found['state']}: {found['done']:,} of {found['rows']:,} rows done, {found['left']:,} left, "
        f"{failures({**found['failed'], 'rejected': found['rejected']})}",
        f"shards: {found['shards_done']:,} of {found['shards']:,}",
    ]
    if found["seconds_left"] is not None:
        text.append(f"{found['pictures_per_second']:.3g} pictures/s, {duration(found['seconds_left'])} left")
    return [*text, *([found["reason"]] if found["reason"] else [])]
