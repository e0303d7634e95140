"""The driver's dispatcher: gives shards out, takes results in, and alone commits them.

It holds one small entry a shard, whatever the number of rows. Workers may die at any time: what they held goes out
again, under a new nonce, once the rows that they had in flight were tried alone (see `poison`).
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from batchsd import retrying
from batchsd.bench import Order, Ticket, Trial
from batchsd.executor import Loss
from batchsd.ledger import Ledger
from batchsd.marker import Tally
from batchsd.memory import Memory
from batchsd.plan import Plan
from batchsd.progress import Rate, Snapshot
from batchsd.stop import Stop, check_going
from batchsd.types import Event, InfrastructureError, Shard, ShardResult, Tried

MOST_TRIES = 3  # of starting a worker, in a row
SHARD_TRIES = 5  # of a shard whose workers die, where no row of it dies alone
ALONE_AFTER = 4  # of these, the one in which its rows are drawn one at a time: they may die of each other
SOME = 8  # shards, and rows of each
STATUS_EVERY = 30.0  # seconds
WATCH_EVERY = 0.1  # seconds


def nothing() -> None:
    """No lock to look after."""


@dataclass
class Out:
    """A ticket that is with a worker."""

    ticket: Ticket
    attempt: int
    ok: int = 0
    failed: int = 0
    in_flight: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()
    begun: bool = False


@dataclass
class Drive:
    """The dispatcher of one run (see `executor.Dispatcher`).

    `shards` are all of the plan, by index, `todo` those without a marker; `max_failed` is a count of rows; `watch`
    is called with a Snapshot a few times a second; `check_lock` raises where another driver has taken over.
    `revisions` are the numbers of the markers that published shards, built anew, get. `inside`: workers share this
    process.
    """

    ledger: Ledger
    plan: Plan
    tally: Tally
    shards: Mapping[int, Shard]
    todo: Sequence[Shard]
    workers: int
    max_failed: float
    watch: Callable[[Snapshot], None]
    stop: Stop
    log: Callable[[str], None]
    check_lock: Callable[[], None] = nothing
    revisions: Mapping[int, int] = field(default_factory=dict)
    inside: bool = False
    runs: list[deque[Shard]] = field(init=False)
    out: dict[int, list[Out]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._memory = Memory(self.ledger, self.plan, self.inside, self.revisions)
        self.suspects, self._failures = self._memory.recall(self.todo, self._neighbours())
        self._held = {shard.index: shard for shard in self.todo if self.suspects.open(shard.index)}
        # Neighbours go to the same worker, which then keeps its place in the manifest.
        todo = [shard for shard in self.todo if shard.index not in self._held]
        share = -(-len(todo) // self.workers)
        self.runs = [deque(todo[i * share : (i + 1) * share]) for i in range(self.workers)]
        self._attempts = self.ledger.attempts()
        self._barren = 0  # workers in a row that ended before they took anything
        self._storage = retrying.Backoff(retrying.WAITS)
        self._before = self.tally.rows
        self._rate = Rate()
        self._started = time.monotonic()
        self._status_at = self._started
        self._watched_at = 0.0

    def _neighbours(self) -> tuple[tuple[int, int], ...]:
        """A few rows of finished shards, then of others: to see whether a worker that drew nothing yet works."""
        done = (shard for shard in self.shards.values() if shard.index in self.tally.done)
        some = [*islice(done, SOME), *self.todo[:SOME]]
        rows = ((shard.index, row) for shard in some for row in range(min(SOME, shard.count * self.plan.repeat)))
        return tuple(rows)

    # -- what executors call ------------------------------------------------------------------------------

    def take(self, worker: int) -> Order | None:
        if self.stop.asked or worker in self.suspects.trials or self._storage.waiting:
            return None
        while len(self.runs) <= worker:
            self.runs.append(deque())
        if not self.out.get(worker) and (row := self.suspects.next(worker)):
            self._memory.keep(self.suspects, self._failures, worker)
            return Trial(self.shards[row[0]], row[1])
        mine = self.runs[worker]
        if not mine:
            longest = max(self.runs, key=len)
            for _ in range((len(longest) + 1) // 2):
                mine.appendleft(longest.pop())
        if not mine:
            return None
        shard = mine.popleft()
        index = shard.index
        self._attempts[index] += 1
        verdicts, alone = self.suspects.verdicts(index), self._failures[index] % ALONE_AFTER == ALONE_AFTER - 1
        ticket = Ticket(shard, secrets.token_hex(8), self.revisions.get(index, 0), verdicts, alone)
        self.out.setdefault(worker, []).append(Out(ticket, self._attempts[index]))
        return ticket

    def handle(self, worker: int, event: Event) -> None:
        self._barren = 0
        held = self.out.get(worker, [])
        if isinstance(event, Tried):
            self.suspects.passed(worker, event.ok)
            self._release(worker)
            self._memory.keep(self.suspects, self._failures)
        elif isinstance(event, ShardResult):
            for entry in [entry for entry in held if entry.ticket.nonce == event.nonce]:
                held.remove(entry)
                self._commit(event, entry.attempt)
        else:
            if event.good >= 0:
                self.suspects.drawn_well(worker, event.shard.index, event.good)
            for entry in held:
                if entry.ticket.shard == event.shard:
                    entry.ok += event.ok
                    entry.failed += event.failed
                    entry.in_flight, entry.rows = event.in_flight, event.rows
                    entry.begun = True
            if self.inside and not self._memory.covers(event):
                self._memory.note({e.ticket.shard.index: e.rows for e in held}, self.suspects, self._failures)

    def lost(self, worker: int, loss: Loss) -> float:
        held, trial = self.out.pop(worker, []), self.suspects.trials.get(worker)
        wait = 0.0
        if loss.kind == "storage":
            wait = self._storage.failed(loss.cause)
            self.log(f"the storage fails, trying again in {wait:.0f} s: {loss.cause}")
        if loss.kind == "node":
            self.log(f"worker {worker}: {loss.cause}")
        if loss.kind in ("storage", "node"):
            self.suspects.ended(worker)
        elif trial is not None:
            self._lost_in_trial(worker, trial, loss)
        else:
            self.suspects.ended(worker)
            if not held:
                self._lost_barren(worker, loss)
            # A worker that says nothing of its rows was with the ticket that it got first.
            for entry in [entry for entry in held if entry.begun] or held[:1]:
                self._blame(entry, loss)
        for entry in reversed(held):
            self._held[entry.ticket.shard.index] = entry.ticket.shard
        self._release(worker)
        self._memory.landed()
        self._memory.keep(self.suspects, self._failures)
        return wait

    def fail(self, reason: str) -> None:
        with suppress(InfrastructureError):
            self.write_status("failed", reason, 3)

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
        if any(self.out.values()) or self.suspects.trials:
            return False
        return self.stop.asked or not (any(self.runs) or self._held)

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
                "failed": {kind: count for kind, count in now.failed.items() if count and kind != "rejected"},
                "rejected": self.tally.rejected,
                "pictures_per_second": round(now.rate, 3),
                "seconds": round(now.seconds, 1),
            }
        )

    def _commit(self, result: ShardResult, attempt: int) -> None:
        self.check_lock()
        index = result.shard.index
        marker = self.ledger.commit(result, attempt, self.plan, self.revisions.get(index, 0))
        if marker.shard not in self.tally.done:
            self.tally.add(marker)
        self._failures.pop(index, None)
        self._storage.worked()
        if self.suspects.forget(index):
            self._memory.keep(self.suspects, self._failures)
        check_going(self.tally, self.plan.shards, self.max_failed)

    def _release(self, worker: int) -> None:
        """Shards of which no row is on trial any more are drawn again."""
        for index in [index for index in self._held if not self.suspects.open(index)]:
            self.runs[worker].appendleft(self._held.pop(index))

    def _lost_in_trial(self, worker: int, trial: tuple[int, int], loss: Loss) -> None:
        index, row = trial
        name = f"{self.shards[index].name}, row {row}, alone"
        kept = self._keep_log(f"{index:05d}.row{row}.{secrets.token_hex(8)}", f"{name}: {loss.cause}\n\n{loss.log}")
        if self.suspects.lost(worker, loss.kind, loss.cause):
            self._failures.pop(index, None)
            status, _ = self.suspects.condemned[trial]
            self.log(f"{name}: given up, its status is {status}: {loss.cause} ({kept})")
        else:
            self.log(f"{name}: {loss.cause}")

    def _lost_barren(self, worker: int, loss: Loss) -> None:
        self._barren += 1
        kept = self._keep_log(f"worker-{worker}.{secrets.token_hex(8)}", f"{loss.cause}\n\n{loss.log}")
        if self._barren >= MOST_TRIES:
            raise InfrastructureError(f"no worker can start, {MOST_TRIES} tries: {loss.cause}; all of it in {kept}")

    def _blame(self, entry: Out, loss: Loss) -> None:
        shard = entry.ticket.shard
        self._failures[shard.index] += 1
        rows = ", ".join(entry.in_flight[:8]) + (", ..." if len(entry.in_flight) > 8 else "") or "none"
        text = f"{shard.name}, attempt {entry.attempt}: {loss.cause}\nrows in flight: {rows}\n\n{loss.log}"
        kept = self._keep_log(f"{shard.index:05d}.{entry.attempt}.{entry.ticket.nonce}", text)
        if self._failures[shard.index] >= SHARD_TRIES:
            raise InfrastructureError(
                f"{shard.name} failed {SHARD_TRIES} times, with no row to blame; last: {loss.cause} (rows in flight: "
                f"{rows}); all of it in {kept}"
            )
        self.suspects.accuse(shard.index, entry.rows, loss.cause)
        self.log(f"{shard.name}: attempt {entry.attempt} failed, {len(entry.rows)} rows are drawn alone: {loss.cause}")

    def _keep_log(self, name: str, text: str) -> str:
        try:
            return self.ledger.log_attempt(name, text)
        except InfrastructureError:
            return "no log: the storage fails"

    def close(self) -> None:
        """No row is in flight any more, and this driver is alive to say so."""
        with suppress(InfrastructureError):
            self._memory.close(self.suspects)


def status_values(state: str, reason: str = "", exit_code: int | None = None) -> dict[str, Any]:
    return {
        "state": state,
        "reason": reason,
        "exit_code": exit_code,
        "updated": round(time.time(), 1),
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
