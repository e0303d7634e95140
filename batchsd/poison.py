"""Which row killed its worker, or hangs it: suspects are drawn alone, by a worker that has just drawn a good row.

    a worker dies -> the rows that it had are suspects -> each is drawn alone: passes            -> cleared
                                                                               dies, three times -> condemned

A death counts against a row only where the same worker had drawn a row well before; else the worker is to blame.
Where no row was drawn well yet, suspects are drawn all the same; of one that dies so, a neighbour that nobody accuses
is drawn before. The only row of a run has no neighbour: three deaths alone condemn it.
Pure bookkeeping: who dies, and when, is told by the driver.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from batchsd.types import InfrastructureError

Row = tuple[int, int]
"""Index of a shard, and of an output row in it."""

LONE_DEATHS = 3  # in a row, on different workers
DOUBTFUL_DEATHS = 5  # in a row, of workers that had drawn nothing: then no row is to blame
GOOD_ROWS = 64  # remembered
LEAST_AHEAD = 16  # rows noted before they are asked
MOST_AHEAD = 4096

STATUS = {"crashed": "crashed", "timeout": "timeout", "oom": "oom", "raised": "error"}
"""How a worker was lost -> the status of the row that did it."""


@dataclass
class Case:
    """What is held against a row: how its workers ended while it was alone; `doubts`: before they were proven."""

    shard: int
    row: int
    cause: str
    ends: list[str] = field(default_factory=list)
    doubts: int = 0

    @property
    def deaths(self) -> int:
        return len(self.ends)


class Suspects:
    """The open cases, the verdicts, and rows that are known to be good. Workers are numbered as the driver does.

    `neighbours`, where given, are some rows of the run, good ones likely first; `trouble` is what ended the run
    before this one, if its workers died whatever they drew.
    """

    def __init__(self) -> None:
        self.cases: dict[Row, Case] = {}
        self.condemned: dict[Row, tuple[str, str]] = {}  # status, message
        self.good: dict[int, int] = {}  # shard -> a row there that was drawn well
        self.trials: dict[int, Row] = {}  # worker -> the row that it draws alone
        self.proven: set[int] = set()  # workers that have drawn a row well
        self.neighbours: tuple[Row, ...] = ()
        self.trouble = ""
        self._bad_proofs: set[Row] = set()  # neighbours that prove nothing: they failed, or ended a worker too
        self._doubtful = 0

    def accuse(self, shard: int, rows: Iterable[int], cause: str) -> None:
        """A worker was lost while it had these rows."""
        for row in rows:
            if (shard, row) not in self.condemned:
                self.cases.setdefault((shard, row), Case(shard, row, cause))

    def open(self, shard: int) -> bool:
        """Whether a row of the shard is yet to be tried."""
        return any(case.shard == shard for case in self.cases.values())

    def verdicts(self, shard: int) -> dict[int, tuple[str, str]]:
        """The condemned rows of a shard, each with its status and error."""
        return {row: verdict for (index, row), verdict in self.condemned.items() if index == shard}

    def next(self, worker: int) -> Row | None:
        """What this worker, which has nothing else in hand, is to draw alone: a good row first, then suspects."""
        taken = set(self.trials.values())
        open_cases = [case for row, case in self.cases.items() if row not in taken]
        if not open_cases:
            return None
        case = min(open_cases, key=lambda case: (case.deaths, case.doubts))
        row = (case.shard, case.row)
        if worker not in self.proven and (proof := self._proof(case)):
            row = proof
        self.trials[worker] = row
        return row

    def drawn_well(self, worker: int, shard: int, row: int) -> None:
        """A row became a picture: this worker works."""
        self.proven.add(worker)
        self._doubtful = 0
        self.good.pop(shard, None)
        self.good[shard] = row
        while len(self.good) > GOOD_ROWS:
            del self.good[next(iter(self.good))]

    def passed(self, worker: int, ok: bool) -> None:
        """The row on trial did its worker no harm."""
        row = self.trials.pop(worker)
        self.cases.pop(row, None)
        self._doubtful = 0
        if ok:
            self.drawn_well(worker, *row)
        else:
            self._prove_no_more(row)

    def ended(self, worker: int) -> None:
        """The worker is gone for a reason that is no row's, and what it tried with it."""
        self.trials.pop(worker, None)
        self.proven.discard(worker)

    def lost(self, worker: int, kind: str, cause: str) -> Row | None:
        """The worker died in a trial. Gives the row where this was its last one.

        Raises InfrastructureError where workers die whatever they draw.
        """
        row, proven = self.trials[worker], worker in self.proven
        self.ended(worker)
        case = self.cases.get(row)
        if case is not None and proven:
            case.ends.append(kind)
            case.cause = cause
            if case.deaths < LONE_DEATHS:
                return None
            self._condemn(case)
            return row
        if case is not None:
            case.doubts += 1
            if self.neighbours == (row,) and case.doubts >= LONE_DEATHS:
                case.ends, case.cause = [kind] * case.doubts, cause
                self._condemn(case)
                return row
        else:
            self._prove_no_more(row)
        self._doubtful += 1
        if self._doubtful >= DOUBTFUL_DEATHS:
            self._doubtful = 0  # whoever runs it again has mended something
            raise InfrastructureError(
                f"{DOUBTFUL_DEATHS} workers in a row died before they had drawn anything; last: {cause}"
            )
        return None

    def forget(self, shard: int) -> bool:
        """The shard is committed: nothing of it is wanted any more. Whether there was anything."""
        cases = [row for row in (*self.cases, *self.condemned) if row[0] == shard]
        for row in cases:
            self.cases.pop(row, None)
            self.condemned.pop(row, None)
        return bool(cases)

    def _proof(self, case: Case) -> Row | None:
        """A good row, of the same shard where there is one: likely of the same shape. Else one that may be good."""
        known = {index: row for index, row in self.good.items() if (index, row) not in self.cases}
        index = case.shard if case.shard in known else next(reversed(known), None)
        if index is not None:
            return index, known[index]
        if not case.doubts:  # most suspects pass: then no neighbour need be drawn again
            return None
        doubted = self.cases.keys() | self.condemned.keys() | self._bad_proofs
        return next((row for row in self.neighbours if row not in doubted), None)

    def _prove_no_more(self, row: Row) -> None:
        if self.good.get(row[0]) == row[1]:
            del self.good[row[0]]
        self._bad_proofs.add(row)

    def _condemn(self, case: Case) -> None:
        del self.cases[case.shard, case.row]
        message = f"ended its worker {case.deaths} times while it was drawn alone; last: {case.cause}"
        # One of the deaths may have been another's doing.
        kind = Counter(case.ends).most_common(1)[0][0]
        self.condemned[case.shard, case.row] = (STATUS[kind], message)

    # -- between two drivers ------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        return {
            "cases": [asdict(case) for case in self.cases.values()],
            "condemned": [[*row, *verdict] for row, verdict in self.condemned.items()],
            "good": [[shard, row] for shard, row in self.good.items()],
            "bad_proofs": sorted(self._bad_proofs),
            "doubtful": self._doubtful,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Suspects:
        found = cls()
        found.cases = {(case["shard"], case["row"]): Case(**case) for case in values.get("cases", ())}
        found.condemned = {
            (shard, row): (status, message) for shard, row, status, message in values.get("condemned", ())
        }
        found.good = dict(values.get("good", ()))
        found._bad_proofs = {(shard, row) for shard, row in values.get("bad_proofs", ())}
        found._doubtful = values.get("doubtful", 0)
        return found


