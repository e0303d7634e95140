"""A run that ends before its end: asked to by a signal or by the clock, or because too many rows failed.

What is in flight when it is asked has `grace` seconds.
"""

from __future__ import annotations

import datetime
import time
from dataclasses import dataclass

from batchsd.marker import Tally
from batchsd.progress import counted
from batchsd.types import BatchsdError


class Stopped(BatchsdError):
    """The run was asked to stop and did so cleanly. Running it again goes on."""

    def __init__(self, reason: str, exit_code: int) -> None:
        super().__init__(f"stopped by {reason}; run the same command again to go on")
        self.exit_code = exit_code


class TooManyFailed(BatchsdError):
    """The run's `max_failed` is passed. What is committed stays."""


class AtOnce(BaseException):
    """Raised by a signal's handler wherever the process is: the grace is over, or the signal came twice.

    No `Exception`, so that nothing on its way takes it for a row's failure.
    """


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
    """A request to stop: no new shards; those that are out have `grace` seconds to end.

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


def too_many_failed(tally: Tally, max_failed: float, then: str) -> TooManyFailed | None:
    """The end of a run in which more rows failed than `max_failed`; `then` says what may be done."""
    failed = tally.failures.total()
    if failed <= max_failed:
        return None
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(tally.failures.items()))
    return TooManyFailed(f"{counted(failed, 'row')} failed ({kinds}), run.max_failed allows {max_failed:g}; {then}")


def check_going(tally: Tally, shards: int, max_failed: float) -> None:
    """Raises TooManyFailed where shards are left to draw; a run that has drawn all is finished first."""
    then = "finished shards are kept (batchsd run with a higher run.max_failed goes on)"
    if len(tally.done) < shards and (error := too_many_failed(tally, max_failed, then)):
        raise error


def all_drawn(tally: Tally, max_failed: float) -> TooManyFailed | None:
    """How a run that has drawn all its shards ends, where too many of its rows failed."""
    return too_many_failed(tally, max_failed, "all others are drawn (batchsd retry draws the failed ones again)")
