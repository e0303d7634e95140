"""What "done" means: a shard is done when its marker exists; markers are only ever created, never changed.

    marker (create-only) -> publish from that marker's staging folder -> remove the staging folder

Whoever is cut off between two of these steps is finished by the next start (`roll_forward`). Workers write
only into `staging/<shard>.<nonce>/`; a folder there is dead once its shard has a marker of another nonce.

A shard that is built anew gets another marker, `00042.r1.json`; of several the highest revision stands. Plans
are revised in the same way.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from batchsd.marker import Marker, Tally, read_marker, sha256_of, sum_of
from batchsd.plan import Plan, from_json
from batchsd.store import Store
from batchsd.types import InfrastructureError, Shard, ShardResult, UsageError

DATA = "data"
FAILED = "failed"  # where a sink puts a table of failed rows
OURS = "__batchsd"  # `datasets`, Spark and the rest skip names with two underscores in front
STAGING = f"{OURS}/staging"
SUCCESS = f"{OURS}/SUCCESS.json"
STATUS = f"{OURS}/status.json"
PLAN = re.compile(r"\d{4}(?:\.r\d+)?\.json")
MARKER = re.compile(r"(\d{5})(?:\.r(\d+))?\.json")


class Ledger:
    """The plan and the markers of one run folder. Only a driver calls the methods that write."""

    def __init__(self, store: Store, number: int = 1) -> None:
        self.store = store
        self.number = number
        self.folder = f"{OURS}/ledger/{number:04d}"
        self._suspects = f"{OURS}/suspects/{number:04d}.json"
        self._plans: list[Plan] = []

    def plans(self) -> list[Plan]:
        """The plan and its revisions; the last one stands. They are never changed, so each is read once."""
        while data := self.store.read(self._plan_name(len(self._plans))):
            self._plans.append(from_json(data))
        return list(self._plans)

    def plan(self) -> Plan | None:
        """The plan that stands, or None in a folder that has none yet."""
        found = self.plans()
        return found[-1] if found else None

    def revise(self, plan: Plan) -> None:
        """Let this plan stand from now on. Raises InfrastructureError where another driver was faster."""
        self.store.remove(SUCCESS)
        if not self.store.create_only(self._plan_name(len(self.plans())), plan.to_json()):
            raise InfrastructureError(f"{self.store.uri}: another run has just changed the plan; run again")

    def begin(self, plan: Plan) -> Plan:
        """Write the plan into a fresh folder, or find the same one there: the run goes on.

        Raises UsageError where the folder holds another plan (and how it differs) or what is not ours.
        """
        if self.check(plan) is None:
            if self.number > 1:
                self.store.remove(SUCCESS)  # that of the plans before this one
            if not self.store.create_only(self._plan_name(0), plan.to_json()):
                self.check(plan)  # another driver was faster
        return plan

    def check(self, plan: Plan) -> Plan | None:
        """`begin` without writing: the plan that stands, if any, is this one."""
        standing = self.plan()
        if standing is None:
            if self.number == 1:
                self._refuse_foreign()
        elif lines := standing.differences(plan):
            raise UsageError(
                f"{self.store.uri} holds another run; what differs (there -> now):\n  "
                + "\n  ".join(lines)
                + "\nset the old values again to go on with it, or give another output.uri (--new names one); "
                "--update takes up rows that were edited in place or appended"
            )
        return standing

    def markers(self) -> Iterator[Marker]:
        """The marker that stands for each finished shard, in order of shards."""
        highest: dict[int, int] = {}
        for name in self.store.children(self.folder):
            if match := MARKER.fullmatch(name):
                shard, revision = int(match[1]), int(match[2] or 0)
                highest[shard] = max(revision, highest.get(shard, 0))
        names = (self._marker_name(shard, highest[shard]) for shard in sorted(highest))
        for data in self.store.read_each(names):
            assert data is not None, "markers are never removed"
            yield read_marker(data)

    def tally(self) -> Tally:
        total = Tally()
        for marker in self.markers():
            total.add(marker)
        return total

    def roll_forward(self, published: Mapping[str, int] | None = None) -> Tally:
        """Finish every commit that was cut off after its marker; give the sum of all markers.

        `published` is `self.published()`, where it is known.
        Raises UsageError where a published file is gone or has another size and nothing is staged to mend it.
        """
        total = Tally()
        published = self.published() if published is None else published
        staged = set(self.store.children(STAGING))
        for marker in self.markers():
            total.add(marker)
            whole = all(published.get(place_of(file.name)) == file.bytes for file in marker.files)
            if not whole or _staging_name(self.number, marker.shard, marker.nonce) in staged:
                self._publish(marker)
        self._sweep(total.done)
        for folder in ("", OURS, *(f"{OURS}/{name}" for name in ("plans", "attempts", "suspects")), self.folder):
            self.store.tidy(folder)
        return total

    def attempts(self) -> Counter[int]:
        """How many attempts at each unfinished shard have left something in staging."""
        return Counter(shard for shard, _ in self._staged())

    def commit(self, result: ShardResult, attempt: int, plan: Plan, revision: int = 0) -> Marker:
        """Make a staged shard the one that counts, unless another attempt at it already is.

        Gives the marker that stands; repeating the call, at any time, changes nothing.
        """
        shard = result.shard
        marker = Marker(
            shard=shard.index,
            rows=result.rows,
            ok=result.ok,
            failed=dict(result.failed),
            bytes=sum(file.bytes for file in result.files),
            sha256=sha256_of(result.files),
            files=result.files,
            nonce=result.nonce,
            attempt=attempt,
            plan_hash=plan.hash,
            facts=dict(result.facts),
            timings=dict(result.timings),
            revision=revision,
        )
        name = self._marker_name(shard.index, revision)
        if not self.store.create_only(name, json.dumps(asdict(marker), indent=1).encode()):
            marker = self._standing(shard.index)
        self._publish(marker)
        if attempt > 1:
            self._sweep({shard.index})
        return marker

    def finish(self, plan: Plan) -> Tally:
        """Check that the markers cover every shard once and add up to the plan; give their sum.

        The last plan of the run writes SUCCESS.json: those before it were finished first.
        """
        total = self.tally()
        missing = sorted(set(range(plan.shards)) - total.done)
        if missing or len(total.done) != plan.shards or total.rows != plan.rows:
            raise InfrastructureError(
                f"{self.store.uri}: the markers hold {total.rows} of {plan.rows} rows, {len(total.done)} of "
                f"{plan.shards} shards (missing: {missing[:5]}); run the same command again"
            )
        self._sweep(total.done)
        if self.number == (numbers(self.store) or [1])[-1]:
            self._write_success(plan, total)
        return total

    def _write_success(self, plan: Plan, total: Tally) -> None:
        plans, sums = [], []
        for number in range(1, self.number):
            before = Ledger(self.store, number)
            plans.append(before.plan())
            sums.append(before.tally())
        tally = sum_of([*sums, total])
        summary = {
            "plans": [before.hash for before in plans if before is not None] + [plan.hash],
            "shards": sum(len(part.done) for part in (*sums, total)),
            "rows": tally.rows,
            **tally.fates(),
        }
        self.store.put(SUCCESS, json.dumps(summary, indent=1).encode())

    def succeeded(self) -> bool:
        """Whether the run's end was reached with the plan that stands."""
        data, plan = self.store.read(SUCCESS), self.plan()
        return data is not None and plan is not None and plan.hash in json.loads(data)["plans"]

    def write_status(self, values: Mapping[str, Any]) -> None:
        self.store.put(STATUS, json.dumps(values, indent=1).encode())

    def status(self) -> dict[str, Any] | None:
        """What the driver last wrote of itself."""
        data = self.store.read(STATUS)
        return None if data is None else json.loads(data)

    def suspects(self) -> dict[str, Any]:
        """What a driver last wrote of rows that may be poison, and of those in flight (see `poison`)."""
        data = self.store.read(self._suspects)
        return {} if data is None else json.loads(data)

    def write_suspects(self, values: Mapping[str, Any] | None) -> None:
        if values is None:
            self.store.remove(self._suspects)
        else:
            self.store.put(self._suspects, json.dumps(values).encode())

    def log_attempt(self, name: str, text: str) -> str:
        """Keep why an attempt failed, for good; give the file's place."""
        kept = f"{OURS}/logs/{name}.txt"
        self.store.create_only(kept, text.encode())
        return f"{self.store.uri}/{kept}"

    def _refuse_foreign(self) -> None:
        strangers = [name for name in self.store.children("") if name != OURS]
        if strangers:
            raise UsageError(
                f"output.uri: {self.store.uri} is not empty and holds no run of batchsd "
                f"(first: {strangers[0]!r}); nothing was touched: give another folder, or empty it yourself"
            )

    def _plan_name(self, revision: int) -> str:
        return f"{OURS}/plans/{self.number:04d}{_revised(revision)}.json"

    def _marker_name(self, shard: int, revision: int) -> str:
        return f"{self.folder}/{shard:05d}{_revised(revision)}.json"

    def _standing(self, shard: int) -> Marker:
        found = self._marker(shard, 0)
        assert found is not None, shard
        while later := self._marker(shard, found.revision + 1):
            found = later
        return found

    def _marker(self, shard: int, revision: int) -> Marker | None:
        data = self.store.read(self._marker_name(shard, revision))
        return None if data is None else read_marker(data)

    def _publish(self, marker: Marker) -> None:
        staging = f"{STAGING}/{_staging_name(self.number, marker.shard, marker.nonce)}"
        pairs = [(f"{staging}/{file.name}", place_of(file.name)) for file in marker.files]
        if not self.store.publish(pairs):  # moved before, by us or by another driver
            if self._standing(marker.shard).revision > marker.revision:
                return  # another driver has built the shard anew meanwhile
            published = self.published()
            for file in marker.files:
                if published.get(place_of(file.name)) != file.bytes:
                    raise UsageError(
                        f"{self.store.uri}/{place_of(file.name)} was complete, and is missing or changed: put "
                        f"it back, or delete {self._marker_name(marker.shard, marker.revision)} and run again "
                        "to redraw it"
                    )
        self._remove_leftovers(marker)
        self.store.remove(staging)

    def published(self) -> dict[str, int]:
        """Bytes of every published file, by its place in the run folder."""
        return {f"{top}/{name}": size for top in (DATA, FAILED) for name, size in self.store.entries(top)}

    def _remove_leftovers(self, marker: Marker) -> None:
        """Files that the shard had before this revision and has no more.

        Not where another driver has built the shard anew meanwhile: they may be its files. The look comes last, and
        whoever builds a shard anew has waited for the lock of a driver that may stand here.
        """
        before = self._marker(marker.shard, marker.revision - 1) if marker.revision else None
        names = {file.name for file in before.files} - {file.name for file in marker.files} if before else set()
        if names and self._standing(marker.shard).revision == marker.revision:
            for name in names:
                self.store.remove(place_of(name))

    def _sweep(self, done: Iterable[int]) -> None:
        """Remove what attempts left in staging for shards that are committed: nobody can want it any more."""
        done = set(done)
        for shard, name in self._staged():
            if shard in done:
                self.store.remove(f"{STAGING}/{name}")

    def _staged(self) -> Iterator[tuple[int, str]]:
        """(shard, name) of each folder in staging that belongs to this plan."""
        for name in self.store.children(STAGING):
            plan, _, shard = name.partition(".")[0].rpartition("-")
            if plan == _plan_prefix(self.number).rstrip("-"):
                yield int(shard), name


def numbers(store: Store) -> list[int]:
    """The numbers of the run's plans, from 1; none where no run is."""
    found = {name[:4] for name in store.children(f"{OURS}/plans") if PLAN.fullmatch(name)}
    return sorted(int(number) for number in found)


def ledgers(store: Store) -> list[Ledger]:
    """One ledger a plan of the run, in order."""
    return [Ledger(store, number) for number in numbers(store)]


def place_of(name: str) -> str:
    """Where a marker's file is published, relative to the run folder: `failed/...` stays, all else is data."""
    return name if name.startswith(f"{FAILED}/") else f"{DATA}/{name}"


def staging_folder(shard: Shard, nonce: str) -> str:
    """Where an attempt at a shard builds its files, relative to the run folder."""
    return f"{STAGING}/{_staging_name(shard.plan, shard.index, nonce)}"


def _revised(revision: int) -> str:
    return f".r{revision}" if revision else ""


def _staging_name(plan: int, shard: int, nonce: str) -> str:
    return f"{_plan_prefix(plan)}{shard:05d}.{nonce}"


def _plan_prefix(plan: int) -> str:
    return f"p{plan:04d}-" if plan > 1 else ""
