"""The page from other people's text, read with the standard library's HTML parser."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from batchsd.report import EACH, MOST, RANDOM, brightness, gather, histogram
from batchsd.store import LocalStore
from batchsd.testing import example_records

HOSTILE = '</figcaption><script>alert(1)</script><img src=x onerror="alert(2)">'


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))


def page_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The page of rows whose prompts, keys and errors are markup."""
    import pyarrow as pa

    from batchsd import report
    from batchsd.ledger import Tally
    from batchsd.plan import Plan

    records = [
        replace(r, error=HOSTILE if r.error else None, request=replace(r.request, prompt=HOSTILE, key=HOSTILE))
        for r in example_records(7)
    ]
    plan = Plan(1, {"a": HOSTILE}, {}, (), 7, 7, 1, 1, "parquet", {}, {"input": {"prompt": HOSTILE}})
    tally = Tally({0}, 7, 5, Counter(bad_input=2))
    ledger = type("Ledger", (), {"tally": lambda self: tally, "plan": lambda self: plan})()
    monkeypatch.setattr(report, "open_run", lambda run: (plan, [ledger]))
    monkeypatch.setattr(report, "shards", lambda run: [records])
    monkeypatch.setattr(report, "records", iter)
    monkeypatch.setattr(report, "schema_of", lambda run: pa.schema([], {"batchsd": '{"model": "m"}'}))
    report.write_report(str(tmp_path), LocalStore(tmp_path), "report.html")
    return (tmp_path / "report.html").read_text()


def test_hostile_text_stays_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader()
    reader.feed(page_of(tmp_path, monkeypatch))
    assert "script" not in {tag for tag, _ in reader.tags}
    images = [attributes for tag, attributes in reader.tags if tag == "img"]
    assert len(images) == 5 and all(image["src"].startswith("data:image/webp;base64,") for image in images)
    assert {image["alt"] for image in images} == {HOSTILE}
    assert not any(name.startswith("on") for _, attributes in reader.tags for name in attributes)
    (policy,) = (a["content"] for tag, a in reader.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_sheets_are_bounded_and_cover_the_samplers() -> None:
    good = example_records(1)[0]
    asked = [("euler", 1.0), ("ddim", 5.0), ("lcm", 9.0), ("heun", 20.0)]
    rows = [
        replace(good, request=replace(good.request, index=i, scheduler=asked[i % 4][0], guidance_scale=asked[i % 4][1]))
        for i in range(600)
    ]
    figures, sheets = gather(rows, "seed")
    sizes = {title: (sample.seen, len(sample.kept)) for title, sample in sheets}
    assert sizes["Random"] == (600, RANDOM) and sizes["By sampler: lcm"] == (150, EACH)
    assert sum(kept for _, kept in sizes.values()) <= MOST
    assert len(figures.numbers["steps"]) == 600
    again = [[r.request.index for _, r in s.kept] for _, s in gather(rows, "seed")[1]]
    assert again == [[r.request.index for _, r in s.kept] for _, s in sheets]
    assert again[0] != [r.request.index for _, r in gather(rows, "other")[1][0][1].kept]


def test_figures() -> None:
    assert brightness(example_records(5)[4].image or b"") == (4.0, 0.0)  # all pixels are 4
    chart = histogram([0.0, 0.0, 1.0])
    assert [chart["bars"][0], chart["bars"][-1]] == [(100.0, 2), (50.0, 1)]
    assert sum(count for _, count in histogram([3.0] * 7)["bars"]) == 7
