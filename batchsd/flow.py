"""One run of the engine: which rows are pulled, which group of them walks next, and when latents become pictures.

    pull -> a queue a group -> its lanes -> latents -> `pictures`

A full batch walks before all others, so that groups with few rows gather more meanwhile. Where none is full, rows are
pulled ahead until one is; where no more can be pulled, the group walks that keeps the oldest shard open.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Protocol

import torch

from batchsd.intake import Intake, Item
from batchsd.lanes import Lanes, Row
from batchsd.meter import Meter
from batchsd.network import Group
from batchsd.pictures import Pictures
from batchsd.types import Record, Request, RowError, Shard

# Rows waiting, for each lane. 0, 2, 4: the job of tests/bench/bench_mixed.py has 98.3, 99.1, 99.2 % of its lanes in
# use until its queues are empty, and 20, 9, 5 % more network calls than could be, since the longest rows go first
# at the end. More rows would tell a person less about which one ended a worker.
_CHOICE = 4
_BITE = 16  # rows pulled at a time: their texts make one batch
_MOST_ROWS = 512  # waiting for lanes
_MOST_BYTES = 512 * 2**20  # of their latents, masks, images and text states
_NAP_S = 0.005  # between looks for the next shard, when there is nothing to draw


class Stages(Protocol):
    """What is done to a row or a batch on its way; see `engine.Engine`. The flow decides when."""

    meter: Meter

    @property
    def device(self) -> torch.device: ...

    def capacity(self, group: Group) -> int: ...

    def condition(self, shard: Shard, request: Request) -> Row: ...

    def add_contexts(self, rows: Iterable[Row]) -> Mapping[Row, RowError]: ...

    def group(self, row: Row) -> Group: ...

    def new_lanes(self, group: Group) -> Lanes: ...

    def tokens_cut(self, request: Request) -> int | None: ...


class Flow:
    """What is waiting and what is walking; what has arrived is with `pictures`."""

    def __init__(self, engine: Stages, shards: Iterable[Item], pictures: Pictures) -> None:
        self.engine = engine
        self.pictures = pictures
        self.intake = Intake(shards)
        self.blocked = False  # nothing more can be pulled before a shard is done
        self.waiting: dict[Group, list[Row]] = {}  # oldest first
        self.lanes: dict[Group, Lanes] = {}

    def run(self) -> Iterator[tuple[Shard, Record]]:
        while True:
            self._pull()
            self._admit()
            busy = [lanes for lanes in self.lanes.values() if lanes.rows]
            if busy:
                self._step(self._next(busy))
            self.pictures.decode(not busy or self._shard_waits())
            for shard, record in self.pictures.finished(wait=not busy):
                self.intake.finished(shard)
                yield shard, replace(record, tokens_cut=self.engine.tokens_cut(record.request))
            if not (busy or self.pictures):
                if self.intake.dry:
                    return
                time.sleep(_NAP_S)

    # -- pulling

    def _pull(self) -> None:
        """Takes rows, a bite at a time: some to choose from, then more until a batch can be filled.

        Ends early where the limits are reached, or none is at hand.
        """
        rows = sum(map(len, self.waiting.values()))
        more, self.blocked = True, False
        while more and rows < _MOST_ROWS and self._held() < _MOST_BYTES:
            if rows >= _CHOICE * self._most_lanes() and self._can_fill_one():
                return
            bite, more = self._bite()
            self.blocked = not more
            rows += len(bite)
            failed = self.engine.add_contexts(bite)
            for row in bite:
                if row in failed:
                    self.pictures.fail(row.shard, row.request, failed[row])
                elif row.calls_left:
                    self.waiting.setdefault(self.engine.group(row), []).append(row)
                else:  # nothing to denoise: strength 0
                    self.pictures.take(row, row.start().to(self.engine.device))

    def _held(self) -> int:
        """Bytes of the rows that wait, and of their text states, which some share."""
        rows = [row for queue in self.waiting.values() for row in queue]
        states = {id(states_TD): states_TD.nbytes for row in rows for states_TD in row.contexts}
        return sum(row.bytes for row in rows) + sum(states.values())

    def _bite(self) -> tuple[list[Row], bool]:
        """Some rows, and whether there may be more at once."""
        bite: list[Row] = []
        while len(bite) < _BITE:
            found = self.intake.next()
            if found is None:
                return bite, False
            shard, request = found
            try:
                bite.append(self.engine.condition(shard, request))
            except RowError as error:
                self.pictures.fail(shard, request, error)
        return bite, True

    def _most_lanes(self) -> int:
        return max((self.engine.capacity(group) for group in self.waiting), default=1)

    def _can_fill_one(self) -> bool:
        capacity = self.engine.capacity
        wanted = {group: sum(row.lanes for row in rows) for group, rows in self.waiting.items()}
        return any(
            wanted.get(group, 0) + (lanes.used if lanes else 0) >= capacity(group)
            for group, lanes in {**dict.fromkeys(wanted), **self.lanes}.items()
        )

    # -- denoising

    def _admit(self) -> None:
        """Fills free lanes with the oldest rows that fit.

        Where no more can be pulled: first those that keep the oldest shard open, and of these the longest, so that
        none is left to walk alone at the end.
        """
        for group, rows in self.waiting.items():
            if rows and group not in self.lanes:
                self.lanes[group] = self.engine.new_lanes(group)
            if self.blocked:
                rows.sort(key=lambda row: (row.shard != self.intake.oldest, -row.calls_left))
            i = 0
            while i < len(rows):
                if self.lanes[group].fits(rows[i]):
                    self.lanes[group].admit(rows.pop(i))
                    self.engine.meter.admitted(group)
                else:
                    i += 1

    def _next(self, busy: list[Lanes]) -> Lanes:
        """The group that walks next. Equals: the one whose first row has been here longest."""
        oldest = self.intake.oldest

        def rank(lanes: Lanes) -> tuple[bool, bool, float]:
            # What still waits after `_admit` does not fit: then the batch is as full as it can be.
            full = lanes.used >= lanes.capacity or bool(self.waiting.get(lanes.group))
            return full, any(row.shard == oldest for row in lanes.rows), lanes.used / lanes.capacity

        return max(busy, key=rank)

    def _step(self, lanes: Lanes) -> None:
        with self.engine.meter.stage("unet"):
            stepped = lanes.step()
        for row, latents in stepped.finished:
            self.pictures.take(row, latents)
        for row, error in stepped.failed:
            self.pictures.fail(row.shard, row.request, error)

    def _shard_waits(self) -> bool:
        """Whether a shard has no rows left but those that are to be decoded: it should not stay open for more."""
        here = self.pictures.rows()
        return any(self.intake.closes(shard, here[shard]) for shard in self.intake.unfinished)
