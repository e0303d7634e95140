"""The driver: gives shards out, takes results in, and alone commits them.

    plan -> roll forward -> give out tickets -> commit results -> check that all is there -> SUCCESS

It holds one small entry a shard, whatever the number of rows. Workers may die at any time: what they held
goes out again, under a new nonce.
"""

from __future__ import annotations

import datetime
import os
import secrets
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from batchsd.ledger import Ledger, Tally
from batchsd.plan import Plan
from batchsd.progress import Rate, Snapshot
from batchsd.run import Executor, Ticket
from batchsd.types import BatchsdError, Event, InfrastructureError, Shard, ShardResult

MOST_TRIES = 3  # of one shard, and of starting a worker, in a row
STATUS_EVERY = 30.0  # seconds
WATCH_EVERY = 0.1  # seconds


def nothing() -> None:
    """No lock to look after."""


class TooManyFailed(BatchsdError):
    """The run's `max_failed` is passed. What is committed stays."""


class Stopped(BatchsdError):
    """The run was asked to stop and did so cleanly. Running it again goes on."""

    def __init__(self, reason: str, exit_code: int) -> None:
        super().__init__(f"stopped by {reason}; run the same command again to go on")
        self.exit_code = exit_code


def deadline_of(text: str, now: datetime.datetime) -> float | None:
    """`run.deadline` in seconds since 1970: a date with time, or the next such time of day; None for ""."""
    if not text:
        return None
    if "-" in text:
        return datetime.datetime.fromisoformat(text).timestamp()
    at = datetime.datetime.combine(now.date(), datetime.time.fromisoformat(text))
    return (at if at.timestamp() > now.timestamp() else at + datetime.timedelta(days=1)).timestamp()


@dataclass
class Stop:
    """A request to stop, set by a signal: no new shards; those that are out have `grace` seconds to end.

    At `deadline`, in seconds since 1970, it asks itself.
    """

    grace: float
    deadline: float | None = None
    reason: str = ""
    exit_code: int = 0
    at: float = 0.0

    def ask(self, reason: str, exit_code: int) -> None:
        self.reason, self.exit_code, self.at = reason, exit_code, time.monotonic()

    @property
    def asked(self) -> bool:
        if not self.reason and self.deadline is not None and time.time() >= self.deadline:
            self.ask("run.deadline", 75)
        return bool(self.reason)

    @property
    def overdue(self) -> bool:
        return self.asked and time.monotonic() - self.at > self.grace

    def error(self) -> Stopped:
        return Stopped(self.reason, self.exit_code)


@dataclass
class Out:
    """A ticket that is with a worker."""

    ticket: Ticket
    attempt: int
    ok: int = 0
    failed: int = 0
    in_flight: tuple[str, ...] = ()
    begun: bool = False


