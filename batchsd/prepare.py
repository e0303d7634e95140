"""From a job to a plan: everything that can be wrong is found here, before a model loads or a worker starts.

job -> plugins, manifest, checkpoint hash -> shards -> Plan, and the Recipe of which a worker is built
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from batchsd import __version__, plugins
from batchsd.columns import output_schema
from batchsd.job import Job, check_names, digest, model_extras, model_options, model_path, pixel_settings
from batchsd.judging import chosen
from batchsd.ledger import Ledger, ledgers
from batchsd.manifest import MAX_SHARDS, Manifest, divide, open_manifest
from batchsd.model.fingerprint import checkpoint_hash
from batchsd.pinned import pinned_facts
from batchsd.plan import Plan
from batchsd.plugin_source import source_facts
from batchsd.plugins import Registry
from batchsd.reader import scan
from batchsd.recipe import Recipe, names_of, versions
from batchsd.retrying import patient
from batchsd.store import open_store
from batchsd.types import Shard, UsageError

SHARD_ROWS = 256  # 1 to 5 minutes at 1 to 4 pictures a second; files of about 100 MB at 512 x 512


@dataclass(frozen=True)
class Prepared:
    """One plan of a checked job, ready to run. `recipe` pickles and builds a worker.

    `warnings` are lines for people, and so is what was `recognised` of the checkpoint.
    """

    plan: Plan
    shards: list[Shard]
    ledger: Ledger
    recipe: Recipe
    warnings: tuple[str, ...]
    recognised: tuple[str, ...]
    registry: Registry

    @property
    def max_failed(self) -> float:
        """The job's limit as a number of rows."""
        limit = self.recipe.job.run.max_failed
        return limit if isinstance(limit, int) else limit * self.plan.rows


def prepare(job: Job, workers: int, gpu: bool, limit: int | None = None) -> list[Prepared]:
    """Check the job whole and plan it, without writing anything.

    One `Prepared` for each plan that stands in the output folder, of the same files as they are now; then one for
    what the manifest has besides: all of it in a fresh folder, later its new files and rows (`manifest.divide`).

    `workers` and `gpu` say what it will run on: small jobs are cut finely enough for all workers, and the
    dtype "auto" becomes one dtype for the whole run. `limit` takes the manifest's first rows only. Where the
    job says "auto", a plan that stands keeps its rows a shard.
    """
    registry = plugins.build(job.plugins, Path())
    check_registered(job, registry)
    store = patient(open_store(job.output.uri))
    standing = [plan for ledger in ledgers(store) if (plan := ledger.plan())]
    known = {(f["name"], f["size"], f["mtime_ns"]): f["sha256"] for plan in standing for f in plan.files}
    manifest = open_manifest(job, known, names_of(registry))
    if job.run.strict:
        refuse_bad_rows(scan(manifest, job, names_of(registry)))
    parts, rest = divide(manifest, [plan.files for plan in standing])
    if limit is not None:
        rest = None if rest is None or standing else rest.head(limit)
    if rest is not None:
        if standing:
            refuse_other_columns(manifest, rest, standing[0], job)
        parts.append(rest)
    draft = Draft.of(job, registry, gpu, limit, standing[0] if standing else None)
    found = []
    for number, part in enumerate(parts, start=1):
        before = standing[number - 1] if number <= len(standing) else None
        rows_per_shard = job.output.rows_per_shard
        if rows_per_shard == "auto":
            measured = auto_rows(part.rows, job.input.repeat, len(part.files), workers)
            rows_per_shard = before.rows_per_shard if before else measured
        found.append(draft.prepared(part, Ledger(store, number), rows_per_shard, before))
    return found


