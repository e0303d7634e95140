"""A job as files for a cluster's own scheduler: Kubernetes, Slurm, cron. The templates lie in infra/.

    job + a few facts of the cluster -> values -> template -> text

What the job says (workers, GPUs a worker, device, grace) decides the sizes; what would not be there on the other
machine (a manifest on this one's disk) is refused here, not found out by a pod at night.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from math import ceil
from pathlib import Path
from typing import Any

from batchsd import __version__
from batchsd.job import DATED, Job
from batchsd.types import UsageError

JOB_FOLDER = "/etc/batchsd"  # where the job file lies in the driver's pod
DATE = "__DATE__"  # in the entrypoint of a RayJob that a CronJob makes; infra/kubernetes/submit.py knows it too
WARNING = 180  # seconds before Slurm's limit at which it sends SIGUSR1, at least
LABEL = re.compile(r"[^a-z0-9]+")


@dataclass(frozen=True)
class Volume:
    """A PersistentVolumeClaim and where the pods see it, written `models:/models`."""

    claim: str
    path: str

    @classmethod
    def parse(cls, text: str) -> Volume:
        claim, _, path = text.partition(":")
        if not claim or not path.startswith("/"):
            raise UsageError(f"--volume {text}: write it as CLAIM:/path")
        return cls(claim, path.rstrip("/"))


@dataclass(frozen=True)
class Crew:
    """`pods` machines with `gpus` GPUs each hold `workers` workers in all."""

    pods: int
    gpus: int
    workers: int


def size_crew(job: Job) -> Crew:
    """From the job's workers and GPUs a worker; "auto" is one machine, to be raised by hand."""
    workers = 1 if job.ray.workers == "auto" else int(job.ray.workers)
    share = 0.0 if job.model.device == "cpu" else job.ray.gpus_per_worker
    if not share:
        return Crew(workers, 0, workers)
    each = 1 if share > 1 else int(1 / share + 1e-9)  # workers on one machine
    return Crew(ceil(workers / each), ceil(share), workers)


def kubernetes(
    path: Path,
    job: Job,
    sets: tuple[str, ...],
    *,
    image: str,
    name: str,
    namespace: str,
    volumes: tuple[Volume, ...],
    secrets: tuple[str, ...],
    node_selector: Mapping[str, str],
    queue: str,
    service_account: str,
    seconds: int,
    autoscale: bool,
    schedule: str,
    time_zone: str,
    submit_image: str,
    alpha: bool,
) -> str:
    """A RayJob; with a `schedule` the CronJob that makes one, or (`alpha`) a RayCronJob.

    Raises UsageError for a job that such a cluster could not run.
    """
    name = resource_name(name or path.stem)
    if autoscale and job.ray.workers == "auto":
        raise UsageError(
            f"{job.where('ray.workers')}: an autoscaled cluster begins with no GPU, so 'auto' would find none: "
            "give a number (--set ray.workers=8)"
        )
    if alpha and schedule and is_dated(path, sets):
        raise UsageError(
            "a RayCronJob cannot tell its job the scheduled day, which {date} needs (a restart after midnight would "
            "begin another run); leave out --raycronjob"
        )
    files, overrides = carried(path, job, volumes)
    command = ["batchsd", "run", f"{JOB_FOLDER}/{path.name}"]
    for text in (*sets, *overrides):
        command += ["--set", text]
    if schedule and not alpha:
        command += ["--date", DATE]
    crew = size_crew(job)
    if autoscale and crew.gpus and job.model.device == "auto":
        command += ["--set", "model.device=cuda"]  # it begins without a GPU, which "auto" would refuse
    values = {
        "header": header("k8s", path),
        "name": name,
        "namespace": namespace,
        "labels": {"app.kubernetes.io/name": "batchsd", "app.kubernetes.io/instance": name}
        | ({"kueue.x-k8s.io/queue-name": queue} if queue else {}),
        "files": files,
        "entrypoint": shlex.join(command),
        "job_folder": JOB_FOLDER,
        "image": image or f"batchsd:{__version__}-{'gpu' if crew.gpus else 'cpu'}",
        "volumes": [asdict(volume) for volume in volumes],
        "secrets": secrets,
        "node_selector": dict(node_selector),
        "queue": queue,
        "service_account": service_account,
        "seconds": seconds,
        "autoscale": autoscale,
        "pods": crew.pods,
        "gpus": crew.gpus,
        "cpu": "4",
        "memory": "16Gi",
        "ray_version": version("ray"),
        "schedule": schedule,
        "time_zone": time_zone,
    }
    if not schedule:
        return render("kubernetes/rayjob.yaml.j2", values)
    if alpha:
        return render("kubernetes/raycronjob.yaml.j2", values)
    return render("kubernetes/cronjob.yaml.j2", values | cron_values(values, submit_image))


def cron_values(values: Mapping[str, Any], submit_image: str) -> dict[str, Any]:
    """What the CronJob needs more: the script of its pod, and the RayJob that this posts."""
    import yaml

    documents = yaml.safe_load_all(render("kubernetes/rayjob.yaml.j2", values))
    (rayjob,) = (document for document in documents if document["kind"] == "RayJob")
    submit = (sources() / "kubernetes" / "submit.py").read_text("utf-8")
    return {"submit": submit, "rayjob_json": json.dumps(rayjob), "submit_image": submit_image}


