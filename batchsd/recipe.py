"""The Recipe: how a worker builds its workbench, wherever it is. It pickles; nothing of it was loaded before.

job + manifest + plugins + checkpoint's path -> registry, model, engine, sink -> Workbench
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchsd import __version__, plugins
from batchsd.bench import Workbench
from batchsd.job import Job, model_extras, model_options, model_path, pixel_settings
from batchsd.judging import chosen, judging
from batchsd.manifest import Manifest
from batchsd.model.fingerprint import checkpoint_hash
from batchsd.pinned import FIXED_THREADS, lanes_of
from batchsd.plugin_source import Source
from batchsd.plugins import Registry
from batchsd.prompts import prompts_for
from batchsd.provenance import Told
from batchsd.reader import Reader
from batchsd.rows import Names, row_hasher
from batchsd.sinks.aside import Aside
from batchsd.store import open_store
from batchsd.types import Sink, UsageError
from batchsd.vouched import Vouched

if TYPE_CHECKING:
    import pyarrow as pa

    from batchsd.engine import Engine

PACKAGES = ("torch", "ray", "transformers", "pyarrow", "pillow")
WHO = ("host", "pid")  # facts of a marker that say who drew, not how


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

        from batchsd.network import out_of_memory

        job, registry = self.job, plugins.build(self.plugins, Path())
        engine = self.engine(registry, device, threads)
        engine.judge = judging(chosen(job, registry), str(engine.device), out_of_memory)
        return Workbench(
            generate=engine.generate,
            read=self.reader(registry).read,
            repeat=job.input.repeat,
            sink=sink_of(job, registry),
            schema=self.schema,
            store=open_store(self.uri, job.run.scratch),
            hook=registry.hook,
            lap=engine.meter.lap,
            beat=lambda: engine.meter.network_calls + engine.meter.pictures,
            facts={
                **versions(),
                **cuda_versions(engine.device),
                "host": platform.node(),
                "pid": os.getpid(),
                "dtype": self.dtype,
                "device": device_name(engine.device),
                "backend": job.model.backend,
                "batch_size": engine.settings.lanes or "auto",
                "threads": torch.get_num_threads(),
            },
        )

    def engine(self, registry: Registry, device: str = "", threads: int = 0) -> Engine:
        """The engine alone, without the job's scores and filters; see `__call__`."""
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
        path = model_path(job)
        self.refuse_another(path)
        model = load(path, self.dtype, device or job.model.device, **model_options(job))
        return Engine(
            model,
            schedulers=registry.schedulers,
            tasks=registry.tasks,
            encode=encoder(job.output.image.options()),
            settings=engine_settings(job),
            prompts=prompts_for(model, job.conditioning.prompt_syntax, job.conditioning.long_prompts),
        )

    def refuse_another(self, path: Path) -> None:
        """Raises UsageError where this machine has another checkpoint there than the plan was made of."""
        found = checkpoint_hash(path, model_extras(self.job))
        if found != self.checkpoint:
            raise UsageError(
                f"{self.job.where('model.path')}: {path} on {platform.node()} is checkpoint {found[:12]}, the plan was "
                f"made of {self.checkpoint[:12]}; bring the same files to every machine"
            )

    def reader(self, registry: Registry | None = None) -> Reader:
        """Reads shards of the manifest, on a worker or anywhere else."""
        names = names_of(registry or plugins.build(self.plugins, Path()))
        return Reader(self.manifest, self.job, names, row_hasher(self.checkpoint, pixel_settings(self.job)))

    def sink(self) -> Sink:
        return sink_of(self.job, plugins.build(self.plugins, Path()))


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
    from batchsd.diffusion.builtin import spellings

    schedulers = SchedulerNames(tuple(registry.schedulers), frozenset(spellings(tuple(registry.schedulers.values()))))
    return Names(schedulers, {name: task.columns for name, task in registry.tasks.items()})


def sink_of(job: Job, registry: Registry) -> Sink:
    """The job's output layout: pictures that tell what they are, failed rows aside where it says so."""
    sink, owner = registry.sinks[job.output.sink], registry.owners["sink", job.output.sink]
    if owner != plugins.BUILTIN.name:
        sink = Vouched(sink, job.output.sink, owner)
    if job.output.embed:
        sink = Told(sink, job.output.embed, partial(called, job, registry))
    return Aside(sink) if job.output.failed == "aside" else sink


def called(job: Job, registry: Registry, scheduler: str) -> tuple[str, str]:
    """See `provenance.Called`. The checkpoint's own scheduler, whose name no row says, is "model"."""
    from batchsd.diffusion.builtin import common_name

    if scheduler == "model":
        return scheduler, ""
    name, curve = common_name(scheduler, {}, registry.schedulers)
    return name, curve or job.sampler.sigmas.replace("_", " ").title()


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
        backend=job.model.backend,
    )


def versions() -> dict[str, str]:
    """Of what may change a picture's bytes, or must be the same on all nodes."""
    packages = {package: version(package) for package in PACKAGES}
    return {"batchsd": __version__, "python": platform.python_version(), **packages}


def cuda_versions(device: Any) -> dict[str, str]:
    """The GPU's driver, as the kernel tells it, and the CUDA that torch was built for."""
    import torch

    if device.type != "cuda":
        return {}
    driver = Path("/sys/module/nvidia/version")
    return {"driver": driver.read_text().strip() if driver.exists() else "unknown", "cuda": str(torch.version.cuda)}


def device_name(device: Any) -> str:
    """`cpu x86_64`, or the GPU's name."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {platform.machine()}"
