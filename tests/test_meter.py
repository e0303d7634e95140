from __future__ import annotations

import pytest

from batchsd.meter import Meter


def test_occupancy_counts_until_the_last_row_came() -> None:
    meter = Meter()
    assert meter.occupancy == 1
    meter.called("small", 1, 16, 16)
    meter.called("large", 4, 8, 16)
    meter.admitted("small")
    meter.admitted("large")
    meter.called("large", 4, 1, 16)  # nothing comes after it: how the batch runs empty
    assert meter.occupancy == pytest.approx((16 + 4 * 8) / (16 + 4 * 16))
    assert (meter.network_calls, meter.evaluations) == (3, 25)


def test_a_lap_is_what_came_since_the_last() -> None:
    meter = Meter()
    with meter.stage("unet"):
        meter.called("a", 2, 3, 4)
    first = meter.lap()
    assert first.pop("unet_seconds") >= 0
    assert first == {"network_calls": 1, "evaluations": 3, "occupancy": 0.75}
    meter.called("a", 2, 4, 4)
    again = meter.lap()
    assert (again["network_calls"], again["evaluations"], again["occupancy"]) == (1, 4, 1.0)
    assert meter.lap()["network_calls"] == 0
