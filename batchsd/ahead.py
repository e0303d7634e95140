"""A function over a stream, some items ahead in threads: what it waits for (disks, stores, the web) costs no time.

    items -> a window of MOST_ITEMS, worked on while results of less than MOST_BYTES wait -> in the items' order

An item's error is raised where its result would have come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from itertools import count, islice
from threading import Condition
from typing import TypeVar

THREADS = 8
MOST_ITEMS = 64
MOST_BYTES = 128 * 2**20  # of results that wait; each thread may bring one more

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class Room:
    """How many bytes wait, and whose turn it is to be taken: that one is always let in, or all would wait for it."""

    bytes: int = 0
    turn: int = 0
    changed: Condition = field(default_factory=Condition)

    def wait(self, number: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.bytes < MOST_BYTES or number <= self.turn)

    def add(self, size: int) -> None:
        with self.changed:
            self.bytes += size

    def taken(self, turn: int, size: int) -> None:
        with self.changed:
            self.bytes, self.turn = self.bytes - size, turn
            self.changed.notify_all()


def ahead(
    work: Callable[[Item], Result], items: Iterable[Item], pool: Executor, size: Callable[[Result], int]
) -> Iterator[Result]:
    """`work` of each item, in order, begun before it is asked for; `size` gives a result's bytes.

    When this is closed, items that were not begun are given up.
    """
    room, numbered = Room(), zip(count(), items)
    waiting: deque[Future[tuple[Result, int]]] = deque()

    def begin(number: int, item: Item) -> tuple[Result, int]:
        room.wait(number)
        result = work(item)
        held = size(result)
        room.add(held)
        return result, held

    try:
        for turn in count():
            for number, item in islice(numbered, MOST_ITEMS - len(waiting)):
                waiting.append(pool.submit(begin, number, item))
            if not waiting:
                return
            room.taken(turn, 0)
            result, held = waiting.popleft().result()
            room.taken(turn, held)
            yield result
    finally:
        for future in waiting:
            future.cancel()
        room.taken(turn + MOST_ITEMS, 0)  # lets those go that wait for room
