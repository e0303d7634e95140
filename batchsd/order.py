"""Records finish out of row order; a shard's file wants them in order.

A record that is early waits. Its picture waits too, in memory up to `IN_MEMORY` bytes a shard, beyond that in
a temporary file: one slow row in front must not hold a whole shard's pictures in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from tempfile import SpooledTemporaryFile

from batchsd.types import Record

IN_MEMORY = 64 * 2**20


class RowOrder:
    """Takes the records of one shard as they come; gives them as `request.index` counts up from 0."""

    def __init__(self, in_memory: int = IN_MEMORY) -> None:
        self._next = 0
        self._early: dict[int, tuple[Record, int, int]] = {}  # without the picture; where it lies in the file
        self._pictures = SpooledTemporaryFile(max_size=in_memory)  # noqa: SIM115 (lives as long as the shard)

    def put(self, record: Record) -> Iterator[Record]:
        """Every record that is due now, in order: none, or this one and those that waited for it."""
        index = record.request.index
        if index < self._next or index in self._early:
            raise ValueError(f"row {index} of the shard came twice ({record.request.key})")
        if index > self._next:
            self._hold(record)
            return
        yield record
        self._next += 1
        while held := self._early.pop(self._next, None):
            yield self._release(*held)
            self._next += 1
        if not self._early:
            self._pictures.seek(0)
            self._pictures.truncate()

    def close(self) -> None:
        self._pictures.close()

    def _hold(self, record: Record) -> None:
        if record.image is None:
            self._early[record.request.index] = (record, 0, 0)
            return
        start = self._pictures.seek(0, 2)
        self._pictures.write(record.image)
        self._early[record.request.index] = (replace(record, image=None), start, len(record.image))

    def _release(self, record: Record, start: int, size: int) -> Record:
        if size == 0:
            return record
        self._pictures.seek(start)
        return replace(record, image=self._pictures.read(size))
