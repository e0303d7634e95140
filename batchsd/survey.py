"""One pass over a run's rows without their pictures: numbers, failures, and which pictures a report shows.

A bounded part of a large run is read, whole shards spread evenly over it. What a sheet shows is chosen while rows
pass by (reservoirs, heaps), so that only places are kept: (number of the shard, row in it).
"""

from __future__ import annotations

import heapq
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from random import Random
from typing import Any

from batchsd.alike import groups
from batchsd.filters import rejected_by
from batchsd.published import Row
from batchsd.reread import WrittenShard, rows
from batchsd.values import SCORE

Place = tuple[int, int]

KEYS = 12  # rows that are named, a kind of failure
MOST, EACH = 120, 24  # pictures of the random sheet, of any other
BUDGETS = {"sampler": 96, "guidance": 72, "score": 96, "rejected": 48}  # pictures of all sheets of a kind
GROUP, GROUPS = 6, 12  # pictures of a group that look alike, and groups
GUIDANCE = ((0, 1), (1, 3), (3, 6), (6, 10), (10, float("inf")))
NUMBERS = ("mean", "deviation", "steps", "guidance_scale", "tokens_cut")
COUNTS = ("scheduler", "task", "width x height")


@dataclass(frozen=True, slots=True)
class Sheet:
    """Places of pictures under a title; `seen` is of how many. `values`, where given, are what they are shown for."""

    title: str
    seen: int
    places: Sequence[Place]
    values: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """A row without a picture that passed: what people call it, what was said, what was asked."""

    key: str
    error: str
    ours: Mapping[str, Any]


@dataclass
class Sample:
    """`most` of a stream, all equally likely (reservoir sampling)."""

    most: int
    random: Random
    seen: int = 0
    kept: list[Place] = field(default_factory=list)

    def add(self, place: Place) -> None:
        self.seen += 1
        if len(self.kept) < self.most:
            self.kept.append(place)
        elif (i := self.random.randrange(self.seen)) < self.most:
            self.kept[i] = place

    def some(self, count: int) -> list[Place]:
        """At most `count` of them, in the run's order."""
        return sorted(self.random.sample(self.kept, min(count, len(self.kept))))


@dataclass
class Ends:
    """The places of the `EACH` highest and lowest values of a score."""

    seen: int = 0
    high: list[tuple[float, Place]] = field(default_factory=list)
    low: list[tuple[float, Place]] = field(default_factory=list)

    def add(self, value: float, place: Place) -> None:
        self.seen += 1
        for heap, key in ((self.high, value), (self.low, -value)):
            (heapq.heappush if len(heap) < EACH else heapq.heappushpop)(heap, (key, place))

    def sheets(self, name: str, count: int) -> Iterator[Sheet]:
        for title, heap, sign in (("Highest", self.high, 1), ("Lowest", self.low, -1)):
            pairs = sorted(heap, key=lambda pair: (-pair[0], pair[1]))[:count]
            places, values = [place for _, place in pairs], [sign * value for value, _ in pairs]
            yield Sheet(f"{title} {name}", self.seen, places, values)


