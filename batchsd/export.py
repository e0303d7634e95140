"""A finished run in another layout, without drawing again: every committed row, through another sink.

Files are published whole, as a run's are, and the card comes last; an export that was cut off begins anew. The
run itself is not touched.
"""

from __future__ import annotations

import secrets
from dataclasses import replace

from batchsd.card import write_card
from batchsd.ledger import OURS, STAGING, place_of
from batchsd.reread import open_run, records, schema_in, shards, sum_of_shards
from batchsd.store import open_store
from batchsd.types import Sink, UsageError
from batchsd.writer import check_staged

EXPORTING = f"{OURS}/EXPORTING"  # there until all is


def export(run: str, sink: Sink, name: str, target: str) -> int:
    """Write all rows of `run` through `sink` (registered as `name`) to the folder `target`; give how many.

    Raises UsageError where the run is not finished, or `target` holds anything but an export that was cut off.
    """
    plan, plans = open_run(run)
    if not all(ledger.succeeded() for ledger in plans):
        raise UsageError(f"{run}: the run is not finished; run its job again first")
    out = open_store(target)
    if out.children("") and out.read(EXPORTING) is None:
        raise UsageError(f"{out.uri} is not empty; give another --to, or empty it yourself")
    out.put(EXPORTING, b"")
    schema, written = schema_in(plan), shards(run)
    for number, shard in enumerate(written):
        staging = f"{STAGING}/{number:05d}.{secrets.token_hex(8)}"
        folder = out.scratch(staging)
        writer = sink.open(folder, shard.name, schema)
        for record in records(shard):
            writer.add(record)
        writer.close()
        files = check_staged(folder, shard.rows)
        out.hand_in(staging)
        out.publish([(f"{staging}/{file.name}", place_of(file.name)) for file in files])
        out.remove(staging)
    total = sum_of_shards(written)
    write_card(out, replace(plan, sink=name), total, schema)
    out.remove(OURS)
    return total.rows
