"""How far a run is, in numbers and in one line: rows done, failed by kind, pictures a second, time left.

The rate is that of the last minute, since a run may slow down or gain workers while it goes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

WINDOW = 60.0  # seconds


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run at one moment. `done` counts rows finished, failed ones included, committed or not.

    `rate` is in rows a second, 0 while unknown; `seconds` is since this driver's start.
    """

    planned: int
    done: int
    failed: Mapping[str, int]
    shards: int
    shards_done: int
    rate: float
    seconds: float

    @property
    def left(self) -> float | None:
        """Seconds to the end at this rate."""
        return (self.planned - self.done) / self.rate if self.rate else None


class Rate:
    """Rows a second over the last `WINDOW` seconds, from calls with the rows finished so far.

    It begins with the first row: until then workers start and models load.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque()

    def __call__(self, rows: int) -> float:
        now = self._clock()
        if not self._seen and not rows:
            return 0.0
        if not self._seen or now - self._seen[-1][0] >= 1 or rows < self._seen[-1][1]:
            self._seen.append((now, rows))
        while len(self._seen) > 2 and now - self._seen[1][0] > WINDOW:
            self._seen.popleft()
        then, before = self._seen[0]
        return max(0.0, (rows - before) / (now - then)) if now > then else 0.0


def line(at: Snapshot) -> str:
    """`18 of 48 rows, 1 failed (1 oom), 1.4 pictures/s, 21 s left`."""
    parts = [f"{at.done:,} of {at.planned:,} rows", failures(at.failed)]
    if at.left is not None:
        parts += [f"{at.rate:.3g} pictures/s", f"{duration(at.left)} left"]
    return ", ".join(parts)


def failures(failed: Mapping[str, int]) -> str:
    """`0 failed`, or `3 failed (2 oom, 1 nan)`."""
    rejected = failed.get("rejected", 0)
    total = sum(failed.values()) - rejected
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(failed.items()) if count and kind != "rejected")
    said = f"{total:,} failed ({kinds})" if total else "0 failed"
    return f"{said}, {rejected:,} rejected" if rejected else said


def counted(number: int, noun: str) -> str:
    """`1 picture`, `2,000 pictures`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def duration(seconds: float) -> str:
    """`35 s`, `12 min`, `3 h 05 min`, `2 d 4 h`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"