@dataclass(frozen=True)
class Draft:
    """What all plans of a job have in common."""

    job: Job
    registry: Registry
    checkpoint: str
    dtype: str
    hard: Mapping[str, Any]
    soft: Mapping[str, Any]
    limit: int | None
    gpu: bool
    recognised: tuple[str, ...]

    @classmethod
    def of(cls, job: Job, registry: Registry, gpu: bool, limit: int | None, standing: Plan | None) -> Draft:
        checkpoint = checkpoint_hash(model_path(job), model_extras(job))
        told = recognised(job, checkpoint, standing)
        dtype = pinned_dtype(job, gpu)
        packed = registry.sources[1:]  # the first is batchsd itself
        hard = {
            **pixel_settings(job),
            "checkpoint": checkpoint,
            "model.dtype": dtype,
            "output.embed": list(job.output.embed),
            "output.failed": job.output.failed,
            "output.scores": list(job.output.scores),
            "output.filters": list(job.output.filters),
            "output.rejected": job.output.rejected,
            **chosen(job, registry).facts(),
            **pinned_facts(job, gpu),
            **source_facts(packed),
        }
        soft = {
            **versions(),
            "backend": job.model.backend,
            "batch_size": job.run.batch_size,
            "gpu": gpu,
            "model": list(told),
        }
        return cls(job, registry, checkpoint, dtype, hard, soft, limit, gpu, told)

    def prepared(self, manifest: Manifest, ledger: Ledger, rows_per_shard: int, standing: Plan | None) -> Prepared:
        """The plan of one part of the manifest; `standing` is that part's, as it was planned before."""
        job = self.job
        shards = manifest.shards(rows_per_shard, job.input.repeat, ledger.number)
        model = f"{model_path(job).name}@{self.checkpoint[:12]}"
        files = tuple(file.facts() for file in manifest.files)
        facts = {
            "model": model,
            "checkpoint": self.checkpoint,
            "version": __version__,
            "versions": versions(),
            "input": listed(files),
        }
        columns = output_schema(manifest.schema, job, facts)
        plan = Plan(
            number=ledger.number,
            hard=self.hard,
            soft=self.soft,
            files=files,
            rows=manifest.rows * job.input.repeat,
            rows_per_shard=rows_per_shard,
            repeat=job.input.repeat,
            shards=len(shards),
            sink=job.output.sink,
            schema={field.name: str(field.type) for field in columns},
            job=job.resolved(),
            limit=self.limit,
            arrow=base64.b64encode(columns.serialize().to_pybytes()).decode(),
        )
        schema = output_schema(manifest.schema, job, {**facts, "plan": plan.hash})
        packed = self.registry.sources[1:]
        recipe = Recipe(job, manifest, packed, schema, self.checkpoint, self.dtype, ledger.store.uri)
        warnings = (*soft_differences(standing, plan), *slow_types(self.dtype, self.gpu))
        return Prepared(plan, shards, ledger, recipe, warnings, self.recognised, self.registry)


def recognised(job: Job, checkpoint: str, standing: Plan | None) -> tuple[str, ...]:
    """What the checkpoint was recognised as. One that a standing plan knows is not read again: torch loads slowly."""
    if standing is not None and standing.hard.get("checkpoint") == checkpoint and "model" in standing.soft:
        return tuple(standing.soft["model"])
    from batchsd.model import inspect

    options = model_options(job)
    return inspect.recognised(model_path(job), options["vae"], options["ema"])


def listed(files: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What an output file says of its inputs: the first hundred by name, all of them in one hash."""
    first = [{name: file[name] for name in ("name", "size", "sha256")} for file in files[:100]]
    return {"count": len(files), "hash": digest([file["sha256"] for file in files]), "files": first}


def slow_types(dtype: str, gpu: bool) -> tuple[str, ...]:
    """A line where a CPU is to compute in a half type."""
    if gpu or dtype == "float32":
        return ()
    return (f"model.dtype {dtype} on a CPU is 25 to 120 times slower than float32 there; leave it at 'auto'",)


def refuse_other_columns(manifest: Manifest, rest: Manifest, standing: Plan, job: Job) -> None:
    """New files may not change the columns of the pictures that are there: readers take one schema a folder."""
    schema = {field.name: str(field.type) for field in output_schema(manifest.schema, job, {})}
    changed = [name for name, kind in schema.items() if standing.schema.get(name) != kind]
    if changed:
        names = ", ".join(file.name for file in rest.files[:3]) + (", ..." if len(rest.files) > 3 else "")
        raise UsageError(
            f"{job.where('input.manifest')}: with its new files ({names}) the output's column {changed[0]!r} is "
            f"{schema[changed[0]]}; in the pictures that are there it is {standing.schema.get(changed[0], 'absent')}; "
            "write new files with the old columns, or draw all into another folder with --new"
        )


def check_registered(job: Job, registry: Registry) -> None:
    """Refuse a scheduler, task, sink, score or filter that nobody brings, and a scheduler that fits no table."""
    names = names_of(registry)
    check_names(job, "sampler.scheduler", names.schedulers)
    said = registry.schedulers.get(job.sampler.scheduler)
    if said is not None and said.refused:
        where = job.where("sampler.scheduler")
        raise UsageError(f"{where}: {job.sampler.scheduler!r} cannot run as a table: {said.refused}")
    check_names(job, "conditioning.task", names.tasks)
    check_names(job, "output.sink", registry.sinks)
    chosen(job, registry)


def auto_rows(rows: int, repeat: int, files: int, workers: int) -> int:
    """Output rows a shard: `SHARD_ROWS`, fewer where a small job could not keep every worker busy twice over.

    `rows` are manifest rows; the result is a multiple of `repeat`, and large enough for five-digit numbers.
    """
    wanted = min(SHARD_ROWS, rows * repeat // (2 * workers)) // repeat
    least = -(-rows // max(1, MAX_SHARDS - files))  # each file may end with a shorter shard
    return max(1, wanted, least) * repeat


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
