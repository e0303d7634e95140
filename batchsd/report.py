"""A run on one HTML page that needs nothing else: sheets of small pictures, figures, failures, the exact job.

Prompts, ids and errors are other people's text: the template escapes all of it, and the page's own policy lets
no script run and nothing load. The same run gives the same page.
"""

from __future__ import annotations

import base64
import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from batchsd.marker import sum_of
from batchsd.redact import redact
from batchsd.reread import open_run, records, schema_of, shards
from batchsd.store import Store, open_store
from batchsd.types import Record

MOST, RANDOM, EACH, KEYS = 400, 120, 24, 20  # pictures on the page, in a sheet; row keys a kind of failure
SIDE, BARS = 160, 24  # pixels of a thumbnail, bars of a histogram
GUIDANCE = ((0, 1), (1, 3), (3, 6), (6, 10), (10, float("inf")))


@dataclass(frozen=True)
class Tile:
    """A picture as the page shows it: WebP in base64, what was asked, and how it was drawn."""

    data: str
    key: str
    prompt: str
    settings: str


@dataclass
class Sample:
    """`most` of a stream, all equally likely (reservoir sampling), in the order in which they came."""

    most: int
    random: Random
    seen: int = 0
    kept: list[tuple[int, Record]] = field(default_factory=list)

    def add(self, record: Record) -> None:
        self.seen += 1
        if len(self.kept) < self.most:
            self.kept.append((self.seen, record))
        elif (place := self.random.randrange(self.seen)) < self.most:
            self.kept[place] = (self.seen, record)

    def tiles(self) -> list[Tile]:
        return [tile(record) for _, record in sorted(self.kept, key=lambda pair: pair[0])]


@dataclass
class Figures:
    """Numbers of every picture, and every failure by kind."""

    numbers: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    failures: dict[str, list[tuple[str, str]]] = field(default_factory=lambda: defaultdict(list))
    kinds: Counter[str] = field(default_factory=Counter)

    def add(self, record: Record) -> None:
        if record.image is None:
            self.kinds[record.status] += 1
            if len(self.failures[record.status]) < KEYS:
                self.failures[record.status].append((record.request.key, record.error or ""))
            return
        request = record.request
        mean, deviation = brightness(record.image)
        measured = {
            "brightness (mean of a picture's grey values)": mean,
            "contrast (their deviation; 0 is flat)": deviation,
            "steps": request.steps,
            "guidance scale": request.guidance_scale,
            "kilobytes of a picture's file": len(record.image) / 1000,
        }
        for name, value in measured.items():
            self.numbers[name].append(value)


def write_report(run: str, target: Store, file: str) -> tuple[int, int]:
    """Write the page of a run (finished or not) to `file` in `target`; give its pictures, and its bytes.

    Raises UsageError where no shard is done yet.
    """
    import jinja2

    plan, plans = open_run(run)
    written = shards(run)
    metadata = json.loads(schema_of(run).metadata[b"batchsd"])
    figures, sheets = gather((record for shard in written for record in records(shard)), plan.hash)
    shown = [(title, sample.seen, sample.tiles()) for title, sample in sheets]
    everything = [standing for ledger in plans if (standing := ledger.plan())]
    files = [file for standing in everything for file in standing.files]
    total = sum_of(ledger.tally() for ledger in plans)
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(template)
    text = page.render(
        name=open_store(run).uri.rpartition("/")[2],
        plan=plan,
        total=total,
        rows=sum(standing.rows for standing in everything),
        shards=sum(standing.shards for standing in everything),
        done=len(written),
        figures=figures,
        histograms=[(name, histogram(values)) for name, values in figures.numbers.items()],
        sheets=shown,
        model=metadata.get("model"),
        job=json.dumps(redact(dict(plan.job)), indent=1),
        facts=json.dumps({"hard": plan.hard, "soft": plan.soft, "input": files}, indent=1),
    )
    data = text.encode("utf-8", errors="replace")
    target.put(file, data)
    return sum(len(tiles) for _, _, tiles in shown), len(data)


def gather(rows: Iterable[Record], seed: str) -> tuple[Figures, list[tuple[str, Sample]]]:
    """One pass over all rows: the figures, and the sheets (title and sample), at most `MOST` pictures."""
    random = Random(seed)
    figures, everything = Figures(), Sample(RANDOM, random)
    parts: dict[str, dict[str, Sample]] = {"sampler": {}, "guidance": {}}
    for record in rows:
        figures.add(record)
        if record.image is None:
            continue
        everything.add(record)
        for part, name in (("sampler", record.request.scheduler), ("guidance", band(record.request.guidance_scale))):
            parts[part].setdefault(name, Sample(EACH, random)).add(record)
    sheets = [("Random", everything)]
    left = MOST - len(everything.kept)
    for part, samples in parts.items():
        for name, sample in sorted(samples.items()):
            if len(samples) > 1 and left >= len(sample.kept):  # one sampler alone is the random sheet again
                sheets.append((f"By {part}: {name}", sample))
                left -= len(sample.kept)
    return figures, sheets


def band(guidance: float) -> str:
    low, high = next((low, high) for low, high in GUIDANCE if guidance <= high)
    return f"over {low}" if high == float("inf") else f"{low} to {high}"


def tile(record: Record) -> Tile:
    from PIL import Image

    assert record.image is not None
    picture = Image.open(io.BytesIO(record.image)).convert("RGB")
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=75)
    asked = record.request
    settings = f"{asked.scheduler}, {asked.steps} steps, guidance {asked.guidance_scale:g}, seed {asked.seed}"
    return Tile(base64.b64encode(buffer.getvalue()).decode(), asked.key, asked.prompt, settings)


def brightness(image: bytes) -> tuple[float, float]:
    """Mean and standard deviation of the grey values, 0 to 255."""
    from PIL import Image, ImageStat

    found = ImageStat.Stat(Image.open(io.BytesIO(image)).convert("L"))
    return found.mean[0], found.stddev[0]


def histogram(values: Sequence[float]) -> dict[str, Any]:
    """Heights of `BARS` bars (0 to 100), the range, the mean."""
    low, high = min(values), max(values)
    counts = [0] * BARS
    for value in values:
        counts[min(BARS - 1, int((value - low) / (high - low) * BARS)) if high > low else BARS // 2] += 1
    tallest = max(counts)
    heights = [round(100 * count / tallest, 1) for count in counts]
    bars = list(zip(heights, counts, strict=True))
    return {"bars": bars, "low": low, "high": high, "mean": sum(values) / len(values)}
