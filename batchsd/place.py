"""Where a job runs: in this process, on a private Ray here, or on a cluster; and with how many workers.

One worker alone runs in this process: it needs no Ray. Ray itself is touched only through `cluster` and `seats`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from batchsd.access import CURRENT_CLUSTER, check_access, is_node, warning
from batchsd.deadlines import Patience
from batchsd.executor import Executor, InProcess
from batchsd.job import Job
from batchsd.types import InfrastructureError, UsageError

if TYPE_CHECKING:
    from batchsd.cluster import Cluster
    from batchsd.recipe import Recipe


@dataclass(frozen=True)
class Crew:
    """How many workers, and what each is given. `device` is the job's, with "auto" decided."""

    workers: int
    gpus: float
    cpus: float
    threads: int
    device: str


class Place:
    """The chosen place. As a context it leaves Ray again at its end."""

    def __init__(self, job: Job, address: str, end: Callable[[str], None] = lambda reason: None) -> None:
        """`end` ends this process, with a reason, where it would hang: a worker in it, or a Ray without a head."""
        self._job = job
        self._address = address
        self._end = end
        self._cluster: Cluster | None = None
        self.warnings: list[str] = []

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *error: object) -> None:
        if self._cluster:
            self._cluster.close()

    @property
    def on_ray(self) -> bool:
        return self._address != "none" and (self._address != "local" or self.workers > 1)

    @property
    def workers(self) -> int:
        return self.crew.workers

    @property
    def gpu(self) -> bool:
        return self.crew.device.startswith("cuda")

    @cached_property
    def crew(self) -> Crew:
        """Sized by what is here, or by what the cluster says it has."""
        setting = self._job.ray.workers
        gpus_each, device = self._job.ray.gpus_per_worker, self._job.model.device
        if self._address == "none":
            gpus = gpus_here() if device == "auto" else 0
            return Crew(1, 0, 0, 0, "cuda" if gpus else "cpu" if device == "auto" else device)
        if self._address == "local":
            cpus = max(cpus_here(), 1 if setting == "auto" else setting)
            nodes: Sequence[Mapping[str, float]] = [{"CPU": cpus, "GPU": gpus_here() if device != "cpu" else 0}]
        else:
            nodes = self.connect().nodes()
        crew, short = size_crew(setting, gpus_each, device, nodes, grows=self._address != "local")
        if short:
            self.warnings.append(short)
        return crew

    def connect(self) -> Cluster:
        """Begin to connect to Ray, once; it comes up in the background."""
        if self._cluster is None:
            from batchsd.cluster import Cluster

            private, ray = self._address == "local", self._job.ray
            if not private:
                where = self._job.where("ray.allow_unauthenticated")
                inside = is_node(self._address)
                check_access(self._address, ray.allow_unauthenticated, where, os.environ, inside)
            self._cluster = Cluster(self._address, max(cpus_here(), self.workers) if private else None, self._end)
        return self._cluster

    def check_nodes(self, recipe: Recipe) -> str:
        """On a cluster: every node sees the output, the model and the manifest. Raises UsageError.

        Gives a warning where the cluster takes orders from anyone, else "".
        """
        if self.on_ray and self._address != "local":
            from batchsd.preflight import check_nodes

            sights = check_nodes(recipe, self.connect().on_every_node)
            return warning(self._address, {node: sight.mode for node, sight in sights.items()})
        return ""

    def executor(self, recipe: Recipe, log: Callable[[str], None]) -> Executor:
        """The workers, once the plan is made; waits for Ray to be up."""
        patience = Patience.of(self._job.run.timeout)
        if not self.on_ray:
            return InProcess(partial(recipe, device=self.crew.device), patience, self._end)
        from batchsd.cluster import Headed
        from batchsd.metrics import Measured, record_for
        from batchsd.seats import RayActors, Reserve

        cluster, crew = self.connect(), self.crew
        cluster.nodes()
        build = partial(recipe, device=crew.device, threads=crew.threads)
        grows = self._job.ray.workers == "auto" and self._address != "local"
        reserve = Reserve(crew.cpus, crew.gpus, crew.threads, self._job.ray.wait, self._room if grows else None)
        actors = RayActors(build, crew.workers, reserve, log, patience)
        return Headed(Measured(actors, record_for(self._job.output.uri)), cluster)

    def _room(self) -> int:
        """How many workers the cluster has room for by now."""
        assert self._cluster is not None
        each, nodes = self._job.ray.gpus_per_worker, self._cluster.nodes()
        crew, _ = size_crew("auto", each, self.crew.device, nodes, grows=True)
        return crew.workers

    def describe(self) -> str:
        """`in this process`, `2 Ray actors here, 1 CPU each`, `8 Ray actors at head:6379, 1 GPU each`."""
        crew = self.crew
        if not self.on_ray:
            return f"in this process on {crew.device}"
        where = "here" if self._address == "local" else f"at {self._address}"
        each = f"{crew.gpus:g} GPU" if crew.gpus else f"{crew.cpus:g} CPU"
        return f"{crew.workers} Ray actor{'s' if crew.workers > 1 else ''} {where}, {each} each"


