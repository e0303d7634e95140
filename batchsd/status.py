"""How far a run is, from its folder alone: markers say what is done, `status.json` what the driver said."""

from __future__ import annotations

import time
from typing import Any

from batchsd.ledger import ledgers
from batchsd.lock import gone, read_lock
from batchsd.marker import sum_of
from batchsd.store import open_store
from batchsd.types import UsageError

SILENT = 90.0  # seconds: three times as long as a driver waits between two words


def read_status(uri: str) -> dict[str, Any]:
    """One flat JSON value. `done` and `failed` count committed rows. Raises UsageError where there is no run.

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
        state = f"dead since {time.strftime('%Y-%m-%d %H:%M', time.localtime(heard))}, run it again"
    rate = said.get("pictures_per_second", 0.0) if state == "running" else 0.0
    return {
        "state": state,
        "reason": said.get("reason", ""),
        "exit_code": said.get("exit_code"),
        "rows": rows,
        "done": tally.rows,
        "ok": tally.ok,
        "failed": dict(tally.failed),
        "left": rows - tally.rows,
        "shards": sum(plan.shards for _, plan in found),
        "shards_done": sum(len(tally.done) for tally in tallies),
        "pictures_per_second": rate,
        "seconds_left": (rows - tally.rows) / rate if rate else None,
        "updated": updated,
        "plans": [plan.hash for _, plan in found],
    }
