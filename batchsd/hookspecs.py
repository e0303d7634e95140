"""The hooks that a plugin may implement, each under its own name with `@batchsd.hookimpl`.

`register_*` give named things; `shard_started`, `batch_done` and `shard_done` watch, in the worker. Hooks
never change a row on its way. Registering happens in the driver and again in every worker, so it must be
cheap and without effects.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pluggy

from batchsd.scores import Filter, Score
from batchsd.types import Progress, Shard, ShardResult, Sink, Task

if TYPE_CHECKING:
    from batchsd.diffusion.scheduler import Scheduler

hookspec = pluggy.HookspecMarker("batchsd")


@hookspec
def register_schedulers() -> Mapping[str, Scheduler]:  # type: ignore[empty-body]
    """Samplers under the names that a job's `sampler.scheduler` may say."""


@hookspec
def register_tasks() -> Mapping[str, Task]:  # type: ignore[empty-body]
    """Kinds of conditioning under the names that a job's `conditioning.task` may say."""


@hookspec
def register_sinks() -> Mapping[str, Sink]:  # type: ignore[empty-body]
    """Output layouts under the names that a job's `output.sink` may say."""


@hookspec
def register_scores() -> Mapping[str, Score]:  # type: ignore[empty-body]
    """Numbers about finished pictures, under the names that a job's `output.scores` may say; a column each."""


@hookspec
def register_filters() -> Mapping[str, Filter]:  # type: ignore[empty-body]
    """What a picture must pass, under the names that a job's `output.filters` may say."""


@hookspec
def shard_started(shard: Shard) -> None:
    """A worker begins to read this shard."""


@hookspec
def batch_done(progress: Progress) -> None:
    """Rows of one shard are finished: how many more than at the last call, and which keys are in flight."""


@hookspec
def shard_done(shard: Shard, result: ShardResult) -> None:
    """A worker has handed in this shard; the driver has yet to commit it."""
