"""When a silent worker is taken for hung: the time since its last sign of life, against its own pace.

    allowed = max(120 s, 10 x median of the pauses so far), or 30 min where the worker says that it may take long

A pause is the time between two signs while there is work; those below a second say nothing and are left out.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

PAUSES = 64  # remembered
FACTOR = 10


@dataclass(frozen=True)
class Patience:
    """Seconds that a batch may take: at least, and where it is the first of its shape."""

    usual: float = 120.0
    first: float = 1800.0

    @classmethod
    def of(cls, setting: float | str) -> Patience:
        """`run.timeout`: "auto", or seconds for every batch; 0 is for ever."""
        if isinstance(setting, str):
            return cls()
        seconds = setting or float("inf")
        return cls(seconds, seconds)


class Deadline:
    """The watch over one worker. `sign` and `rest` are told by its events; `overdue` asks the clock."""

    def __init__(self, patience: Patience, clock: Callable[[], float] = time.monotonic) -> None:
        self._patience, self._clock = patience, clock
        self._pauses: deque[float] = deque(maxlen=PAUSES)
        self._last: float | None = None
        self._long = False

    def sign(self, long: bool | None = None) -> None:
        """The worker lives and has work; what comes next may take `long` (None: as it was)."""
        now = self._clock()
        if self._last is not None and not self._long and now - self._last >= 1:
            self._pauses.append(now - self._last)
        self._last = now
        self._long = self._long if long is None else long

    def rest(self) -> None:
        """It has nothing to do."""
        self._last, self._long = None, False

    @property
    def allowed(self) -> float:
        usual = self._patience.usual
        if self._pauses:
            usual = max(usual, FACTOR * statistics.median(self._pauses))
        return max(usual, self._patience.first) if self._long else usual

    @property
    def overdue(self) -> bool:
        return self._last is not None and self._clock() - self._last > self.allowed

    @property
    def message(self) -> str:
        return f"no sign of progress for {self.allowed:.0f} s"
