"""`batchsd doctor`: one screen that says what is wrong with an installation, a job or a cluster.

Each check is a function that yields findings; one that cannot go on yields what stopped it. Nothing is drawn.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from batchsd.access import mode_here, warning
from batchsd.job import Job, model_path
from batchsd.place import cpus_here
from batchsd.preflight import differing
from batchsd.progress import counted
from batchsd.recipe import versions
from batchsd.store import open_store
from batchsd.types import BatchsdError, InfrastructureError

if TYPE_CHECKING:
    from batchsd.prepare import Prepared

EXTRAS = {"s3": ("botocore", "object stores"), "cluster": ("opencensus", "metrics and Ray's dashboard")}
ROOM = 1.5  # times the weights: activations of a small batch, text states, the VAE's largest layer
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}  # bytes of one number


@dataclass(frozen=True)
class Finding:
    """`bad` ends the command with `exit_code`; `note` is worth knowing."""

    state: Literal["ok", "note", "bad"]
    text: str
    exit_code: int = 0


@dataclass(frozen=True)
class NodeFacts:
    """What a node says of itself. `gpus` are names and total bytes, `mode` whether Ray there asks for a token."""

    host: str
    versions: Mapping[str, str]
    cuda: str
    gpus: tuple[tuple[str, int], ...]
    devices: int
    mode: str = "token"


def node_facts() -> NodeFacts:
    """Runs on a node: its versions, torch's CUDA ("" for a CPU build), its GPUs, and those that the kernel shows."""
    import torch

    seen = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    properties = [torch.cuda.get_device_properties(i) for i in seen]
    devices = len(list(Path("/dev").glob("nvidia[0-9]*")))
    gpus = tuple((entry.name, entry.total_memory) for entry in properties)
    return NodeFacts(socket.gethostname(), versions(), torch.version.cuda or "", gpus, devices, mode_here())


def findings(groups: Iterable[Callable[[], Iterator[Finding]]]) -> Iterator[Finding]:
    """All of them; a known error is a finding, and its group's last."""
    for group in groups:
        try:
            yield from group()
        except BatchsdError as error:
            yield Finding("bad", str(error), error.exit_code)


def installation(facts: NodeFacts) -> Iterator[Finding]:
    """Versions, torch's build against the devices, extras."""
    yield Finding("ok", ", ".join(f"{name} {number}" for name, number in facts.versions.items()))
    yield device_finding(facts)
    for extra, (module, what) in EXTRAS.items():
        if find_spec(module) is None:
            yield Finding("note", f"extra {extra} ({what}) is not installed: pip install 'batchsd[{extra}]'")


def device_finding(facts: NodeFacts) -> Finding:
    """Whether torch can use the GPUs that the kernel shows."""
    if not facts.devices:
        return Finding("ok", f"{facts.host}: no GPU; {cpus_here()} CPUs")
    if not facts.cuda:
        text = f"{facts.host}: {facts.devices} NVIDIA GPU, but this torch is a CPU build: install a CUDA build of torch"
        return Finding("bad", text, 2)
    if not facts.gpus:
        text = f"{facts.host}: {facts.devices} NVIDIA GPU, but torch (CUDA {facts.cuda}) sees none: its driver?"
        return Finding("bad", text, 2)
    named = ", ".join(f"{name} {memory / 2**30:.0f} GiB" for name, memory in facts.gpus)
    return Finding("ok", f"{facts.host}: {named}, torch for CUDA {facts.cuda}")


def job(loaded: Job, facts: NodeFacts, plan: Callable[[], list[Prepared]]) -> Iterator[Finding]:
    """Manifest, checkpoint and plugins as `run` would check them, the output's storage, and memory."""
    parts = plan()
    rows = sum(part.recipe.manifest.rows for part in parts)
    files = {file.name for part in parts for file in part.recipe.manifest.files}
    yield Finding("ok", f"manifest: {counted(rows, 'row')} in {counted(len(files), 'file')}")
    yield output_finding(loaded.output.uri)
    yield memory_finding(loaded, str(parts[0].plan.hard["model.dtype"]), facts)


def output_finding(uri: str) -> Finding:
    """Writes, reads and removes a small file beside the output folder."""
    beside, nonce = f"{uri.rstrip('/')}.doctor-{secrets.token_hex(4)}", secrets.token_bytes(16)
    store = open_store(beside)
    store.put("probe", nonce)
    found = store.read("probe")
    store.remove("probe")
    if "://" not in uri:
        Path(beside).rmdir()
    if found != nonce:
        raise InfrastructureError(f"{uri}: what was written does not read back")
    return Finding("ok", f"output: {uri} can be written")


def memory_finding(loaded: Job, dtype: str, facts: NodeFacts) -> Finding:
    """The weights and room to work against one GPU's memory, or this machine's."""
    from batchsd.model.inspect import inspect_checkpoint

    described = inspect_checkpoint(model_path(loaded))
    numbers = sum(network["parameters"] for network in described["networks"].values())
    needed = numbers * SIZES[dtype] * ROOM
    have = facts.gpus[0][1] if facts.gpus else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    where = "a GPU" if facts.gpus else "this machine"
    text = (
        f"model: {described['family']}, {numbers / 1e6:,.0f} M parameters; about {needed / 2**30:.2g} GiB in {dtype} "
        f"with room to work, {where} has {have / 2**30:.0f} GiB"
    )
    return Finding("ok", text) if needed < have else Finding("bad", text, 2)


Everywhere = Callable[[Callable[[], NodeFacts]], Mapping[str, NodeFacts]]  # as in preflight


def cluster(everywhere: Everywhere, address: str) -> Iterator[Finding]:
    """Every node's versions and devices against this one's, and who may talk to the cluster."""
    mine, answers = versions(), everywhere(node_facts)
    for node, facts in sorted(answers.items()):
        found = device_finding(facts)
        yield Finding(found.state, f"node {node}: {found.text}", found.exit_code)
        for line in differing(mine, facts.versions):
            yield Finding("bad", f"node {node}: {line}", 2)
    open_to_all = warning(address, {node: facts.mode for node, facts in answers.items()})
    yield Finding("note", open_to_all) if open_to_all else Finding("ok", f"Ray at {address}: {guarded(answers)}")


def guarded(answers: Mapping[str, NodeFacts]) -> str:
    """Why no stranger gives orders."""
    every = all(facts.mode == "token" for facts in answers.values())
    return "every node asks for a token" if every else "it listens on this machine alone"


def worst(found: Iterable[Finding]) -> int:
    """The exit code: 0, or the first bad finding's."""
    return next((finding.exit_code for finding in found if finding.state == "bad"), 0)
