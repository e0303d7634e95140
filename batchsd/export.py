"""A finished run in another layout, without drawing again: every committed row, through another sink.

It is built beside its final place and gets its name when it is whole; the run itself is not touched.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from batchsd.card import write_card
from batchsd.ledger import place_of
from batchsd.reread import open_run, records, schema_of, shards
from batchsd.run import check_staged
from batchsd.store import open_store
from batchsd.types import Sink, UsageError


def export(run: str, sink: Sink, name: str, target: Path) -> int:
    """Write all rows of `run` through `sink` (registered as `name`) to `target`; give how many.

    Raises UsageError where the run is not finished, or `target` exists.
    """
    plan, ledger = open_run(run)
    if not ledger.succeeded():
        raise UsageError(f"{run}: the run is not finished; run its job again first")
    if target.exists():
        raise UsageError(f"{target} exists; give another --to, or remove it")
    schema = schema_of(run)
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # an export that was cut off
    for shard in shards(run):
        staging = partial / "staging"
        staging.mkdir(parents=True)
        writer = sink.open(staging, shard.name, schema)
        for record in records(shard):
            writer.add(record)
        writer.close()
        for file in check_staged(staging, shard.rows):
            place = partial / place_of(file.name)
            place.parent.mkdir(parents=True, exist_ok=True)
            (staging / file.name).rename(place)
        shutil.rmtree(staging)
    total = ledger.tally()
    write_card(open_store(str(partial)), replace(plan, sink=name), total, schema)
    partial.rename(target)
    return total.rows
