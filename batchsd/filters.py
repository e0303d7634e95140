"""The words of `output.filters`: what a picture must pass to stay.

    safety                  a filter that a plugin brings
    clip_score > 0.25       a score of output.scores, or the figures mean and deviation;  > >= < <= ==

Nothing else: a text is matched, never run.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from batchsd.types import UsageError

OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
    "==": operator.eq,
}
NAME = r"[A-Za-z_][\w-]*"
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_TEXT = re.compile(rf"\s*({NAME})\s*(?:(>=|<=|==|>|<)\s*({NUMBER})\s*)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Named:
    """A plugin's filter."""

    name: str


@dataclass(frozen=True, slots=True)
class Bound:
    """A comparison of one number of the picture."""

    name: str
    sign: str
    number: float

    def reason(self, value: float | None) -> str | None:
        """Why a picture with this value is rejected; None where it passes. No number never passes."""
        if value is None or math.isnan(value):
            return f"{self.name} is not a number, wanted {self.sign} {self.number:g}"
        if OPERATORS[self.sign](value, self.number):
            return None
        return f"{self.name} is {value:.6g}, wanted {self.sign} {self.number:g}"

    def gave(self, reason: str) -> bool:
        """Whether this comparison rejected a picture for that reason."""
        return reason.startswith(f"{self.name} is ") and reason.endswith(f", wanted {self.sign} {self.number:g}")


def reason_of(name: str, reason: str) -> str:
    """What a row says that the filter `name` rejected."""
    return f"{name}: {reason}"


def rejected_by(reason: str, filters: Sequence[str]) -> str:
    """Which entry of output.filters gave that reason to reject a picture; "" where none of these did."""
    for text in filters:
        one = parse(text, "output.filters")
        if one.gave(reason) if isinstance(one, Bound) else reason.startswith(reason_of(one.name, "")):
            return text
    return ""


def parse(text: str, where: str) -> Named | Bound:
    """One entry of output.filters. Raises UsageError, beginning with `where`."""
    found = _TEXT.fullmatch(text)
    if not found or (found[3] and not math.isfinite(float(found[3]))):
        raise UsageError(
            f"{where}: {text!r} is not a filter; write a filter's name, or a score and a number: 'clip_score > 0.25' "
            f"(with one of {' '.join(OPERATORS)})"
        )
    return Bound(found[1], found[2], float(found[3])) if found[2] else Named(found[1])
