"""One run of the engine: which rows are pulled, which group of them walks next, and when latents become pictures.

    pull -> a queue a group -> its lanes -> latents -> VAE (a thread) -> picture -> encoder threads -> Record

A full batch walks before all others, so that groups with few rows gather more meanwhile. Where none is full, rows are
pulled ahead until one is; where no more can be pulled, the group walks that keeps the oldest shard open.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from batchsd.intake import Intake, Item
from batchsd.lanes import Lanes, Row
from batchsd.meter import Meter
from batchsd.network import Group
from batchsd.types import Record, Request, RowError, Shard

# Rows waiting, for each lane. 0, 2, 4: the job of tests/bench/bench_mixed.py has 98.3, 99.1, 99.2 % of its lanes in
# use until its queues are empty, and 20, 9, 5 % more network calls than could be, since the longest rows go first
# at the end. More rows would tell a person less about which one ended a worker.
_CHOICE = 4
_BITE = 16  # rows pulled at a time: their texts make one batch
_MOST_ROWS = 512  # waiting for lanes
_MOST_BYTES = 256 * 2**20  # of their latents, masks and images
_MOST_PIXELS = 256 * 2**20  # bytes of pictures waiting for an encoder thread, before the network waits for them
_NAP_S = 0.005  # between looks for the next shard, when there is nothing to draw


Decoded = tuple[np.ndarray, bool] | RowError
"""A picture H W 3, and whether its latents were finite; or why there is none."""


class Stages(Protocol):
    """What is done to a row or a batch on its way; see `engine.Engine`. The flow decides when."""

    meter: Meter
    decode_batch: int
    encode: Callable[[np.ndarray], tuple[bytes, str]]

    def picture_bytes(self, row: Row) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def capacity(self, group: Group) -> int: ...

    def condition(self, shard: Shard, request: Request) -> Row: ...

    def add_contexts(self, rows: Iterable[Row]) -> None: ...

    def group(self, row: Row) -> Group: ...

    def new_lanes(self, group: Group) -> Lanes: ...

    def tokens_cut(self, request: Request) -> int | None: ...

    def decoding(self, latents_BCHW: Tensor) -> Callable[[], list[Decoded]]: ...


class Flow:
    """What is waiting, walking, decoded and being encoded."""

    def __init__(
        self, engine: Stages, shards: Iterable[Item], decoder: ThreadPoolExecutor, encoders: ThreadPoolExecutor
    ) -> None:
        self.engine = engine
        self.decoder = decoder
        self.encoders = encoders
        self.intake = Intake(shards)
        self.blocked = False  # nothing more can be pulled before a shard is done
        self.waiting: dict[Group, list[Row]] = {}  # oldest first
        self.lanes: dict[Group, Lanes] = {}
        self.latents: dict[tuple[int, ...], list[tuple[Row, Tensor]]] = {}
        self.done: deque[tuple[Shard, Future[tuple[Record, int]] | Record]] = deque()
        self.pixels = 0  # bytes of pictures with the decoder and the encoders

    def run(self) -> Iterator[tuple[Shard, Record]]:
        while True:
            self._pull()
            self._admit()
            busy = [lanes for lanes in self.lanes.values() if lanes.rows]
            if busy:
                self._step(self._next(busy))
            self._decode_what_is_due(last=not busy)
            yield from self._finished(wait=not busy)
            if not (busy or self.latents or self.done):
                if self.intake.dry:
                    return
                time.sleep(_NAP_S)

    # -- pulling

    def _pull(self) -> None:
        """Takes rows, a bite at a time: some to choose from, then more until a batch can be filled.

        Ends early where the limits are reached, or none is at hand.
        """
        rows = sum(map(len, self.waiting.values()))
        held = sum(row.bytes for queue in self.waiting.values() for row in queue)
        more, self.blocked = True, False
        while more and rows < _MOST_ROWS and held < _MOST_BYTES:
            if rows >= _CHOICE * self._most_lanes() and self._can_fill_one():
                return
            bite, more = self._bite()
            self.blocked = not more
            rows += len(bite)
            held += sum(row.bytes for row in bite)
            self.engine.add_contexts(bite)
            for row in bite:
                if row.calls_left:
                    self.waiting.setdefault(self.engine.group(row), []).append(row)
                else:  # nothing to denoise: strength 0
                    latents = row.start().to(self.engine.device)
                    self.latents.setdefault(row.size, []).append((row, latents))

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
                self._fail(shard, request, error)
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
            self.latents.setdefault(row.size, []).append((row, latents))
        for row, error in stepped.failed:
            self._fail(row.shard, row.request, error)

    def _fail(self, shard: Shard, request: Request, error: RowError) -> None:
        self.done.append((shard, Record(request, error.status, str(error))))

    # -- pictures

    def _decode_what_is_due(self, last: bool) -> None:
        """Full batches of latents; fewer where a shard waits for nothing else, or nothing else is to be done."""
        ready = Counter(row.shard for pairs in self.latents.values() for row, _ in pairs)
        ready.update(shard for shard, _ in self.done)
        due = last or any(self.intake.closes(shard, ready[shard]) for shard in self.intake.unfinished)
        for size, pairs in list(self.latents.items()):
            while pairs and (due or len(pairs) >= self.engine.decode_batch):
                self._decode(pairs)
            if not pairs:
                del self.latents[size]

    def _decode(self, pairs: list[tuple[Row, Tensor]]) -> None:
        """Sends the oldest latents of a size to the decoder, and what it makes of them on to the encoders."""
        batch = pairs[: self.engine.decode_batch]
        del pairs[: len(batch)]
        call = self.engine.decoding(torch.stack([latents for _, latents in batch]))
        decoded = self.decoder.submit(call)
        for i, (row, _) in enumerate(batch):
            self.pixels += self.engine.picture_bytes(row)
            self.done.append((row.shard, self.encoders.submit(self._encode, row, decoded, i)))

    def _encode(self, row: Row, decoded: Future[list[Decoded]], i: int) -> tuple[Record, int]:
        """The record of the batch's picture `i`, and what it counted for in `pixels`. Runs in an encoder thread."""
        result, size = decoded.result()[i], self.engine.picture_bytes(row)
        if isinstance(result, RowError):
            return Record(row.request, result.status, str(result)), size
        picture, finite = result
        if row.conditioning.kept is not None:
            picture = row.conditioning.kept.into(picture)
        record = self._record(row.request, picture, finite)
        return replace(record, made=row.conditioning.made), size

    def _record(self, request: Request, picture_HW3: np.ndarray, finite: bool) -> Record:
        height, width = picture_HW3.shape[:2]
        if not finite:
            message = "the network gave numbers that are not finite; try another seed, or model.dtype float32"
            return Record(request, "nan", message)
        if picture_HW3.min() == picture_HW3.max():
            return Record(request, "flat", "every pixel of the picture has one value", height=height, width=width)
        try:
            content, extension = self.engine.encode(picture_HW3)
        except Exception as error:
            return Record(request, "error", f"encoding: {type(error).__name__}: {error}")
        return Record(request, "ok", None, content, extension, height, width)

    def _finished(self, wait: bool) -> Iterator[tuple[Shard, Record]]:
        """Records that are ready; the oldest is waited for where nothing else is to be done, or too much waits."""
        for _ in range(len(self.done)):
            shard, result = self.done.popleft()
            if isinstance(result, Future):
                if not (result.done() or wait or self.pixels > _MOST_PIXELS):
                    self.done.append((shard, result))
                    continue
                with self.engine.meter.stage("wait"):
                    record, size = result.result()
                self.pixels -= size
                self.engine.meter.pictures += 1
            else:
                record = result
            self.intake.finished(shard)
            yield shard, replace(record, tokens_cut=self.engine.tokens_cut(record.request))
