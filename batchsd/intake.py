"""Rows out of a stream of shards, as they are asked for, from one shard into the next.

At most two shards are open: one more would hold finished pictures back for too long.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from batchsd.types import Request, Shard

Item = tuple[Shard, Iterator[Request]] | None
"""A shard with its rows; None where none is at hand just now."""

OPEN_SHARDS = 2


class Intake:
    """`next` gives a row, `finished` says that one has been handed out."""

    def __init__(self, shards: Iterable[Item]) -> None:
        self._shards = iter(shards)
        self._current: tuple[Shard, Iterator[Request]] | None = None
        self.unfinished: dict[Shard, int] = {}  # rows given and not yet handed out, oldest shard first
        self.exhausted = False  # no more shards will come

    @property
    def dry(self) -> bool:
        """Nothing will come any more."""
        return self.exhausted and self._current is None

    @property
    def oldest(self) -> Shard | None:
        return next(iter(self.unfinished), None)

    def next(self) -> tuple[Shard, Request] | None:
        """A row and its shard; None where there is none just now."""
        while True:
            if self._current is None and not self._open():
                return None
            assert self._current is not None
            shard, requests = self._current
            request = next(requests, None)
            if request is not None:
                self.unfinished[shard] = self.unfinished.get(shard, 0) + 1
                return shard, request
            self._current = None

    def finished(self, shard: Shard) -> None:
        self.unfinished[shard] -= 1
        if not self.unfinished[shard]:
            del self.unfinished[shard]

    def closes(self, shard: Shard, rows: int) -> bool:
        """Whether the shard has been read to its end and waits for no more than so many rows."""
        reading = self._current is not None and self._current[0] == shard
        return not reading and self.unfinished.get(shard, 0) == rows

    def _open(self) -> bool:
        if self.exhausted or len(self.unfinished) >= OPEN_SHARDS:
            return False
        try:
            self._current = next(self._shards)
        except StopIteration:
            self.exhausted = True
        return self._current is not None
