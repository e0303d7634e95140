"""What a job will take, before it is begun: from a few of its rows, spread over the whole manifest.

    network evaluations a picture ~ steps x calls a step x (2 with guidance, else 1)
    time = pictures / (rate x workers),   rate: given, or measured by drawing sampled rows here
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from batchsd.diffusion.builtin import resolve
from batchsd.progress import duration
from batchsd.types import Request, Shard

if TYPE_CHECKING:
    from batchsd.bench import Workbench
    from batchsd.prepare import Prepared

PLACES, ROWS_A_PLACE = 16, 16  # of the sample
MEASURED = 48  # rows that --measure draws; fewer where that takes longer than PATIENCE
PATIENCE = 120.0  # seconds
# Files of photographs, bytes a pixel, by rule of thumb: PNG at level 1, JPEG and WebP at high quality.
BYTES_A_PIXEL = {"png": 1.6, "jpeg": 0.4, "webp": 0.3}


@dataclass(frozen=True)
class Rate:
    """Pictures a second of one worker, and where the figure is from. `bytes` of a picture, 0: not measured."""

    pictures: float
    source: str
    bytes: float = 0.0


def sample(prepared: Prepared) -> list[Request]:
    """Up to `PLACES * ROWS_A_PLACE` rows of the plan, those that cannot be drawn left out."""
    shards, reader = prepared.shards, prepared.recipe.reader(prepared.registry)
    step = max(1, len(shards) // PLACES)
    rows = (request for shard in shards[::step][:PLACES] for request in islice(reader.read(shard), ROWS_A_PLACE))
    return [request for request in rows if request.error is None]


def evaluations(request: Request, calls: Callable[[str], int]) -> int:
    """Network evaluations of one row, whole; fewer where a strength or an interval leaves some out."""
    return request.steps * calls(request.scheduler) * (2 if request.guidance_scale > 1 else 1)


def measure(requests: Sequence[Request], build: Callable[[], Workbench]) -> Rate:
    """Draw sampled rows with a worker of this process; nothing is written. The first row only warms up."""
    generate = build().generate
    shard = Shard(0, 0, 1, 0, 0, len(requests))
    chosen = [requests[i * len(requests) // MEASURED] for i in range(min(MEASURED, len(requests)))]
    done, size, began = 0, 0, time.monotonic()

    def rows() -> Iterator[Request]:
        for request in chosen:
            if time.monotonic() - began > PATIENCE:
                return
            yield request

    for _ in generate([(shard, iter(chosen[:1]))]):
        began = time.monotonic()
    for _, record in generate([(shard, rows())]):
        done += 1
        size += len(record.image or b"")
    return Rate(done / (time.monotonic() - began), f"measured on {done} rows here", size / done)


def estimate_lines(
    prepared: Prepared, workers: int, gpus: float, rate: Rate | None, requests: Sequence[Request]
) -> list[str]:
    """Evaluations, bytes and time of the whole plan, each line with `about`: it is a sample's.

    `gpus` is what one worker reserves.
    """
    if not requests:
        return ["work    no row of the sample can be drawn: batchsd validate lists why"]
    plan, manifest = prepared.plan, prepared.recipe.manifest
    schedulers = prepared.registry.schedulers

    def calls(name: str) -> int:
        return 1 if name == "model" else resolve(name, {}, schedulers).calls

    each = sum(evaluations(request, calls) for request in requests) / len(requests)
    groups = [rows for file in manifest.files for rows in file.row_groups]
    size = rate.bytes if rate and rate.bytes else typical_bytes(prepared, requests)
    lines = [
        f"work    about {plan.rows * each:,.0f} network evaluations, {each:,.0f} a picture",
        f"groups  the manifest's row groups: {len(groups):,}, of at most {max(groups):,} rows",
    ]
    if size:
        lines.append(
            f"bytes   about {amount(plan.rows * size)}: {amount(size)} a picture, {amount(plan.rows_per_shard * size)} "
            f"a shard, {amount(min(100, plan.rows_per_shard) * size)} a row group"
        )
    if rate:
        seconds = plan.rows / (rate.pictures * workers)
        hours = f", {seconds * workers * gpus / 3600:,.1f} GPU-hours" if gpus else ""
        lines.append(
            f"time    about {duration(seconds)}{hours}: {rate.pictures:.3g} pictures/s a worker ({rate.source}), "
            f"{workers} worker{'s' if workers > 1 else ''}"
        )
    return lines


def typical_bytes(prepared: Prepared, requests: Sequence[Request]) -> float:
    """Bytes of a picture by rule of thumb; 0 where the model decides its size."""
    pixels = [request.height * request.width for request in requests if request.height and request.width]
    return sum(pixels) / len(pixels) * BYTES_A_PIXEL[prepared.recipe.job.output.image.format] if pixels else 0.0


def amount(count: float) -> str:
    """`512 B`, `3.4 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
