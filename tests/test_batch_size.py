from __future__ import annotations

from pathlib import Path

import pytest
import torch

from batchsd.batch_size import CPU_LANES, MOST_LANES, best_lanes, measured_lanes, room
from batchsd.model.checkpoint import load


def test_room_is_what_one_more_lane_costs() -> None:
    assert room(free=100, peak_of_one=30, peak_of_two=40) == 8
    assert room(free=5, peak_of_one=30, peak_of_two=40) == 1


@pytest.mark.parametrize(
    ("a_call", "a_lane", "most", "found"),
    [
        (1.0, 0.1, 128, 128),  # 128 lanes: 9.3 a second, 64: 8.6
        (1.0, 0.5, 128, 32),  # 32: 1.88, 64: 1.94 is only 3 % more
        (0.0, 1.0, 128, 1),  # no gain at all
        (1.0, 0.1, 9, 8),
        (1.0, 0.0, 1000, MOST_LANES),
    ],
)
def test_lanes_stop_where_they_no_longer_pay(a_call: float, a_lane: float, most: int, found: int) -> None:
    assert best_lanes(most, lambda lanes: a_call + a_lane * lanes) == found


def test_a_call_that_does_not_fit_is_the_limit() -> None:
    def seconds(lanes: int) -> float:
        if lanes > 4:
            raise torch.OutOfMemoryError("no room")
        return 1.0

    assert best_lanes(64, seconds) == 4


def test_a_cpu_has_its_number(checkpoint: Path) -> None:
    assert measured_lanes(load(checkpoint, device="cpu"), (4, 8, 8)) == CPU_LANES
