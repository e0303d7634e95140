"""What plugins say of finished pictures: a `Score` is a column of numbers, a `Filter` rejects.

    Score.of(brightness)                             # brightness(requests, pictures) -> numbers
    Score(load_clip, files=("clip",))                # load_clip(settings, device) -> such a function

Both look only: pixels are not theirs to change. A worker loads each once and calls it with small batches of pictures
of one size, on the device where they were drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from batchsd.types import Request

if TYPE_CHECKING:
    import numpy as np

Settings = Mapping[str, Any]

Pictures = Sequence["np.ndarray"]
"""uint8 arrays of height x width x 3, red first; read only."""

Scorer = Callable[[Sequence[Request], Pictures], Sequence[float | None]]
"""A number a picture; None (a null) where there is none to give."""

Judge = Callable[[Sequence[Request], Pictures], Sequence[str | None]]
"""The reason to reject a picture; None where it may stay."""


@dataclass(frozen=True, eq=False)
class Viewer:
    """What `Score` and `Filter` share.

    `load(settings, device)` runs in the worker, once, and gives the function that looks. `files` are the settings
    that hold a path of a file or folder: batchsd wants them said, looks whether they are there before anything loads,
    and pins their content in the plan. `options` are the other settings, with their defaults. A job says both under
    `[plugin.<name of the plugin>]`; `load` is given these alone, every one of them.
    """

    kind: ClassVar[str]

    load: Callable[[Settings, str], Callable[[Sequence[Request], Pictures], Sequence[Any]]]
    files: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, function: Callable[[Sequence[Request], Pictures], Sequence[Any]]) -> Self:
        """One that has nothing to load and no settings."""
        return cls(lambda settings, device: function)


@dataclass(frozen=True, eq=False)
class Score(Viewer):
    """Gives each picture a number; `load` gives a `Scorer`."""

    kind: ClassVar[str] = "score"


@dataclass(frozen=True, eq=False)
class Filter(Viewer):
    """Gives each picture a reason to be rejected, or None; `load` gives a `Judge`."""

    kind: ClassVar[str] = "filter"


@dataclass(frozen=True, slots=True)
class Verdict:
    """All that was said of one picture. `status` is `ok`, `rejected`, or that of a plugin's failure."""

    scores: Mapping[str, float | None] = field(default_factory=dict)
    status: str = "ok"
    reason: str | None = None
    keeps_picture: bool = True


Verdicts = Callable[[Sequence[Request], Pictures], Sequence[Verdict]]