def choose_place(
    job: Job, option: str | None, environ: Mapping[str, str], end: Callable[[str], None] = lambda reason: None
) -> Place:
    """The place for a job; `option` is --address, `end` as of `Place`. Raises UsageError for what is no address."""
    return Place(job, choose_address(option, job.ray.address, environ), end)


def choose_address(
    option: str | None, setting: str, environ: Mapping[str, str], current: Path = CURRENT_CLUSTER
) -> str:
    """`none` (this process), `local` (a private Ray), or a cluster's `host:port`.

    --address over RAY_ADDRESS over the job; "auto" is the cluster that this user began here with `ray start`,
    if it answers, else "local". Other people's clusters are never joined unasked. Raises UsageError.
    """
    address = option or environ.get("RAY_ADDRESS") or setting
    if "://" in address:
        raise UsageError(
            f"Ray address {address!r}: a driver needs host:port of the cluster's head; from outside, run "
            "batchsd on the cluster: ray job submit -- batchsd run ..."
        )
    if address not in ("auto", "local", "none") and not address.rpartition(":")[2].isdecimal():
        raise UsageError(f"Ray address {address!r}: give host:port, auto, local or none")
    if address != "auto":
        return address
    try:
        mine = current.stat().st_uid == os.getuid()
        found = current.read_text().strip() if mine else ""
        host, _, port = found.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=1):
            return found
    except (OSError, ValueError):
        return "local"


def size_crew(
    workers: int | str, gpus_per_worker: float, device: str, nodes: Sequence[Mapping[str, float]], grows: bool
) -> tuple[Crew, str]:
    """The crew that fits `nodes` (Ray's CPU and GPU counts of each), and a line where that is less than asked.

    Of a cluster that `grows` an explicit number of workers is taken as it is: nodes may come later. There the device
    "auto" needs a GPU at once: a hundred CPU nodes are more often a mistake than a wish. Raises InfrastructureError
    where a GPU is needed and there is none: Ray would wait for ever, silently.
    """
    cpus, gpus = (sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
    wants_gpu = device not in ("auto", "cpu") or (device == "auto" and (gpus > 0 or grows))
    waits = grows and workers != "auto"
    if wants_gpu and gpus_per_worker > 0:
        seats = [gpu_seats(node.get("GPU", 0.0), gpus_per_worker) for node in nodes]
        room = sum(seats)
        if room == 0 and not (waits and device != "auto"):
            later = "; 'cuda' waits for nodes that an autoscaler brings" if waits else ""
            raise InfrastructureError(
                f"a worker needs {gpus_per_worker:g} GPU of one node (ray.gpus_per_worker, model.device = {device!r}), "
                f"the cluster has {gpus:g} on {len(nodes)} nodes; add one with GPUs, or set model.device = 'cpu'{later}"
            )
        count = room if workers == "auto" else int(workers) if waits else min(int(workers), room)
        # No CPUs are reserved: nodes of a GPU cluster may declare none, and a worker would wait for ever.
        shares = [int(node.get("CPU", 0.0) // taken) for node, taken in zip(nodes, seats, strict=True) if taken]
        crew = Crew(count, gpus_per_worker, 0, max(1, min(shares, default=1)), "cuda" if device == "auto" else device)
    else:
        room = max(1, sum(int(node.get("CPU", 0.0)) for node in nodes))
        count = 1 if workers == "auto" else int(workers) if waits else min(int(workers), room)
        share = cpu_share(count, nodes)
        crew = Crew(count, 0, share, share, "cpu" if device == "auto" else device)
    if workers == "auto" or room >= int(workers):
        return crew, ""
    return crew, f"ray.workers = {workers}, but there is room for {room} (CPU {cpus:g}, GPU {gpus:g})"


def gpu_seats(gpus: float, each: float) -> int:
    """Workers of `each` GPU that a node holds: a share below one lies on one GPU, more than one are of one node."""
    share = 1 / each + 1e-9  # 1 / 0.1 is 10
    return int(gpus) * int(share) if each < 1 else int(gpus * share)


def cpu_share(workers: int, nodes: Sequence[Mapping[str, float]]) -> int:
    """The most CPUs that each worker can have, all of them at once, each on one node; at least 1."""
    cpus = [int(node.get("CPU", 0.0)) for node in nodes]
    return next((share for share in range(max(cpus, default=1), 1, -1) if sum(n // share for n in cpus) >= workers), 1)


def gpus_here(devices: Path = Path("/dev")) -> int:
    """GPUs that torch can use on this machine; torch is asked only where the kernel shows one."""
    if not any(devices.glob("nvidia[0-9]*")):
        return 0
    import torch

    return torch.cuda.device_count()


def cpus_here() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))
