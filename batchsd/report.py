"""A run on one HTML page that needs nothing else: sheets of small pictures, figures, failures, the exact job.

Prompts, ids and errors are other people's text: the template escapes and isolates all of it, and the page's own policy
lets no script run and nothing load. The same run gives the same page.
"""

from __future__ import annotations

import base64
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from batchsd.alike import APART
from batchsd.redact import redact
from batchsd.reread import WrittenShard, open_run, rows, schema_in, shards, sum_of_shards
from batchsd.store import Store, open_store
from batchsd.survey import GROUP, GROUPS, Place, key, survey
from batchsd.values import SCORE

if TYPE_CHECKING:
    from PIL import Image

    from batchsd.plan import Plan
    from batchsd.published import Row

REPORT = "report.html"
SIDE, QUALITY = 160, 75  # pixels of a thumbnail; of its WebP
BARS, TEXT = 24, 400  # bars of a histogram; characters of a text that are shown
AT_ONCE = 32  # pictures held while their thumbnails are made

# Control characters, and those that turn the direction of writing: they would change how the text round them reads.
_CONTROLS = (*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
SPELT = {code: f"\\u{code:04x}" for code in _CONTROLS}


@dataclass(frozen=True, slots=True)
class Tile:
    """A picture as the page shows it: WebP in base64 ("": it cannot be read), what was asked, how it was drawn."""

    data: str
    key: str
    prompt: str
    settings: str
    kind: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Drawn:
    """A strip as the page shows it: its row, and (label, WebP in base64) of each frame; or why there is none."""

    tile: Tile
    frames: Sequence[tuple[str, str]]
    said: str


def write_report(
    run: str, target: Store, file: str, most_rows: int, strips: int = 0, seconds: float | None = None
) -> tuple[int, int]:
    """Write the page of a run (finished or not) to `file` in `target`; give its pictures, and its bytes.

    `most_rows` are looked at; `strips` rows are drawn again, if that takes no longer than `seconds`. Raises UsageError
    where no shard is done yet, or its layout does not read back.
    """
    plan, plans = open_run(run)
    written = shards(run)
    found = survey(written, plan.hash, most_rows)
    sheets, alike = list(found.sheets()), found.alike()
    groups = [(len(group), group[:GROUP]) for group in alike[:GROUPS]]
    wanted = {place for sheet in sheets for place in sheet.places} | {p for _, places in groups for p in places}
    tiles = tiles_of(written, wanted)
    random = {place: tiles[place] for place in sheets[0].places}
    drawn, left_out = strips_of(run, written, random, strips, seconds)
    everything = [standing for ledger in plans if (standing := ledger.plan())]
    metadata = json.loads(schema_in(plan).metadata[b"batchsd"])
    text = page(
        name=open_store(run).uri.rpartition("/")[2],
        plan=plan,
        total=sum_of_shards(written),
        planned=sum(standing.rows for standing in everything),
        shards=sum(standing.shards for standing in everything),
        done=len(written),
        found=found,
        sheets=[(sheet, [tiles[place] for place in sheet.places]) for sheet in sheets],
        groups=[(size, [tiles[place] for place in places]) for size, places in groups],
        alike=(len(alike), sum(map(len, alike)), APART),
        strips=drawn,
        left_out=left_out,
        histograms=[(name, histogram(values)) for name, values in found.numbers.items() if min(values) < max(values)],
        same=[(name, values[0]) for name, values in found.numbers.items() if min(values) == max(values)],
        model=metadata.get("model"),
        job=json.dumps(redact(dict(plan.job)), indent=1, ensure_ascii=False),
        facts=json.dumps(redact(facts(written, plan, everything)), indent=1, ensure_ascii=False),
    )
    data = text.encode("utf-8", errors="replace")
    target.put(file, data)
    return text.count("<img "), len(data)


def page(**values: Any) -> str:
    import jinja2

    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"plain": plain, "number": lambda value: f"{value:,}"}
    return environment.from_string(template).render(**values)


def plain(text: str | None, most: int = TEXT) -> str:
    """Other people's text, cut, with the characters of `SPELT` written out."""
    shown = (text or "")[:most].translate(SPELT)
    return f"{shown} ... ({len(text):,} characters)" if text and len(text) > most else shown


