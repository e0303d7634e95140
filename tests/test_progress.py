from __future__ import annotations

import pytest

from batchsd.progress import Rate, Snapshot, duration, line


def test_rate_is_that_of_the_last_minute_and_starts_with_the_first_row() -> None:
    now = 0.0
    rate = Rate(lambda: now)
    for _ in range(100):  # the model loads
        now += 1
        assert rate(0) == 0
    rows = 1
    rate(rows)
    for _ in range(200):  # 2 rows a second
        now, rows = now + 1, rows + 2
        found = rate(rows)
    assert found == pytest.approx(2)
    for _ in range(120):  # then 10 a second
        now, rows = now + 1, rows + 10
        found = rate(rows)
    assert found == pytest.approx(10)


def test_line() -> None:
    at = Snapshot(48, 18, {"oom": 1, "nan": 0}, 4, 1, 1.5, 12)
    assert line(at) == "18 of 48 rows, 1 failed (1 oom), 1.5 pictures/s, 20 s left"
    assert line(Snapshot(1000, 0, {}, 4, 0, 0, 1)) == "0 of 1,000 rows, 0 failed"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (99, "99 s"),
        (100, "2 min"),
        (6_000, "1 h 40 min"),
        (11_100, "3 h 05 min"),
        (187_200, "2 d 4 h"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