class Flight:
    """Rows that may be in flight, noted ahead: where workers share the driver's process nobody is left to tell.

    So many rows ahead that a note is made about once a second at most.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.noted: dict[int, set[int]] = {}
        self.trial: tuple[int, int, bool] | None = None  # shard, row, whether a good row had passed
        self._ahead = LEAST_AHEAD
        self._clock = clock
        self._at = clock()

    def covers(self, shard: int, rows: Iterable[int]) -> bool:
        return self.noted.get(shard, set()).issuperset(rows)

    def note(self, in_flight: Mapping[int, Iterable[int]], exact: Container[int] = ()) -> None:
        """All that is in flight now, by shard, and the rows that follow; not in `exact` shards, where most rows are
        not drawn but kept.
        """
        now = self._clock()
        if now - self._at < 1:
            self._ahead = min(MOST_AHEAD, 2 * self._ahead)
        elif now - self._at > LEAST_AHEAD:
            self._ahead = max(LEAST_AHEAD, self._ahead // 2)
        self._at = now
        self.noted = {}
        for shard, rows in in_flight.items():
            held = set(rows)
            following = max(held, default=-1) + 1
            ahead = 0 if shard in exact else self._ahead
            self.noted[shard] = held.union(range(following, following + ahead))

    def to_json(self) -> dict[str, Any]:
        return {"rows": [[shard, sorted(rows)] for shard, rows in self.noted.items()], "trial": self.trial}


def recovered(
    values: Mapping[str, Any], where: Mapping[str, Any], neighbours: tuple[Row, ...] = ()
) -> tuple[Suspects, Counter[int]]:
    """What an earlier driver left (see `Drive`), and how often each shard was cut off without a verdict.

    A `flight` is there only where that driver's process, with the worker in it, ended without a word: its rows
    are suspects. Where the whole machine went down, and began anew, they are not. `where` is `lock.here()`.
    """
    found, flight = Suspects.from_json(values), values.get("flight")
    found.neighbours = neighbours
    if not flight or _began_anew(values["where"], where):
        return found, Counter()
    failures = Counter(dict(values["failures"]))
    cause = "the process ended without a word"
    if flight["trial"]:
        shard, row, proven = flight["trial"]
        found.trials[-1] = (shard, row)
        found.proven |= {-1} if proven else set()
        try:
            if found.lost(-1, "crashed", cause):
                failures.pop(shard, None)
        except InfrastructureError as error:
            found.trouble = str(error)
        return found, failures
    for shard, rows in flight["rows"]:
        found.accuse(shard, rows, cause)
        failures[shard] += 1
    return found, failures


def _began_anew(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether it is the same machine, after another boot."""
    return before["host"] == now["host"] and before["space"].split()[:1] != now["space"].split()[:1]
