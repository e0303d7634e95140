from __future__ import annotations

import random

import pytest

from batchsd.poison import DOUBTFUL_DEATHS, Flight, Row, Suspects, recovered
from batchsd.types import InfrastructureError

HERE = {"host": "a", "space": "boot1 pid:[1]", "pid": 7}


def tried(suspects: Suspects, poison: set[Row], worker: int = 0, broken: int = 0) -> int:
    """Let one worker after another draw alone what is to be tried, until nothing is; gives their deaths.

    Each dies of a row in `poison`; the first `broken` of them of any row.
    """
    deaths = 0
    while (row := suspects.next(worker)) is not None:
        if row in poison or deaths < broken:
            suspects.lost(worker, "crashed", f"death {deaths}")
            deaths += 1
            worker += 1
        else:
            suspects.passed(worker, ok=True)
    return deaths


@pytest.mark.parametrize("poison", [{(0, 3)}, {(0, 0)}, {(0, 0), (0, 1)}, {(0, 2), (1, 9)}, set()])
def test_exactly_the_poison_is_condemned_after_three_lone_deaths_each(poison: set[Row]) -> None:
    suspects = Suspects()
    suspects.accuse(0, range(8), "killed")
    suspects.accuse(1, range(5, 10), "killed")
    deaths = tried(suspects, poison)
    assert set(suspects.condemned) == poison
    assert {status for status, _ in suspects.condemned.values()} <= {"crashed"}
    assert 3 * len(poison) <= deaths <= 3 * len(poison) + 2, "at most one before a good row is known, for each"
    assert not suspects.cases and not suspects.trials


def test_a_broken_machine_condemns_nobody() -> None:
    suspects = Suspects()
    suspects.drawn_well(7, 0, 20)
    suspects.accuse(0, range(4), "killed")
    tried(suspects, set(), broken=DOUBTFUL_DEATHS - 1)
    assert not suspects.condemned
    suspects.accuse(0, range(4), "killed")
    with pytest.raises(InfrastructureError, match="5 workers in a row died before .*; last: death"):
        tried(suspects, set(), worker=50, broken=99)
    assert not suspects.condemned


def test_deaths_count_in_a_row_only() -> None:
    """A row that two workers died with, killed by something else, and that then passes is no suspect any more."""
    suspects = Suspects()
    suspects.drawn_well(0, 0, 5)
    for round_ in range(2):
        suspects.accuse(0, [1], "killed")
        for worker in range(10 * round_, 10 * round_ + 2):
            suspects.proven.add(worker)
            assert suspects.next(worker) == (0, 1)
            assert suspects.lost(worker, "crashed", "killed") is None
        suspects.proven.add(99)
        assert suspects.next(99) == (0, 1)
        suspects.passed(99, ok=True)
    assert not suspects.condemned and not suspects.cases


def test_two_workers_never_try_the_same_row() -> None:
    suspects = Suspects()
    suspects.drawn_well(0, 0, 5), suspects.drawn_well(1, 0, 6)
    suspects.accuse(0, [1, 2], "killed")
    assert {suspects.next(0), suspects.next(1)} == {(0, 1), (0, 2)}
    assert suspects.next(2) is None


@pytest.mark.parametrize(
    ("kind", "status"), [("crashed", "crashed"), ("timeout", "timeout"), ("oom", "oom"), ("raised", "error")]
)
def test_the_status_says_how(kind: str, status: str) -> None:
    suspects = Suspects()
    suspects.accuse(0, [1], "")
    for worker in range(3):
        suspects.drawn_well(worker, 0, 0)
        suspects.next(worker)
        suspects.lost(worker, kind, "why")
    assert suspects.verdicts(0) == {1: (status, "ended its worker 3 times while it was drawn alone; last: why")}
    assert suspects.forget(0) and not suspects.verdicts(0)


def test_a_hanging_row_that_is_killed_once_by_another_is_a_timeout() -> None:
    suspects = Suspects()
    suspects.accuse(0, [1], "")
    for worker, kind in enumerate(("timeout", "timeout", "crashed")):
        suspects.drawn_well(worker, 0, 0)
        suspects.next(worker)
        suspects.lost(worker, kind, "why")
    assert suspects.verdicts(0)[1][0] == "timeout"


