"""Settings that the job format has and that this version cannot act on yet.

They are refused, not ignored: a run that silently leaves out a LoRA is worse than none.
"""

from __future__ import annotations

from batchsd.job import Job
from batchsd.types import UsageError

NOT_BUILT = {
    "model.vae": "another VAE than the checkpoint's own",
    "model.loras": "LoRA weights",
    "model.embeddings": "textual inversion",
    "model.clip_skip": "clip skip",
    "model.tokenizer": "another tokenizer than the checkpoint's own",
    "model.backend": "another backend than eager torch",
    "conditioning.prompt_syntax": "weights in prompts",
    "conditioning.long_prompts": "prompts in several chunks",
    "output.failed": "a table of their own for failed rows",
    "run.deterministic": "bytes that do not depend on the batch",
    "run.deadline": "an end by the clock",
    "run.scratch": "another scratch folder than the output's own",
}


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
