"""From a job to a plan: everything that can be wrong is found here, before a model loads or a worker starts.

job -> plugins, manifest, checkpoint hash -> shards -> Plan, and the Recipe of which a worker is built
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from batchsd import __version__, plugins
from batchsd.columns import output_schema
from batchsd.job import Job, check_names, model_extras, model_options, model_path, pixel_settings
from batchsd.ledger import Ledger
from batchsd.manifest import MAX_SHARDS, open_manifest
from batchsd.model.fingerprint import checkpoint_hash
from batchsd.pinned import pinned_facts
from batchsd.plan import Plan
from batchsd.plugins import Registry
from batchsd.reader import scan
from batchsd.recipe import Recipe, names_of, versions
from batchsd.store import open_store
from batchsd.types import Shard, UsageError
from batchsd.unbuilt import refuse_unbuilt

SHARD_ROWS = 256  # 1 to 5 minutes at 1 to 4 pictures a second; files of about 100 MB at 512 x 512


@dataclass(frozen=True)
class Prepared:
    """A checked job, ready to run. `recipe` pickles and builds a worker.

    `warnings` are lines for people, and so is what was `recognised` of the checkpoint.
    """

    plan: Plan
    shards: list[Shard]
    ledger: Ledger
    recipe: Recipe
    warnings: tuple[str, ...]
    recognised: tuple[str, ...]

    @property
    def max_failed(self) -> float:
        """The job's limit as a number of rows."""
        limit = self.recipe.job.run.max_failed
        return limit if isinstance(limit, int) else limit * self.plan.rows


def prepare(job: Job, workers: int, gpu: bool, limit: int | None = None) -> Prepared:
    """Check the job whole and plan it, without writing anything.

    `workers` and `gpu` say what it will run on: small jobs are cut finely enough for all workers, and the
    dtype "auto" becomes one dtype for the whole run. `limit` takes the manifest's first rows only. Where the
    job says "auto", a plan that stands in the output folder keeps its rows a shard.
    """
    from batchsd.model.inspect import recognised

    registry = plugins.build(job.plugins, Path())
    check_registered(job, registry)
    ledger = Ledger(open_store(output_uri(job, limit)))
    standing = ledger.plan()
    files = standing.files if standing else ()
    known = {(f["name"], f["size"], f["mtime_ns"]): f["sha256"] for f in files}
    manifest = open_manifest(job, known, names_of(registry))
    if job.run.strict:
        refuse_bad_rows(scan(manifest, job, names_of(registry)))
    rows_per_shard = job.output.rows_per_shard
    if rows_per_shard == "auto":
        rows = min(manifest.rows, limit or manifest.rows)
        measured = auto_rows(rows, job.input.repeat, len(manifest.files), workers)
        rows_per_shard = standing.rows_per_shard if standing else measured
    shards = first_rows(manifest.shards(rows_per_shard, job.input.repeat), limit)
    path = model_path(job)
    checkpoint = checkpoint_hash(path, model_extras(job))
    options = model_options(job)
    told = recognised(path, options["vae"], options["ema"])
    dtype = pinned_dtype(job, gpu)
    packed = registry.sources[1:]  # the first is batchsd itself
    facts = {"model": f"{path.name}@{checkpoint[:12]}", "checkpoint": checkpoint, "version": __version__}
    columns = output_schema(manifest.schema, job, facts)
    plan = Plan(
        number=1,
        hard={
            **pixel_settings(job),
            "checkpoint": checkpoint,
            "model.dtype": dtype,
            "output.embed": list(job.output.embed),
            "output.failed": job.output.failed,
            **pinned_facts(job, gpu),
            **{f"plugin {source.name}": source.sha256 or source.version for source in packed},
        },
        soft={
            **versions(),
            "backend": job.model.backend,
            "batch_size": job.run.batch_size,
            "gpu": gpu,
            "model": list(told),
        },
        files=tuple(file.facts() for file in manifest.files),
        rows=sum(shard.count for shard in shards) * job.input.repeat,
        rows_per_shard=rows_per_shard,
        repeat=job.input.repeat,
        shards=len(shards),
        sink=job.output.sink,
        schema={field.name: str(field.type) for field in columns},
        job=job.resolved(),
    )
    schema = output_schema(manifest.schema, job, {**facts, "plan": plan.hash})
    recipe = Recipe(job, manifest, packed, schema, checkpoint, dtype, ledger.store.uri)
    return Prepared(plan, shards, ledger, recipe, (*soft_differences(standing, plan), *slow_types(dtype, gpu)), told)