def test_drivers_that_die_with_the_row_come_to_the_same_verdict() -> None:
    """Every death here is the driver's: all that the next one knows is the file."""
    poison, starts = {(0, 6), (0, 7)}, 0
    noted: dict = {"failures": [], "where": HERE, "flight": {"rows": [[0, list(range(12))]], "trial": None}}
    while True:
        starts += 1
        suspects, _ = recovered(noted, HERE | {"pid": starts})
        row = suspects.next(0)
        while row is not None and row not in poison:
            suspects.passed(0, ok=True)
            row = suspects.next(0)
        if row is None:
            break
        flight = {"rows": [], "trial": [*row, 0 in suspects.proven]}
        noted = {"failures": [], "where": HERE, "flight": flight, **suspects.to_json()}
    assert set(suspects.condemned) == poison
    assert starts == 7, "three lone deaths each, and the start that found no more"


def test_a_machine_that_went_down_accuses_nobody() -> None:
    noted = {"failures": [], "where": HERE, "flight": {"rows": [[0, [1, 2]]], "trial": None}}
    assert recovered(noted, HERE | {"space": "boot2 pid:[1]"})[0].cases == {}
    assert set(recovered(noted, HERE | {"space": "boot1 pid:[9]"})[0].cases) == {(0, 1), (0, 2)}
    elsewhere = HERE | {"host": "b", "space": "boot2 pid:[1]"}
    assert set(recovered(noted, elsewhere)[0].cases) == {(0, 1), (0, 2)}, "a container that was started elsewhere"
    assert recovered(noted | {"flight": None}, HERE)[0].cases == {}


def test_rows_are_noted_before_they_are_asked_and_not_often() -> None:
    now, notes, flying = 0.0, 0, []
    flight, rng = Flight(lambda: now), random.Random(0)
    for row in range(20_000):
        now += 0.001  # a thousand rows a second
        flying = [*rng.sample(flying, min(len(flying), 8)), row]
        if not flight.covers(3, flying):
            notes += 1
            flight.note({3: flying})
        assert flight.covers(3, flying)
    assert notes < 40, "some for the first second, then one a second or two"
    flight.note({3: [5], 4: [1]}, exact={3})
    assert flight.noted[3] == {5} and flight.noted[4] > {1, 2, 3}


def starts(rows: int, poison: set[Row], neighbours: tuple[Row, ...], most: int = 40) -> tuple[Suspects, list[str]]:
    """One process after another, each with the worker inside, until one finds nothing to try; and their troubles."""
    noted: dict = {"failures": [], "where": HERE, "flight": {"rows": [[0, list(range(rows))]], "trial": None}}
    troubles = []
    for start in range(most):
        suspects, _ = recovered(noted, HERE | {"pid": start}, neighbours)
        suspects.cases = {row: case for row, case in suspects.cases.items() if row[1] < rows}
        if suspects.trouble:
            troubles.append(suspects.trouble)
            noted = {"failures": [], "where": HERE, "flight": None, **suspects.to_json()}
            continue
        while (row := suspects.next(0)) is not None and row not in poison:
            suspects.passed(0, ok=True)
        if row is None:
            return suspects, troubles
        flight = {"rows": [], "trial": [*row, 0 in suspects.proven]}
        noted = {"failures": [], "where": HERE, "flight": flight, **suspects.to_json()}
    return suspects, troubles


def test_the_only_row_of_a_run_is_condemned_after_three_deaths_alone() -> None:
    suspects, troubles = starts(1, {(0, 0)}, ((0, 0),))
    assert suspects.condemned[0, 0][0] == "crashed" and not troubles


def test_a_row_that_is_drawn_again_alone_is_proven_by_one_that_nobody_accuses() -> None:
    """`retry` of one row: no other one was drawn, but the run has some, of which one kills too."""
    neighbours = ((0, 0), (0, 1), (0, 2), (0, 3))
    noted = {"failures": [], "where": HERE, "flight": {"rows": [[0, [0]]], "trial": None}}
    suspects, _ = recovered(noted, HERE, neighbours)
    assert suspects.next(0) == (0, 0)
    suspects.lost(0, "crashed", "killed")
    assert suspects.next(0) == (0, 1)
    suspects.lost(0, "crashed", "it kills")
    assert suspects.next(1) == (0, 2)
    suspects.passed(1, ok=False)
    for worker in (1, 2, 3):
        assert suspects.next(worker) == (0, 3), "what failed proves nothing"
        suspects.passed(worker, ok=True)
        assert suspects.next(worker) == (0, 0)
        suspects.lost(worker, "crashed", "killed")
    assert set(suspects.condemned) == {(0, 0)}


def test_a_machine_on_which_every_process_dies_says_so_at_the_fifth_start() -> None:
    """Each takes its driver along; the next one counts."""
    suspects, troubles = starts(2, {(0, 0), (0, 1)}, ((0, 0), (0, 1)), most=7)
    assert troubles and "5 workers in a row died before" in troubles[0] and not suspects.condemned
