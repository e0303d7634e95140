"""batchsd: a Parquet manifest of prompts in, a dataset of pictures out.

The front door for plugin authors: decorate functions with `hookimpl`, build on the names below, and test
with `batchsd.testing`. Importing batchsd pulls in neither torch nor ray nor numpy; what needs more (`LATER`) is loaded
when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import pluggy

from batchsd.scores import Filter, Score
from batchsd.types import (
    Blend,
    Branch,
    Conditioning,
    ModelFacts,
    Progress,
    Record,
    Request,
    RowError,
    Shard,
    ShardResult,
    Sink,
    SinkWriter,
    Task,
    UsageError,
)

if TYPE_CHECKING:
    from batchsd.columns import row_values
    from batchsd.diffusion.levels import Level, Levels
    from batchsd.diffusion.scheduler import Scheduler

__version__ = "0.1.0"  # pyproject.toml reads it from here

hookimpl = pluggy.HookimplMarker("batchsd")
"""Marks a plugin's function as the implementation of the hook of its name (see `batchsd.hookspecs`)."""

__all__ = [
    "Blend",
    "Branch",
    "Conditioning",
    "Filter",
    "Level",
    "Levels",
    "ModelFacts",
    "Progress",
    "Record",
    "Request",
    "RowError",
    "Scheduler",
    "Score",
    "Shard",
    "ShardResult",
    "Sink",
    "SinkWriter",
    "Task",
    "UsageError",
    "__version__",
    "hookimpl",
    "row_values",
]


LATER = {
    "Level": "batchsd.diffusion.levels",
    "Levels": "batchsd.diffusion.levels",
    "Scheduler": "batchsd.diffusion.scheduler",
    "row_values": "batchsd.columns",
}
"""Names whose modules take numpy or pyarrow along, and the modules."""


def __getattr__(name: str) -> Any:
    if name in LATER:
        return getattr(import_module(LATER[name]), name)
    raise AttributeError(f"module 'batchsd' has no attribute {name!r}")
