"""Before the first shard on more than one node: does every node see the same world?

    driver: a nonce into the run folder -> each node: reads it, sizes the manifest, hashes the checkpoint -> compare

A relative output on a node's own disk, a checkpoint that one node lacks or an older batchsd would each be found by
the first worker there, minutes later and a shard at a time.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from batchsd.access import mode_here
from batchsd.job import model_extras, model_path
from batchsd.model.fingerprint import checkpoint_hash
from batchsd.recipe import Recipe, versions
from batchsd.store import open_store
from batchsd.types import BatchsdError, UsageError


@dataclass(frozen=True)
class Sight:
    """What one node sees. `nonce` is the text it found in the run folder, "" for none; `checkpoint` is a hash.

    `trouble` says what could not be read at all, by what it is. `mode` is `access.mode_here`'s.
    """

    versions: Mapping[str, str]
    nonce: str
    checkpoint: str
    trouble: Mapping[str, str]
    mode: str = "token"


Everywhere = Callable[[Callable[[], Sight]], Mapping[str, Sight]]
"""Calls a function on every node: its results by the node's address."""


def look(recipe: Recipe, name: str) -> Sight:
    """Runs on a node: the world from there. `name` is the nonce's in the run folder."""
    trouble: dict[str, str] = {}

    def seen(what: str, ask: Callable[[], str]) -> str:
        try:
            return ask()
        except (BatchsdError, OSError) as error:
            trouble[what] = str(error)
            return ""

    def manifest() -> str:
        for file in recipe.manifest.files[:3]:  # where one is missing, so are its neighbours
            info = recipe.manifest.disk.files().get_file_info(file.path)
            if info.size != file.size:
                raise UsageError(f"{file.path}: {'not there' if info.size is None else f'{info.size} bytes'}")
        return ""

    job = recipe.job
    nonce = seen("output.uri", lambda: (open_store(recipe.uri).read(name) or b"").decode())
    checkpoint = seen("model.path", lambda: checkpoint_hash(model_path(job), model_extras(job)))
    seen("input.manifest", manifest)
    return Sight(versions(), nonce, checkpoint, trouble, mode_here())


def check_nodes(recipe: Recipe, everywhere: Everywhere) -> Mapping[str, Sight]:
    """What each node sees, which is what the driver sees.

    Raises UsageError with one line a difference, naming the node and the path.
    """
    store, name, nonce = open_store(recipe.uri), f"__batchsd/preflight.{secrets.token_hex(8)}", secrets.token_hex(16)
    store.put(name, nonce.encode())
    try:
        sights = everywhere(partial(look, recipe, name))
    finally:
        store.remove(name)
    expected = Sight(versions(), nonce, recipe.checkpoint, {})
    lines = [line for node, sight in sorted(sights.items()) for line in differences(recipe, expected, node, sight)]
    if lines:
        raise UsageError("not every node sees what this one sees:\n  " + "\n  ".join(lines))
    return sights


def differences(recipe: Recipe, here: Sight, node: str, there: Sight) -> list[str]:
    """Lines that say how `there`, seen from `node`, differs from `here`."""
    job = recipe.job
    lines = [f"node {node}: {job.where(what)}: {bare(job.where(what), text)}" for what, text in there.trouble.items()]
    if there.nonce != here.nonce and "output.uri" not in there.trouble:
        lines.append(
            f"node {node}: {job.where('output.uri')}: {recipe.uri} is another folder there, on a disk of its own; "
            "give a shared folder or an object store"
        )
    if there.checkpoint != here.checkpoint and "model.path" not in there.trouble:
        lines.append(
            f"node {node}: {job.where('model.path')}: {job.model.path} is another checkpoint there "
            f"({there.checkpoint[:12]}, here {here.checkpoint[:12]})"
        )
    return lines + [f"node {node}: {line}" for line in differing(here.versions, there.versions)]


def bare(where: str, text: str) -> str:
    """A message without the setting that it begins with, told in either way."""
    return text.removeprefix(f"{where}: ").removeprefix(f"{where.rpartition(' ')[2]}: ")


def differing(here: Mapping[str, str], there: Mapping[str, str]) -> list[str]:
    """A line for each package that is not the same."""
    found = [(package, mine, there.get(package, "not installed")) for package, mine in here.items()]
    other = [entry for entry in found if entry[1] != entry[2]]
    return [f"{package} is {theirs} there, {mine} here; install the same everywhere" for package, mine, theirs in other]
