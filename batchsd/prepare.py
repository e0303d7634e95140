"""From a job to a plan: everything that can be wrong is found here, before a model loads or a worker starts.

job -> plugins, manifest, checkpoint hash -> shards -> Plan, and the Recipe of which a worker is built
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchsd import __version__, plugins
from batchsd.columns import output_schema
from batchsd.job import Job, check_names, model_extras, model_options, model_path, pixel_settings
from batchsd.ledger import Ledger
from batchsd.manifest import MAX_SHARDS, Manifest, open_manifest
from batchsd.model.fingerprint import checkpoint_hash
from batchsd.pinned import FIXED_THREADS, lanes_of, pinned_facts
from batchsd.plan import Plan
from batchsd.plugin_source import Source
from batchsd.plugins import Registry
from batchsd.prompts import prompts_for
from batchsd.provenance import Told
from batchsd.reader import Reader, scan
from batchsd.rows import Names, row_hasher
from batchsd.run import Workbench
from batchsd.sinks.aside import Aside
from batchsd.store import open_store
from batchsd.types import Shard, Sink, UsageError
from batchsd.unbuilt import refuse_unbuilt

if TYPE_CHECKING:
    import pyarrow as pa

SHARD_ROWS = 256  # 1 to 5 minutes at 1 to 4 pictures a second; files of about 100 MB at 512 x 512


@dataclass(frozen=True)
class Prepared:
    """A checked job, ready to run. `recipe` pickles and builds a worker; `warnings` are lines for people."""

    plan: Plan
    shards: list[Shard]
    ledger: Ledger
    recipe: Recipe
    warnings: tuple[str, ...]

    @property
    def max_failed(self) -> float:
        """The job's limit as a number of rows."""
        limit = self.recipe.job.run.max_failed
        return limit if isinstance(limit, int) else limit * self.plan.rows


@dataclass(frozen=True)
class Recipe:
    """How a worker builds its workbench, wherever it is. All of it pickles; one-file plugins as text."""

    job: Job
    manifest: Manifest
    plugins: tuple[Source, ...]
    schema: pa.Schema
    checkpoint: str
    dtype: str
    uri: str

    def __call__(self, device: str = "", threads: int = 0) -> Workbench:
        """Load plugins and model, make the engine. `device` is over the job's; `threads` 0: torch's own."""
        import torch

        from batchsd.encode import encoder
        from batchsd.engine import Engine
        from batchsd.model.checkpoint import load
        from batchsd.network import repeatable

        job = self.job
        if job.run.deterministic:
            repeatable()
            threads = FIXED_THREADS
        if threads:
            torch.set_num_threads(threads)
        registry = plugins.build(self.plugins, Path())
        model = load(model_path(job), self.dtype, device or job.model.device, **model_options(job))
        engine = Engine(
            model,
            schedulers=registry.schedulers,
            tasks=registry.tasks,
            encode=encoder(job.output.image.options()),
            settings=engine_settings(job),
            encode_texts=prompts_for(model, job.conditioning.prompt_syntax, job.conditioning.long_prompts),
        )
        return Workbench(
            generate=engine.generate,
            read=self.reader(registry).read,
            repeat=job.input.repeat,
            sink=sink_of(job, registry),
            schema=self.schema,
            store=open_store(self.uri, job.run.scratch),
            hook=registry.hook,
            lap=engine.meter.lap,
            facts={
                **versions(),
                "dtype": self.dtype,
                "device": device_name(model.device),
                "backend": job.model.backend,
                "batch_size": engine.settings.lanes or "auto",
                "threads": torch.get_num_threads(),
            },
        )

    def reader(self, registry: Registry | None = None) -> Reader:
        """Reads shards of the manifest, on a worker or anywhere else."""
        names = names_of(registry or plugins.build(self.plugins, Path()))
        return Reader(self.manifest, self.job, names, row_hasher(self.checkpoint, pixel_settings(self.job)))

    def sink(self) -> Sink:
        return sink_of(self.job, plugins.build(self.plugins, Path()))


def prepare(job: Job, workers: int, gpu: bool, limit: int | None = None) -> Prepared:
    """Check the job whole and plan it, without writing anything.

    `workers` and `gpu` say what it will run on: small jobs are cut finely enough for all workers, and the
    dtype "auto" becomes one dtype for the whole run. `limit` takes the manifest's first rows only. Where the
    job says "auto", a plan that stands in the output folder keeps its rows a shard.
    """
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
        soft={**versions(), "backend": job.model.backend, "batch_size": job.run.batch_size, "gpu": gpu},
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
    return Prepared(plan, shards, ledger, recipe, soft_differences(standing, plan))


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


@dataclass(frozen=True)
class SchedulerNames:
    """Every spelling of every scheduler is known; only the plain names are listed in messages."""

    plain: tuple[str, ...]
    spellings: frozenset[str]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name == "model" or name.lower() in self.spellings)

    def __iter__(self) -> Iterator[str]:
        return iter(("model", *self.plain))

    def __len__(self) -> int:
        return len(self.plain) + 1


def names_of(registry: Registry) -> Names:
    """What the rows of a manifest may say."""
    from batchsd.diffusion.builtin import names

    spellings = frozenset(names(registry.schedulers.values()))
    schedulers = SchedulerNames(tuple(registry.schedulers), spellings)
    return Names(schedulers, {name: task.columns for name, task in registry.tasks.items()})


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


def sink_of(job: Job, registry: Registry) -> Sink:
    """The job's output layout: pictures that tell what they are, failed rows aside where it says so."""
    sink = registry.sinks[job.output.sink]
    if job.output.embed:
        sink = Told(sink, job.output.embed)
    return Aside(sink) if job.output.failed == "aside" else sink


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


def engine_settings(job: Job) -> Any:
    """The job's words in the engine's."""
    from batchsd.engine import Settings

    sampler = job.sampler
    options = {name: getattr(sampler, name) for name in ("spacing", "sigmas", "eta", "final_sigma")}
    return Settings(
        lanes=lanes_of(job),
        guidance_rescale=sampler.guidance_rescale,
        guidance_interval=sampler.guidance_interval,
        scheduler_options={name: value for name, value in options.items() if value not in (None, "")},
        deterministic=job.run.deterministic,
    )


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


def versions() -> dict[str, str]:
    return {"batchsd": __version__, "torch": version("torch"), "python": platform.python_version()}


def device_name(device: Any) -> str:
    """`cpu x86_64`, or the GPU's name."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {platform.machine()}"
