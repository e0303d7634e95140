"""One run, from its plan to SUCCESS.

    plan -> roll forward -> give out tickets -> commit results -> check that all is there -> SUCCESS
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

from batchsd.dispatch import Drive, nothing
from batchsd.executor import Executor
from batchsd.ledger import Ledger
from batchsd.marker import Tally
from batchsd.plan import Plan
from batchsd.progress import Snapshot
from batchsd.stop import AtOnce, Stop, Stopped, all_drawn, check_going
from batchsd.types import BatchsdError, InfrastructureError, Shard


def drive(
    ledger: Ledger,
    plan: Plan,
    tally: Tally,
    shards: Iterable[Shard],
    executor: Executor,
    stop: Stop,
    max_failed: float,
    watch: Callable[[Snapshot], None],
    log: Callable[[str], None],
    check_lock: Callable[[], None] = nothing,
    revisions: Mapping[int, int] | None = None,
) -> Tally:
    """Bring a begun plan to its end; `tally` is `ledger.roll_forward()`'s, less the shards in `revisions`.

    Gives what the markers add up to. Raises TooManyFailed (while shards are left: see `stop.all_drawn`), Stopped,
    InfrastructureError, or a worker's UsageError; what was committed stays.
    """
    check_going(tally, plan.shards, max_failed)
    known = {shard.index: shard for shard in shards}
    todo = [shard for shard in known.values() if shard.index not in tally.done]
    who = (executor.workers, max_failed, watch, stop, log, check_lock, revisions or {}, executor.inside)
    run = Drive(ledger, plan, tally, known, todo, *who)
    run.write_status("running")
    try:
        try:
            if run.suspects.trouble:
                raise InfrastructureError(run.suspects.trouble)
            executor.run(run)
        except AtOnce:
            raise stop.error() from None
        finally:
            run.close()
        if stop.asked and len(tally.done) < plan.shards:
            raise stop.error()
        total = ledger.finish(plan)
    except BatchsdError as error:
        state = "stopped" if isinstance(error, Stopped) else "failed"
        with suppress(InfrastructureError):  # the lock is another's, or the storage fails: the error says so
            run.write_status(state, str(error), error.exit_code)
        raise
    over = all_drawn(total, max_failed)
    run.write_status("done", str(over or ""), over.exit_code if over else 0)
    return total