def slow_types(dtype: str, gpu: bool) -> tuple[str, ...]:
    """A line where a CPU is to compute in a half type."""
    if gpu or dtype == "float32":
        return ()
    return (f"model.dtype {dtype} on a CPU is 25 to 120 times slower than float32 there; leave it at 'auto'",)


def output_uri(job: Job, limit: int | None) -> str:
    """Where the run goes: a limited one beside the whole one, never into it."""
    return job.output.uri if limit is None else f"{job.output.uri.rstrip('/')}-limit-{limit}"


def check_registered(job: Job, registry: Registry) -> None:
    """Refuse a scheduler, task or sink that nobody brings, and settings that nothing acts on yet."""
    refuse_unbuilt(job)
    names = names_of(registry)
    check_names(job, "sampler.scheduler", names.schedulers)
    check_names(job, "conditioning.task", names.tasks)
    check_names(job, "output.sink", registry.sinks)


def auto_rows(rows: int, repeat: int, files: int, workers: int) -> int:
    """Output rows a shard: `SHARD_ROWS`, fewer where a small job could not keep every worker busy twice over.

    `rows` are manifest rows; the result is a multiple of `repeat`, and large enough for five-digit numbers.
    """
    wanted = min(SHARD_ROWS, rows * repeat // (2 * workers)) // repeat
    least = -(-rows // max(1, MAX_SHARDS - files))  # each file may end with a shorter shard
    return max(1, wanted, least) * repeat


def first_rows(shards: list[Shard], limit: int | None) -> list[Shard]:
    """The shards of the manifest's first `limit` rows, numbered as a plan of their own."""
    if limit is None:
        return shards
    kept, left = [], limit
    for shard in shards:
        if left <= 0:
            break
        kept.append(replace(shard, count=min(shard.count, left)))
        left -= shard.count
    return [replace(shard, total=len(kept)) for shard in kept]


def pinned_dtype(job: Job, gpu: bool) -> str:
    """One dtype for all workers, part of the plan: "auto" must not change when a run goes on elsewhere."""
    if job.model.dtype != "auto":
        return job.model.dtype
    if not gpu:
        return "float32"
    import torch

    # A driver without a GPU cannot ask; every GPU since 2020 has bfloat16.
    old = torch.cuda.is_available() and not torch.cuda.is_bf16_supported()
    return "float16" if old else "bfloat16"


def refuse_bad_rows(problems: Iterator[tuple[str, str]]) -> None:
    """run.strict: a bad value ends the run before it begins."""
    found = [f"row {key}: {what}" for key, what in islice(problems, 5)]
    if found:
        rest = sum(1 for _ in problems)
        more = [f"... and {rest} more (batchsd validate lists them)"] if rest else []
        raise UsageError("run.strict: the manifest has bad rows:\n  " + "\n  ".join(found + more))


def soft_differences(standing: Plan | None, plan: Plan) -> tuple[str, ...]:
    """What moves pixels by rounding at most, and is not as it was when the run began."""
    if standing is None:
        return ()
    before, now = standing.soft, plan.soft
    changed = [name for name in now if before.get(name) != now[name]]
    return tuple(f"{name} was {before.get(name)} when this run began, now {now[name]}" for name in changed)