@dataclass
class Drive:
    """The dispatcher of one run (see `run.Dispatcher`).

    `todo` are the shards without a marker; `max_failed` is a count of rows; `watch` is called with a Snapshot
    a few times a second; `check_lock` raises where another driver has taken over. `revisions` are the numbers
    of the markers that published shards, built anew, get.
    """

    ledger: Ledger
    plan: Plan
    tally: Tally
    todo: Iterable[Shard]
    workers: int
    max_failed: float
    watch: Callable[[Snapshot], None]
    stop: Stop
    log: Callable[[str], None]
    check_lock: Callable[[], None] = nothing
    revisions: Mapping[int, int] = field(default_factory=dict)
    runs: list[deque[Shard]] = field(init=False)
    out: dict[int, list[Out]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        # Neighbours go to the same worker, which then keeps its place in the manifest.
        todo = list(self.todo)
        share = -(-len(todo) // self.workers)
        self.runs = [deque(todo[i * share : (i + 1) * share]) for i in range(self.workers)]
        self._attempts = self.ledger.attempts()
        self._failures: Counter[int] = Counter()
        self._barren = 0  # workers in a row that ended before they took anything
        self._before = self.tally.rows
        self._rate = Rate()
        self._started = time.monotonic()
        self._status_at = self._started
        self._watched_at = 0.0

    # -- what executors call ------------------------------------------------------------------------------

    def take(self, worker: int) -> Ticket | None:
        if self.stop.asked:
            return None
        mine = self.runs[worker]
        if not mine:
            longest = max(self.runs, key=len)
            for _ in range((len(longest) + 1) // 2):
                mine.appendleft(longest.pop())
        if not mine:
            return None
        shard = mine.popleft()
        self._attempts[shard.index] += 1
        ticket = Ticket(shard, secrets.token_hex(8), self.revisions.get(shard.index, 0))
        self.out.setdefault(worker, []).append(Out(ticket, self._attempts[shard.index]))
        return ticket

    def handle(self, worker: int, event: Event) -> None:
        self._barren = 0
        held = self.out.get(worker, [])
        if isinstance(event, ShardResult):
            for entry in [entry for entry in held if entry.ticket.nonce == event.nonce]:
                held.remove(entry)
                self._commit(event, entry.attempt)
            return
        for entry in held:
            if entry.ticket.shard == event.shard:
                entry.ok += event.ok
                entry.failed += event.failed
                entry.in_flight = event.in_flight
                entry.begun = True

    def lost(self, worker: int, cause: str, log: str) -> None:
        held = self.out.pop(worker, [])
        if not held:
            self._barren += 1
            if self._barren >= MOST_TRIES:
                kept = self.ledger.log_attempt(f"worker-{worker}.{secrets.token_hex(8)}", log)
                raise InfrastructureError(f"no worker can start, {MOST_TRIES} tries: {cause}; all of it in {kept}")
            return
        # A worker that says nothing of its rows was with the ticket that it got first.
        begun = [entry for entry in held if entry.begun] or held[:1]
        for entry in reversed(held):
            self.runs[worker].appendleft(entry.ticket.shard)
        for entry in begun:
            self._blame(entry, cause, log)

    def tick(self) -> None:
        now = time.monotonic()
        if now - self._watched_at >= WATCH_EVERY:
            self._watched_at = now
            self.watch(self.snapshot())
            self.check_lock()
        if now - self._status_at >= STATUS_EVERY:
            self.write_status("running")
        if self.stop.overdue:
            raise self.stop.error()

    @property
    def over(self) -> bool:
        return not any(self.out.values()) and (self.stop.asked or not any(self.runs))

    # -- the rest -----------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        out = [entry for held in self.out.values() for entry in held]
        done = self.tally.rows + sum(entry.ok + entry.failed for entry in out)
        return Snapshot(
            planned=self.plan.rows,
            done=done,
            failed=self.tally.failed + Counter({"in open shards": sum(entry.failed for entry in out)}),
            shards=self.plan.shards,
            shards_done=len(self.tally.done),
            rate=self._rate(done - self._before),
            seconds=time.monotonic() - self._started,
        )

    def write_status(self, state: str, reason: str = "", exit_code: int | None = None) -> None:
        """What `batchsd status` and schedulers read: how far the run is, and why it ended."""
        self.check_lock()
        now = self.snapshot()
        self._status_at = time.monotonic()
        self.ledger.write_status(
            status_values(state, reason, exit_code)
            | {
                "rows": now.planned,
                "done": now.done,
                "failed": {kind: count for kind, count in now.failed.items() if count},
                "pictures_per_second": round(now.rate, 3),
                "seconds": round(now.seconds, 1),
            }
        )

    def _commit(self, result: ShardResult, attempt: int) -> None:
        self.check_lock()
        revision = self.revisions.get(result.shard.index, 0)
        marker = self.ledger.commit(result, attempt, self.plan, revision)
        if marker.shard not in self.tally.done:
            self.tally.add(marker)
        self._failures.pop(marker.shard, None)
        check_failed(self.tally, self.max_failed)

    def _blame(self, entry: Out, cause: str, log: str) -> None:
        shard = entry.ticket.shard
        self._failures[shard.index] += 1
        rows = ", ".join(entry.in_flight[:8]) + (", ..." if len(entry.in_flight) > 8 else "") or "none"
        text = f"{shard.name}, attempt {entry.attempt}: {cause}\nrows in flight: {rows}\n\n{log}"
        kept = self.ledger.log_attempt(f"{shard.index:05d}.{entry.attempt}.{entry.ticket.nonce}", text)
        if self._failures[shard.index] >= MOST_TRIES:
            raise InfrastructureError(
                f"{shard.name} failed {MOST_TRIES} times; last: {cause} (rows in flight: {rows}); all of it in {kept}"
            )
        self.log(f"{shard.name}: attempt {entry.attempt} failed, trying again: {cause}")


def drive(
    ledger: Ledger,
    plan: Plan,
    tally: Tally,
    shards: Iterable[Shard],
    executor: Executor,
    stop: Stop,
    max_failed: float,
    watch: Callable[[Snapshot], None],
    log: Callable[[str], None],
    check_lock: Callable[[], None] = nothing,
    revisions: Mapping[int, int] | None = None,
) -> Tally:
    """Bring a begun plan to its end; `tally` is `ledger.roll_forward()`'s, less the shards in `revisions`.

    Gives what the markers add up to.

    Raises TooManyFailed, Stopped, InfrastructureError, or a worker's UsageError; what was committed stays.
    """
    check_failed(tally, max_failed)
    todo = [shard for shard in shards if shard.index not in tally.done]
    run = Drive(ledger, plan, tally, todo, executor.workers, max_failed, watch, stop, log, check_lock, revisions or {})
    run.write_status("running")
    try:
        executor.run(run)
        if stop.asked and len(tally.done) < plan.shards:
            raise stop.error()
        total = ledger.finish(plan)
    except BatchsdError as error:
        state = "stopped" if isinstance(error, Stopped) else "failed"
        with suppress(InfrastructureError):  # the lock is another's, or the storage fails: the error says so
            run.write_status(state, str(error), error.exit_code)
        raise
    run.write_status("done", exit_code=0)
    return total


def check_failed(tally: Tally, max_failed: float) -> None:
    failed = tally.failed.total()
    if failed > max_failed:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(tally.failed.items()))
        raise TooManyFailed(
            f"{failed} rows failed ({kinds}), run.max_failed allows {max_failed:g}; finished shards are kept "
            "(batchsd run with a higher run.max_failed goes on)"
        )


def status_values(state: str, reason: str = "", exit_code: int | None = None) -> dict[str, Any]:
    return {
        "state": state,
        "reason": reason,
        "exit_code": exit_code,
        "updated": round(time.time(), 1),
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
