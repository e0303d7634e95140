"""What a driver must remember beyond its own death: open cases, verdicts, and the rows in flight in its process.

One small file, `__batchsd/suspects/0001.json`; it is there only while there is something to remember.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from typing import Any

from batchsd.ledger import Ledger
from batchsd.lock import here
from batchsd.plan import Plan
from batchsd.poison import Flight, Row, Suspects, recovered
from batchsd.types import Progress, Shard


class Memory:
    """Reads and writes the file. `inside`: workers share this process, so rows are noted before they are drawn."""

    def __init__(self, ledger: Ledger, plan: Plan, inside: bool, revised: Container[int] = ()) -> None:
        self._ledger, self._plan, self._revised = ledger, plan, revised
        self._flight = Flight() if inside else None
        self._written = False

    def recall(self, todo: Iterable[Shard], neighbours: tuple[Row, ...] = ()) -> tuple[Suspects, Counter[int]]:
        """What is known of the shards that are still to be drawn; of another plan, nothing."""
        values, rows = self._ledger.suspects(), {shard.index: shard.count * self._plan.repeat for shard in todo}
        if values.get("plan") != self._plan.hash:
            suspects = Suspects()
            suspects.neighbours = neighbours
            return suspects, Counter()
        self._written = True
        suspects, failures = recovered(values, here(), neighbours)
        for shard in {row[0] for row in (*suspects.cases, *suspects.condemned)} - rows.keys():
            suspects.forget(shard)
        # Rows are noted ahead, also beyond a shard's end.
        suspects.cases = {case: held for case, held in suspects.cases.items() if case[1] < rows[case[0]]}
        self.keep(suspects, failures)
        return suspects, failures

    def covers(self, event: Progress) -> bool:
        """Whether all rows that a Progress names were noted."""
        return self._flight is None or self._flight.covers(event.shard.index, event.rows)

    def note(self, in_flight: Mapping[int, Iterable[int]], suspects: Suspects, failures: Counter[int]) -> None:
        assert self._flight is not None
        self._flight.note(in_flight, self._revised)
        self._write(suspects, failures)

    def keep(self, suspects: Suspects, failures: Counter[int], trying: int | None = None) -> None:
        """Write what has changed. `trying`: the worker that begins a trial."""
        if self._flight is not None:
            row = suspects.trials.get(trying) if trying is not None else None
            self._flight.trial = None if row is None else (*row, trying in suspects.proven)
            if row is not None:
                self.landed()
        self._write(suspects, failures)

    def landed(self) -> None:
        """The worker had rows, and has none now."""
        if self._flight is not None:
            self._flight.noted = {}

    def close(self, suspects: Suspects) -> None:
        """Nothing is in flight any more."""
        self._flight = None
        self._write(suspects, Counter())

    def _write(self, suspects: Suspects, failures: Counter[int]) -> None:
        flight = self._flight.to_json() if self._flight is not None else None
        if not (suspects.cases or suspects.condemned or (flight and (flight["rows"] or flight["trial"]))):
            if self._written:
                self._ledger.write_suspects(None)
            self._written = False
            return
        values: dict[str, Any] = {
            "plan": self._plan.hash,
            "where": here(),
            "at": round(time.time(), 1),
            "failures": list(failures.items()),
            "flight": flight,
            **suspects.to_json(),
        }
        self._ledger.write_suspects(values)
        self._written = True
