from __future__ import annotations

from batchsd.deadlines import Deadline, Patience


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def watched(*pauses: float, patience: Patience = Patience()) -> tuple[Deadline, Clock]:  # noqa: B008
    clock = Clock()
    deadline = Deadline(patience, clock)
    deadline.sign()
    for pause in pauses:
        clock.now += pause
        deadline.sign(long=False)
    return deadline, clock


def overdue_after(deadline: Deadline, clock: Clock, seconds: float) -> bool:
    clock.now += seconds
    return deadline.overdue


def test_two_minutes_at_least_then_ten_of_its_own_pauses() -> None:
    assert not overdue_after(*watched(2, 3, 2), 119)
    assert overdue_after(*watched(2, 3, 2), 121)
    assert not overdue_after(*watched(50, 60, 900, 40, 50), 499)
    assert overdue_after(*watched(50, 60, 900, 40, 50), 501)


def test_a_burst_of_signs_is_no_pace() -> None:
    slow = [item for _ in range(5) for item in (300.0, 0.01, 0.01, 0.01)]
    assert not overdue_after(*watched(*slow), 2900)


def test_the_first_batch_of_a_shape_has_half_an_hour() -> None:
    deadline, clock = watched(2, 2)
    deadline.sign(long=True)
    assert not overdue_after(deadline, clock, 1799)
    deadline.sign()  # a pulse says nothing of what comes next
    assert not overdue_after(deadline, clock, 1799)
    deadline.sign(long=False)
    assert deadline.allowed == 120, "what took long is not its pace"
    assert overdue_after(deadline, clock, 121)


def test_nothing_to_do_is_no_silence() -> None:
    deadline, clock = watched(2)
    deadline.rest()
    assert not overdue_after(deadline, clock, 10_000)
    deadline.sign()
    assert overdue_after(deadline, clock, 121)


def test_the_setting() -> None:
    assert Patience.of("auto") == Patience(120, 1800)
    assert overdue_after(*watched(2, patience=Patience.of(5)), 21) and Patience.of(5).first == 5
    assert not overdue_after(*watched(2, patience=Patience.of(0)), 1e9)