def slurm(
    path: Path,
    job: Job,
    sets: tuple[str, ...],
    *,
    name: str,
    nodes: int,
    gpus_per_node: int | None,
    cpus: int,
    time_limit: str,
    partition: str,
    account: str,
    setup: str,
) -> str:
    """An sbatch script for one node or several; requeued where the driver stopped cleanly with work left."""
    crew = size_crew(job)
    gpus = crew.gpus if gpus_per_node is None else gpus_per_node
    if job.ray.workers == "auto" and nodes > 1:
        share = job.ray.gpus_per_worker
        sets = (*sets, f"ray.workers={int(nodes * gpus / share) if gpus and share else nodes}")
    if not gpus and job.model.device == "auto":
        sets = (*sets, "model.device=cpu")  # "auto" would refuse a cluster without GPUs
    warning = max(WARNING, int(job.run.grace) + 60)
    if time_limit and seconds_of(time_limit) <= warning + 60:
        raise UsageError(
            f"--time-limit {time_limit}: too short, as the job is told to stop {warning} s before, or a minute earlier"
        )
    values = {
        "header": header("slurm", path),
        "name": resource_name(name or path.stem),
        "nodes": nodes,
        "gpus_per_node": gpus,
        "cpus": cpus,
        "time_limit": time_limit,
        "partition": partition,
        "account": account,
        "setup": setup,
        "warning": warning,
        "folder": str(Path.cwd()),
        "command": command_line(path, sets),
        "ray": program("ray"),
    }
    return render("slurm/job.sh.j2", values)


def seconds_of(limit: str) -> int:
    """A time as Slurm writes it: 90 (minutes), 90:00, 1:30:00, 2-12, 2-12:30 or 2-12:30:00. Raises UsageError."""
    days, dash, clock = limit.rpartition("-")
    units = (3600, 60, 1) if dash or clock.count(":") == 2 else (60, 1)
    try:
        parts = [int(part) for part in clock.split(":")]
        return int(days or 0) * 86400 + sum(part * unit for part, unit in zip(parts, units, strict=False))
    except ValueError:
        raise UsageError(f"--time-limit {limit}: write it as Slurm does: 12:00:00, or 2-00:00:00") from None


def crontab(path: Path, sets: tuple[str, ...], *, name: str, schedule: str) -> str:
    """A line for crontab(5), tried again where that can help."""
    values = {
        "header": header("cron", path),
        "name": resource_name(name or path.stem),
        "schedule": schedule,
        "folder": str(Path.cwd()),
        "command": command_line(path, sets),
    }
    return render("cron/crontab.j2", values)


def command_line(path: Path, sets: tuple[str, ...]) -> str:
    """The job's command with this environment's batchsd, for a shell in this folder."""
    words = [program("batchsd"), "run", str(path.absolute())]
    for text in sets:
        words += ["--set", text]
    return shlex.join(words)


def program(name: str) -> str:
    """This environment's: the shell of a job knows of no environment."""
    found = Path(sys.executable).parent / name
    return str(found) if found.exists() else name


def carried(path: Path, job: Job, volumes: tuple[Volume, ...]) -> tuple[dict[str, str], list[str]]:
    """The files that go into the driver's pod, by name, and the `--set` texts that a moved job file needs.

    Raises UsageError where the job names something that no pod would have.
    """
    files = {path.name: path.read_text("utf-8")}
    overrides = []
    for key, value in local_paths(job):
        if not any(Path(value).is_relative_to(volume.path) for volume in volumes):
            raise UsageError(
                f"{job.where(key)}: {value} is on this machine; a pod sees object stores, shipped models and what "
                "--volume CLAIM:/path mounts"
            )
        overrides.append(f"{key}={value}")
    plugins = [str(plugin) for plugin in job.plugins]
    for index, plugin in enumerate(plugins):
        if "/" in plugin:
            source = Path(plugin)
            files[source.name] = source.read_text("utf-8")
            plugins[index] = f"{JOB_FOLDER}/{source.name}"
    if plugins != list(job.plugins):
        overrides.append(f"plugins={json.dumps(plugins)}")
    return files, overrides


def local_paths(job: Job) -> list[tuple[str, str]]:
    """Every setting that names a file of this machine: absolute by now, unlike URIs, shipped and hub names."""
    manifests = [job.input.manifest] if isinstance(job.input.manifest, str) else job.input.manifest
    named = [("input.manifest", text) for text in manifests]
    named += [("output.uri", job.output.uri), ("run.scratch", job.run.scratch)]
    named += [(f"model.{key}", getattr(job.model, key)) for key in ("path", "vae", "tokenizer")]
    named += [("model.loras", text) for text in job.model.loras]
    named += [("model.embeddings", text) for text in job.model.embeddings]
    return [(key, str(text)) for key, text in named if str(text).startswith("/")]


def is_dated(path: Path, sets: tuple[str, ...]) -> bool:
    """Whether {date} stands in a setting where it means the day."""
    import tomllib

    tables = tomllib.loads(path.read_text("utf-8"))
    texts = [str(tables.get(section, {}).get(key, "")) for section, key in DATED]
    return any("{date}" in text for text in (*texts, *sets))


def resource_name(text: str) -> str:
    """A name that Kubernetes takes for all that is made of it, a CronJob's Jobs included: 52 characters less 7."""
    name = LABEL.sub("-", text.lower()).strip("-")[:45].strip("-")
    if not name:
        raise UsageError(f"--name {text!r}: needs a letter or a digit")
    return name


def header(target: str, path: Path) -> str:
    return f"# Made by batchsd {__version__}: batchsd infra {target} {path.name}"


def sources() -> Path:
    """The folder infra/: beside the package in a checkout, inside it where it is installed."""
    here = Path(__file__).parent
    return here / "infra_files" if (here / "infra_files").is_dir() else here.parent / "infra"


def render(template: str, values: Mapping[str, Any]) -> str:
    """A template of infra/ with `values`; a value that a template forgot to be given is an error."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(sources()), undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "ensure_ascii": False}
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.filters["quote"] = shlex.quote
    return environment.get_template(template).render(values)
