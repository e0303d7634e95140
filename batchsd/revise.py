"""How a run begins: as planned, with rows that were edited (`--update`), or with those that failed (`retry`).

A shard with such a row is built anew, under a marker of the next revision. Rows are edited in place:
insertions, deletions and reordering would move every row that follows, and are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from batchsd.columns import json_value, manifest_column
from batchsd.job import Job
from batchsd.ledger import Ledger, ledgers
from batchsd.marker import Tally
from batchsd.plan import Plan
from batchsd.prepare import Prepared, prepare
from batchsd.published import Row, reread
from batchsd.store import open_store
from batchsd.types import Request, UsageError


@dataclass(frozen=True, slots=True)
class Beginning:
    """A plan that begins or goes on: what the shards that stand add up to; and those to be built anew.

    `revisions` has the numbers of the markers that these get.
    """

    prepared: Prepared
    tally: Tally
    revisions: dict[int, int]

    @property
    def complete(self) -> bool:
        return len(self.tally.done) == self.prepared.plan.shards


def begin_run(parts: Sequence[Prepared]) -> list[Beginning]:
    """Go on where the run stopped, an unfinished update included; new files and rows become a new plan."""
    return _begin(parts, {})


def _begin(parts: Sequence[Prepared], touched: Mapping[int, set[int]]) -> list[Beginning]:
    """`touched` are the shards of some plans that hold edited rows, where they were just looked for."""
    for part in parts:
        part.ledger.check(part.plan)  # all of them, before anything is written
    published = parts[0].ledger.published()
    begun = []
    for part in parts:
        unfinished = _unfinished_update(part.ledger)
        part.ledger.begin(part.plan)
        tally = part.ledger.roll_forward(published)
        if unfinished:
            number = part.plan.number
            begun.append(_without(part, touched[number] if number in touched else edited(part)))
        else:
            begun.append(Beginning(part, tally, {}))
    return begun


def begin_update(parts: Sequence[Prepared]) -> list[Beginning]:
    """Let the manifest as it is now stand, row for row. Raises UsageError where it is not only edited."""
    touched = {}
    for part in parts:
        standing = part.ledger.plan()
        if standing is not None and standing.hash != part.plan.hash:
            check_editable(standing, part.plan)
            part.ledger.roll_forward()
            touched[part.plan.number] = edited(part)  # refuses rows that moved, before anything is written
    for part in parts:
        if part.plan.number in touched:
            part.ledger.revise(part.plan)
    return _begin(parts, touched)


def begin_retry(parts: Sequence[Prepared]) -> list[Beginning]:
    """Draw again what failed; files and rows that the manifest got since stay for the next run."""
    begun = begin_run([part for part in parts if part.ledger.plan() is not None])
    for i, beginning in enumerate(begun):
        markers = beginning.prepared.ledger.markers()
        failed = {marker.shard for marker in markers if set(marker.failed) - {"rejected"}}
        if failed:
            begun[i] = _without(beginning.prepared, failed | set(beginning.revisions))
    return begun


def _unfinished_update(ledger: Ledger) -> bool:
    return len(ledger.plans()) > 1 and not ledger.succeeded()


def _without(part: Prepared, touched: set[int]) -> Beginning:
    tally, revisions = Tally(), {}
    for marker in part.ledger.markers():
        if marker.shard in touched:
            revisions[marker.shard] = marker.revision + 1
        else:
            tally.add(marker)
    return Beginning(part, tally, revisions)


def check_editable(standing: Plan, plan: Plan) -> None:
    """Raises UsageError where more has changed than the content of files, row for row."""
    now = {file["name"]: file["rows"] for file in plan.files}
    for file in standing.files:
        rows = now.get(file["name"])
        if rows is not None and rows != file["rows"]:
            raise UsageError(
                f"--update: {file['name']} had {file['rows']} rows when this run began, now {rows}; rows may be "
                "edited in place and appended, not inserted or deleted; --new draws all into another folder"
            )
    same = tuple(f"input file {name}: " for name in now)
    others = [line for line in standing.differences(plan) if not line.startswith(same)]
    if others:
        raise UsageError(
            "--update takes up edited rows only; what differs besides (there -> now):\n  " + "\n  ".join(others)
        )


def edited(prepared: Prepared) -> set[int]:
    """The published shards that hold a row which the manifest now has otherwise.

    Only shards whose file has changed since they were drawn are read, without their pictures. Raises
    UsageError where rows moved.
    """
    ledger, plan = prepared.ledger, prepared.plan
    plans = {before.hash: before for before in ledger.plans()}
    moves = Moves(manifest_column("id", prepared.recipe.job), manifest_column("prompt", prepared.recipe.job))
    touched = set()
    read, sink = prepared.recipe.reader().read, prepared.recipe.sink()
    for marker in ledger.markers():
        shard, before = prepared.shards[marker.shard], plans.get(marker.plan_hash)
        if before is not None and before.files[shard.file]["sha256"] == plan.files[shard.file]["sha256"]:
            continue
        if _edited_rows(reread(ledger.store, sink, shard, prepared.recipe.schema, False), read(shard), moves):
            touched.add(marker.shard)
    moves.refuse()
    return touched


def _edited_rows(published: Iterator[Row], requests: Iterator[Request], moves: Moves) -> int:
    """How many rows differ; all, where the sink does not read back."""
    count = 0
    for row, request in zip_longest(published, requests):
        if row is None or request is None:
            count += 1
        elif differs(row, request):
            count += 1
            moves.look(row, request)
    return count


def differs(row: Row, request: Request) -> bool:
    """Whether a published row is not what the manifest asks and carries now. Failing again is no difference."""
    if request.error is not None:
        if (row.ours["error"], row.ours["prompt"]) != (str(request.error), request.prompt):
            return True
    elif row.ours["row_hash"] != request.row_hash:
        return True
    now = request.columns.to_pylist()[0] if request.columns.num_columns else {}
    return any(not _same(value, now[name]) for name, value in row.travelled.items())


def _same(written: Any, now: Any) -> bool:
    """NaN is itself; and some layouts hold values as JSON has them."""
    return bool(written == now or (written != written and now != now) or written == json_value(now))


@dataclass(slots=True)
class Moves:
    """Tells an edit from a shift: rows that bear the id (else the prompt) of another row that changed too."""

    id: str
    prompt: str
    before: list[Any] = field(default_factory=list)
    after: list[Any] = field(default_factory=list)

    def look(self, row: Row, request: Request) -> None:
        now = request.columns.to_pylist()[0] if request.columns.num_columns else {}
        if row.travelled.get(self.id) is not None:
            one, other = row.travelled[self.id], now[self.id]
        else:
            one, other = row.ours["prompt"], request.prompt
        if one is not None and other is not None and one != other:
            self.before.append(one)
            self.after.append(other)

    def refuse(self) -> None:
        moved = set(self.before) & set(self.after)
        if 2 * len(moved) > len(set(self.before)):
            example = next(other for other in self.after if other in moved)
            raise UsageError(
                f"--update: rows have moved, the first to {str(example)[:60]!r}, which stood in another row; rows may "
                "be edited in place, not inserted, deleted or reordered; --new draws all into another folder"
            )


def limited(job: Job, limit: int | None) -> Job:
    """The job with the output folder of its first rows: beside the whole run's, never into it."""
    return job if limit is None else replace_uri(job, f"{job.output.uri.rstrip('/')}-limit-{limit}")


def beside(job: Job, limit: int | None) -> Job:
    """The job with an output folder of its own, `<uri>-<plan>`, named after what it draws."""
    elsewhere = replace_uri(job, f"{job.output.uri.rstrip('/')}-new")  # where no plan stands to agree with
    (fresh,) = prepare(elsewhere, 1, False, limit)
    return replace_uri(job, f"{job.output.uri.rstrip('/')}-{fresh.plan.hash[:8]}")


def job_of_run(uri: str) -> tuple[Job, int | None]:
    """The job that made a run folder, which may have moved since, and its `--limit`. Raises UsageError."""
    found = ledgers(open_store(uri))
    plan = found[-1].plan() if found else None
    if plan is None:
        raise UsageError(f"{uri}: no run of batchsd is here (no plan)")
    return replace_uri(Job.model_validate_json(json.dumps(plan.job)), uri), plan.limit


def replace_uri(job: Job, uri: str) -> Job:
    return job.model_copy(update={"output": job.output.model_copy(update={"uri": uri})})
