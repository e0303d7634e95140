"""The contracts of scores and filters: tried on a few pictures of two sizes, on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from batchsd.scores import Filter, Score, Viewer
from batchsd.testing.tasks import example_request

if TYPE_CHECKING:
    import numpy as np


def example_pictures(count: int = 3, height: int = 64, width: int = 96) -> list[np.ndarray]:
    """Pictures of one size: soft gradients and noise, each another. uint8 height x width x 3."""
    import numpy as np

    numbers = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width] / max(height, width)
    drawn = []
    for i in range(count):
        slope = numbers.uniform(-200, 200, (2, 3))
        noise = numbers.normal(0, 20, (height, width, 3))
        picture = 60 + 40 * i + y[..., None] * slope[0] + x[..., None] * slope[1] + noise
        drawn.append(np.clip(picture, 0, 255).astype(np.uint8))
    return drawn


def check_score(score: Score, settings: Mapping[str, Any] | None = None, tolerance: float = 1e-3) -> None:
    """A score's promises; `settings` are those that a job would say (paths of `files` among them).

    It gives one number (or None) a picture: the same each time, and, within `tolerance`, whatever other pictures
    come with it; it leaves the pictures and the global random states alone; it takes any size and a single picture.
    """
    assert isinstance(score, Score), f"{score!r} is not a batchsd.Score; a function is wrapped: Score.of(function)"
    _check(score, settings, lambda one, other: _near(one, other, tolerance), _number)


def check_filter(filter: Filter, settings: Mapping[str, Any] | None = None) -> None:
    """A filter's promises: as `check_score`, with a reason (a text that is not empty) or None for each picture."""
    assert isinstance(filter, Filter), f"{filter!r} is not a batchsd.Filter; a function is wrapped: Filter.of(function)"
    _check(filter, settings, lambda one, other: one == other, _reason)


def _check(
    viewer: Viewer,
    settings: Mapping[str, Any] | None,
    same: Callable[[Any, Any], bool],
    checked: Callable[[Any], Any],
) -> None:
    said = dict(settings or {})
    missing = [key for key in viewer.files if key not in said]
    assert not missing, f"the settings {missing} are in `files`: give them, as a job would"
    unknown = sorted(set(said) - {*viewer.files, *viewer.options})
    assert not unknown, f"{unknown} are neither in `files` nor in `options`"
    look = viewer.load({**viewer.options, **said}, "cpu")
    assert callable(look), f"load gave {type(look).__name__}, not a function of (requests, pictures)"

    def ask(pictures: Sequence[np.ndarray]) -> list[Any]:
        answers = list(look([example_request(index=i) for i in range(len(pictures))], pictures))
        assert len(answers) == len(pictures), f"{len(answers)} answers for {len(pictures)} pictures"
        return [checked(answer) for answer in answers]

    for height, width in ((64, 96), (40, 40)):
        pictures = example_pictures(3, height, width)
        kept = [picture.copy() for picture in pictures]
        states = _random_states()
        together = ask(pictures)
        assert _random_states() == states, "it drew from a global random generator: a picture's word is no dice"
        assert all((now == then).all() for now, then in zip(pictures, kept, strict=True)), "it changed a picture"
        for i, picture in enumerate(pictures):
            (alone,) = ask([picture])
            assert same(alone, together[i]), f"picture {i} gets {alone!r} alone and {together[i]!r} among others"


def _near(one: float | None, other: float | None, tolerance: float) -> bool:
    return one == other or (one is not None and other is not None and math.isclose(one, other, abs_tol=tolerance))


def _number(answer: Any) -> float | None:
    if answer is None:
        return None
    value = answer.item() if getattr(answer, "ndim", None) == 0 else answer
    assert isinstance(value, int | float) and not isinstance(value, bool), f"{answer!r} is not a number or None"
    assert math.isfinite(value), f"{value} is not finite; give None where there is no number"
    return float(value)


def _reason(answer: Any) -> str | None:
    assert answer is None or (isinstance(answer, str) and answer), f"{answer!r} is not a reason (a text) or None"
    return answer


def _random_states() -> tuple[Any, ...]:
    import random

    import numpy as np
    import torch

    return random.getstate(), repr(np.random.get_state()), torch.get_rng_state().numpy().tobytes()
