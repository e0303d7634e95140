"""What a deterministic run pins in its plan, beside the settings that change pixels: all that decides a row's bytes."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from batchsd.job import Job

# Where the job leaves the batch size open: what fits must not depend on a machine's free memory.
FIXED_LANES = 16

# Threads of a worker on a CPU. How a sum is split depends on their number, so it must not come from the number of
# workers or cores; more workers use more cores.
FIXED_THREADS = 1


def lanes_of(job: Job) -> int:
    """Lanes a network call; 0: the engine measures."""
    if job.run.batch_size != "auto":
        return job.run.batch_size
    return FIXED_LANES if job.run.deterministic else 0


def pinned_facts(job: Job, gpu: bool) -> dict[str, Any]:
    """Hard facts of the plan where the job is deterministic, else none."""
    if not job.run.deterministic:
        return {}
    facts = {"run.deterministic": True, "run.batch_size": lanes_of(job), "gpu": gpu, "torch": version("torch")}
    return facts | {"backend": job.model.backend, "threads": FIXED_THREADS}