def facts(written: Sequence[WrittenShard], plan: Plan, plans: Iterable[Plan]) -> dict[str, Any]:
    """What the pictures are made of: checkpoint, settings and versions; what each worker was; the inputs."""
    workers: dict[str, set[str]] = defaultdict(set)
    for shard in written:
        for name, value in shard.marker.facts.items():
            workers[name].add(str(value))
    workers.pop("pid", None)
    told = {name: sorted(values) if len(values) > 1 else min(values) for name, values in workers.items()}
    files = [file for standing in plans for file in standing.files]
    return {"hard": plan.hard, "soft": plan.soft, "workers": told, "input": files}


def tiles_of(written: Sequence[WrittenShard], wanted: Iterable[Place]) -> dict[Place, Tile]:
    """Read and shrink the pictures at these places; no others are decoded."""
    by_shard: dict[int, set[int]] = defaultdict(set)
    for number, index in wanted:
        by_shard[number].add(index)

    def there() -> Iterator[tuple[Place, str, Row]]:
        for number, indexes in sorted(by_shard.items()):
            shard = written[number]
            for index, row in enumerate(islice(rows(shard, indexes), max(indexes) + 1)):
                if index in indexes:
                    yield (number, index), key(shard, index, row), row

    found: dict[Place, Tile] = {}
    stream = there()
    with ThreadPoolExecutor(4, "thumbnails") as pool:
        while some := list(islice(stream, AT_ONCE)):
            made = pool.map(lambda each: tile(each[1], each[2]), some)
            found |= {place: one for (place, _, _), one in zip(some, made, strict=True)}
    return found


def tile(key: str, row: Row) -> Tile:
    from PIL import Image

    ours = row.ours
    try:
        picture = Image.open(io.BytesIO(ours["image"]["bytes"]))
        picture.draft("RGB", (SIDE, SIDE))  # JPEG alone: decoded small
        data = thumbnail(picture.convert("RGB"))
    except OSError:
        data = ""
    said = f"{ours['scheduler']}, {ours['steps']} steps, guidance {ours['guidance_scale']:g}, seed {ours['seed']}"
    given = {name.removeprefix(SCORE): value for name, value in ours.items() if name.startswith(SCORE)}
    scores = [f"{name} {value:.4g}" for name, value in given.items() if value is not None]
    status = [] if ours["status"] == "ok" else [f"{ours['status']}: {ours['error']}"]
    return Tile(data, key, ours["prompt"] or "", "; ".join([said, *scores, *status]), (ours["task"], ours["scheduler"]))


def thumbnail(picture: Image.Image) -> str:
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=QUALITY)
    return base64.b64encode(buffer.getvalue()).decode()


def strips_of(
    run: str, written: Sequence[WrittenShard], tiles: Mapping[Place, Tile], count: int, seconds: float | None
) -> tuple[list[Drawn], str]:
    """The strips of `count` rows, of as many tasks and samplers as there are; and why there are none."""
    if not count:
        return [], "Not drawn with this page; `batchsd report RUN` draws a few rows again to show them."
    from PIL import Image

    from batchsd.strips import strips

    order = Random(written[-1].plan.hash).sample(list(tiles), len(tiles))
    kinds = {tiles[place].kind: place for place in order}
    picks = list(dict.fromkeys([*kinds.values(), *order]))[:count]
    if not picks:
        return [], "There is no picture."
    drawn: list[Drawn] = []
    try:
        for place, strip in zip(picks, strips(run, [(written[n], i) for n, i in picks], seconds), strict=True):
            if isinstance(strip, str):
                drawn.append(Drawn(tiles[place], (), f"left out: {strip}"))
                continue
            frames = [(label, thumbnail(Image.fromarray(picture))) for label, picture in strip.frames]
            apart = "" if strip.apart is None else f"; within {strip.apart}/255 of the run's picture"
            drawn.append(Drawn(tiles[place], frames, f"{strip.calls} network calls{apart}"))
    except Exception as error:  # whatever a model, a device or a plugin does: the page is there without strips
        return drawn, f"Left out: {error or type(error).__name__}"
    return drawn, ""


def histogram(values: Sequence[float]) -> dict[str, Any]:
    """Heights of `BARS` bars (0 to 100), the range, the mean."""
    import numpy as np

    counts, _ = np.histogram(values, BARS)
    heights = [round(100 * count / int(counts.max()), 1) for count in counts.tolist()]
    bars = list(zip(heights, counts.tolist(), strict=True))
    return {"bars": bars, "low": min(values), "high": max(values), "mean": sum(values) / len(values)}
