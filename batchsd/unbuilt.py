"""Settings that the job format has and that this version cannot act on yet.

They are refused, not ignored: a run that silently leaves out a setting is worse than none.
"""

from __future__ import annotations

from batchsd.job import Job
from batchsd.types import UsageError

NOT_BUILT: dict[str, str] = {}


def refuse_unbuilt(job: Job) -> None:
    """Raises UsageError, a line a setting, where the job wants something of `NOT_BUILT`."""
    lines = []
    for key, what in NOT_BUILT.items():
        section, name = key.split(".")
        chosen = getattr(job, section)
        if getattr(chosen, name) != type(chosen).model_fields[name].default:
            lines.append(f"{job.where(key)}: {what} is not built yet; leave the setting out")
    if lines:
        raise UsageError("\n".join(lines))
