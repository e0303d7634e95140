"""What the engine did: seconds a stage, network calls, and how full its batches were.

    occupancy = useful lanes / (useful + padded + idle), weighted by latent area

counted for each group of rows (one latent size) until its last row has entered the batch: how a batch runs empty at
the end of a job is a matter of how long its last rows are, not of how well it was kept full.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Meter:
    """Seconds and counts since the engine was made. Its numbers are plain; nothing here touches a picture."""

    seconds: dict[str, float] = field(default_factory=dict)
    network_calls: int = 0
    evaluations: int = 0
    pictures: int = 0
    useful: float = 0.0
    slots: float = 0.0
    _since: dict[Hashable, tuple[float, float]] = field(default_factory=dict)
    _filled: tuple[float, float] = (0.0, 0.0)
    _last: Mapping[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time of the block to that stage."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def called(self, group: Hashable, area: int, used: int, slots: int) -> None:
        """A network call for `used` lanes of the `slots` that it had, at that latent area."""
        self.network_calls += 1
        self.evaluations += used
        self.useful += used * area
        self.slots += slots * area
        useful, whole = self._since.get(group, (0.0, 0.0))
        self._since[group] = (useful + used * area, whole + slots * area)

    def admitted(self, group: Hashable) -> None:
        """A row entered the group's batch: its queue was not empty until now."""
        useful, whole = self._since.pop(group, (0.0, 0.0))
        self._filled = (self._filled[0] + useful, self._filled[1] + whole)

    @property
    def occupancy(self) -> float:
        """As the module says; 1 where no group was ever refilled."""
        useful, whole = self._filled
        return useful / whole if whole else 1.0

    def lap(self) -> dict[str, float]:
        """What came since the last lap, for a shard's marker; `occupancy` is then that of every call in it."""
        now: dict[str, float] = {f"{name}_seconds": value for name, value in self.seconds.items()}
        now |= {"network_calls": self.network_calls, "evaluations": self.evaluations}
        now |= {"useful": self.useful, "slots": self.slots}
        found = {name: value - self._last.get(name, 0) for name, value in now.items()}
        self._last = now
        useful, slots = found.pop("useful"), found.pop("slots")
        found["occupancy"] = useful / slots if slots else 1.0
        return {name: round(value, 3) for name, value in found.items()}
