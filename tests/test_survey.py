"""What a report looks at, on runs whose rows say what should be seen of them."""

from __future__ import annotations

from collections import Counter
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from batchsd import survey as room
from batchsd.published import Row
from batchsd.survey import BUDGETS, EACH, KEYS, MOST, Survey, survey


def ours(**values: Any) -> dict[str, Any]:
    """A row of ours that was drawn well."""
    row = {
        "status": "ok", "error": None, "image": {"path": "x.png"}, "prompt": "p", "scheduler": "ddim", "task": "text",
        "steps": 4, "guidance_scale": 5.0, "seed": 0, "width": 8, "height": 8, "mean": 0.5, "deviation": 0.1,
        "tokens_cut": 0, "dhash": None,
    }  # fmt: skip
    return row | values


def of(rows: list[dict[str, Any]], filters: tuple[str, ...] = ()) -> Survey:
    found = Survey(Random(0), filters)
    for i, row in enumerate(rows):
        found.add((0, i), f"row {i}", row)
    return found


def sizes(found: Survey) -> dict[str, tuple[int, int]]:
    return {sheet.title: (sheet.seen, len(sheet.places)) for sheet in found.sheets()}


def test_sheets_are_bounded_and_cover_samplers_and_guidance() -> None:
    asked = [("euler", 1.0), ("ddim", 5.0), ("lcm", 9.0), ("heun", 20.0)]
    rows = [ours(scheduler=asked[i % 4][0], guidance_scale=asked[i % 4][1]) for i in range(600)]
    seen = sizes(of(rows))
    assert seen["Random"] == (600, MOST)
    assert {title: size for title, size in seen.items() if "sampler" in title} == {
        f"By sampler: {name}": (150, EACH) for name, _ in asked
    }
    assert seen["By guidance: over 10"][0] == 150
    assert sum(count for title, (_, count) in seen.items() if "guidance" in title) <= BUDGETS["guidance"]
    many = sizes(of([ours(scheduler=f"s{i % 40}") for i in range(400)]))
    assert sum("sampler" in title for title in many) == 40 and many["By sampler: s7"] == (10, 2)
    assert set(sizes(of([ours()] * 3))) == {"Random"}  # one sampler, one guidance: nothing to part


def test_random_is_random_and_the_same_each_time() -> None:
    rows = [ours() for _ in range(2000)]
    first, again = of(rows), of(rows)
    assert list(first.sheets()) == list(again.sheets())
    places = [index for _, index in next(iter(first.sheets())).places]
    assert len(set(places)) == MOST and places == sorted(places)
    halves = Counter(index < 1000 for index in places)
    assert 30 < halves[True] < 90  # 60 on average, deviation 5.3


def test_best_and_worst_by_every_score() -> None:
    values = [(i * 37) % 200 / 10 for i in range(200)]
    rows = [ours(**{"score clip": value, "score face": None if i else 3.0}) for i, value in enumerate(values)]
    sheets = {sheet.title: sheet for sheet in of(rows).sheets()}
    order = sorted(range(200), key=lambda i: values[i])
    count = BUDGETS["score"] // 4
    assert [index for _, index in sheets["Lowest clip"].places] == order[:count]
    assert [index for _, index in sheets["Highest clip"].places] == order[::-1][:count]
    assert list(sheets["Lowest clip"].values) == [values[i] for i in order[:count]]
    assert sheets["Highest face"].seen == 1  # no number is no score


def test_a_rejected_row_is_counted_by_its_filter() -> None:
    filters = ("clip > 0.25", "clip > 0.5", "safety")
    rejected = [
        ours(status="rejected", error="clip is 0.2, wanted > 0.25", **{"score clip": 0.2}),
        ours(status="rejected", error="clip is 0.3, wanted > 0.5", image=None, **{"score clip": 0.3}),
        ours(status="rejected", error="safety: not for children"),
        ours(status="rejected", error="safety: nor for cats"),
        ours(status="rejected", error="who knows"),
    ]
    found = of([*rejected, ours(), ours(status="nan", error="not finite", image=None)], filters)
    assert found.rejected == {"clip > 0.25": 1, "clip > 0.5": 1, "safety": 2, "other": 1}
    assert set(found.ended) == {"nan", *(f"rejected: {name}" for name in found.rejected)}
    assert found.ended["rejected: safety"][1].error == "safety: nor for cats"
    seen = sizes(found)
    assert seen["Random"] == (1, 1) and seen["Rejected, kept: safety"] == (2, 2)
    assert "Rejected, kept: clip > 0.5" not in seen  # its picture was dropped
    assert list(found.numbers["clip"]) == [0.2, 0.3]  # both were drawn


def run_of(monkeypatch: pytest.MonkeyPatch, shards: list[list[dict[str, Any]]]) -> tuple[list[Any], list[int]]:
    """Shards of rows, and the numbers of those that were read."""
    read: list[int] = []
    plan = SimpleNamespace(job={})
    written = [
        SimpleNamespace(
            number=number, plan=plan, rows=len(rows), id_column="id", key=lambda index, id, n=number: f"{n}/{index}",
            marker=SimpleNamespace(failed=Counter(row["status"] for row in rows if row["status"] != "ok")),
        )
        for number, rows in enumerate(shards)
    ]  # fmt: skip

    def rows(shard: Any, pictures: object) -> Any:
        assert pictures is False
        read.append(shard.number)
        return (Row(values, {}) for values in shards[shard.number])

    monkeypatch.setattr(room, "rows", rows)
    return written, read


def test_a_part_of_a_large_run_spread_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = ours(status="oom", error="no room", image=None)
    shards = [[ours() for _ in range(10)] for _ in range(100)]
    shards[33] = [bad] * 10
    written, read = run_of(monkeypatch, shards)
    found = survey(written, "seed", 200)
    assert found.rows == found.pictures == 200 and 33 in read and len(read) == 21
    assert max(b - a for a, b in zip(read[:19], read[1:20], strict=True)) <= 5  # evenly
    assert [row.key for row in found.ended["oom"]] == [f"33/{i}" for i in range(10)]  # found where it was
    whole, read = run_of(monkeypatch, shards)
    assert survey(whole, "seed", 1000).rows == 1000 and read == list(range(100))


def test_one_huge_shard_and_many_failures_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = ours(status="nan", error="not finite", image=None)
    written, _ = run_of(monkeypatch, [[bad if i % 2 else ours() for i in range(500)]])
    found = survey(written, "seed", 300)
    assert found.rows == 300 and len(found.ended["nan"]) == KEYS