@dataclass
class Survey:
    """What passed by. `filters` are the job's; `rows` of them were read; `numbers` are of all that were drawn."""

    random: Random
    filters: Sequence[str] = ()
    rows: int = 0
    pictures: int = 0
    numbers: dict[str, array[float]] = field(default_factory=lambda: defaultdict(lambda: array("d")))
    counts: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in COUNTS})
    ended: dict[str, list[Ended]] = field(default_factory=lambda: defaultdict(list))
    rejected: Counter[str] = field(default_factory=Counter)
    everything: Sample = field(init=False)
    parts: dict[str, dict[str, Sample]] = field(default_factory=lambda: defaultdict(dict))
    scores: dict[str, Ends] = field(default_factory=lambda: defaultdict(Ends))
    hashes: list[str] = field(default_factory=list)
    hashed: list[Place] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.everything = Sample(MOST, self.random)

    def add(self, place: Place, key: str, ours: Mapping[str, Any]) -> None:
        self.rows += 1
        status = ours["status"]
        if status != "ok":
            self.end(key, ours)
        if status not in ("ok", "rejected"):
            return
        for name, value in ours.items():
            if value is not None and (name in NUMBERS or name.startswith(SCORE)):
                self.numbers[name.removeprefix(SCORE)].append(value)
        counted = {"width x height": f"{ours['width']} x {ours['height']}", **ours}
        for name in COUNTS:
            self.counts[name][counted[name]] += 1
        if ours["image"] is not None:
            self._show(place, ours)

    def end(self, key: str, ours: Mapping[str, Any]) -> None:
        """A row that failed, or that a filter rejected; the first ones of a kind are named."""
        kind, error = ours["status"], ours["error"] or ""
        if kind == "rejected":
            kind = self._filter(ours)
            self.rejected[kind] += 1
        named = self.ended["rejected: " + kind if ours["status"] == "rejected" else kind]
        if len(named) < KEYS:
            named.append(Ended(key, error, {name: ours[name] for name in ASKED}))

    def _filter(self, ours: Mapping[str, Any]) -> str:
        """Which of the job's filters rejected a row."""
        return rejected_by(ours["error"] or "", self.filters) or "other"

    def _show(self, place: Place, ours: Mapping[str, Any]) -> None:
        self.pictures += 1
        if ours["status"] == "rejected":
            self._part("rejected", self._filter(ours), place)
        else:
            self.everything.add(place)
            self._part("sampler", ours["scheduler"], place)
            self._part("guidance", band(ours["guidance_scale"]), place)
        for name, value in ours.items():
            if value is not None and name.startswith(SCORE):
                self.scores[name.removeprefix(SCORE)].add(value, place)
        if ours.get("dhash"):
            self.hashes.append(ours["dhash"])
            self.hashed.append(place)

    def _part(self, part: str, name: str, place: Place) -> None:
        self.parts[part].setdefault(name, Sample(EACH, self.random)).add(place)

    def sheets(self) -> Iterator[Sheet]:
        """In the order in which a page shows them."""
        yield Sheet("Random", self.everything.seen, self.everything.some(MOST))
        for part in ("sampler", "guidance"):
            if len(self.parts[part]) > 1:  # one sampler alone is the random sheet again
                yield from self._sheets(part)
        for name, ends in self.scores.items():
            yield from ends.sheets(name, max(1, min(EACH, BUDGETS["score"] // (2 * len(self.scores)))))
        yield from self._sheets("rejected")

    def _sheets(self, part: str) -> Iterator[Sheet]:
        for name, sample in sorted(self.parts[part].items()):
            count = max(1, min(EACH, BUDGETS[part] // len(self.parts[part])))
            yield Sheet(f"{TITLES[part]} {name}", sample.seen, sample.some(count))

    def alike(self) -> list[list[Place]]:
        """Groups of pictures that look alike, the largest first."""
        return [[self.hashed[i] for i in group] for group in groups(self.hashes)]


TITLES = {"sampler": "By sampler:", "guidance": "By guidance:", "rejected": "Rejected, kept:"}
ASKED = ("prompt", "scheduler", "steps", "guidance_scale", "seed", "task")


def survey(shards: Sequence[WrittenShard], seed: str, most_rows: int) -> Survey:
    """Look at up to `most_rows` rows; and at the first rows of each kind of failure, wherever they are."""
    filters = shards[-1].plan.job.get("output", {}).get("filters", ())
    found = Survey(Random(seed), filters)
    chosen = spread(shards, most_rows)
    for number in chosen:
        shard = shards[number]
        for index, row in enumerate(islice(rows(shard, False), max(0, most_rows - found.rows))):
            found.add((number, index), key(shard, index, row), row.ours)
    for number, shard in enumerate(shards):
        kinds = set(shard.marker.failed) - {"rejected"}
        missing = {kind for kind in kinds if len(found.ended.get(kind, ())) < KEYS}
        if missing and number not in chosen:
            for index, row in enumerate(rows(shard, False)):
                if row.ours["status"] in missing:
                    found.end(key(shard, index, row), row.ours)
    return found


def spread(shards: Sequence[WrittenShard], most_rows: int) -> list[int]:
    """Which shards to read for about `most_rows` rows: all, or some at even distances."""
    total = sum(shard.rows for shard in shards)
    count = len(shards) if total <= most_rows else max(1, len(shards) * most_rows // total)
    return [i * len(shards) // count for i in range(count)]


def key(shard: WrittenShard, index: int, row: Row) -> str:
    """What people call a row that was read back."""
    return shard.key(index, row.travelled.get(shard.id_column))


def band(guidance: float) -> str:
    low, high = next((low, high) for low, high in GUIDANCE if guidance <= high)
    return f"over {low}" if high == float("inf") else f"{low} to {high}"
