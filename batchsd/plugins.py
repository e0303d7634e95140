"""Plugins: the names in a job become schedulers, tasks, sinks and watchers in one registry.

    registry = build(["batchsd-scores", "my_module", "./my_file.py"], base)

The driver builds it, and every worker builds it again from `pack(names, base)`: names and texts travel, the
manager does not. The built-ins come through the same hooks. Nothing that the job does not name is imported.
"""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, partial
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pluggy

from batchsd import __version__, hookspecs
from batchsd.filters import NAME
from batchsd.plugin_source import GROUP, Source, cause, find, from_entry_point, load, recheck, short_name
from batchsd.scores import Filter, Score, Viewer
from batchsd.types import Progress, Shard, ShardResult, Sink, Task, UsageError

NAMES = re.compile(NAME, re.ASCII)
BUILTIN = Source("batchsd", "built-in", "batchsd.defaults", __version__)
WATCHERS = ("shard_started", "batch_done", "shard_done")

BETAS = (0.00085, 0.012)  # Stable Diffusion's first and last: a forward process to try schedulers on


@dataclass(frozen=True, slots=True)
class Registry:
    """All that the loaded plugins brought.

    `owners[kind, name]` is the plugin that registered a thing (kind: `scheduler`, `task`, `sink`, `score` or
    `filter`); `sources` are the plugins themselves, for the run's record. Watchers are called through `hook`:
    `registry.hook.shard_started(shard=shard)`.
    """

    schedulers: Mapping[str, Any]
    tasks: Mapping[str, Task]
    sinks: Mapping[str, Sink]
    scores: Mapping[str, Score]
    filters: Mapping[str, Filter]
    owners: Mapping[tuple[str, str], str]
    sources: tuple[Source, ...]
    manager: pluggy.PluginManager

    @property
    def hook(self) -> Watchers:
        return Watchers(self.manager)


@dataclass(frozen=True, slots=True)
class Watchers:
    """The plugins' watching hooks. One that raises ends the job: what it watches is not its to change."""

    manager: pluggy.PluginManager

    def shard_started(self, shard: Shard) -> None:
        self._call("shard_started", shard=shard)

    def batch_done(self, progress: Progress) -> None:
        self._call("batch_done", progress=progress)

    def shard_done(self, shard: Shard, result: ShardResult) -> None:
        self._call("shard_done", shard=shard, result=result)

    def _call(self, hook: str, **told: Any) -> None:
        caller = getattr(self.manager.hook, hook)
        try:
            caller(**told)
        except Exception as error:
            code = {frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)}
            guilty = [impl.plugin_name for impl in caller.get_hookimpls() if impl.function.__code__ in code]
            who = repr(guilty[0]) if guilty else "(one of several)"
            said = f"plugin {who}: {hook} failed: {cause(error)}; mend it, or take the plugin out"
            raise UsageError(said) from error


def build(names: Sequence[str | Source], base: Path) -> Registry:
    """Load the built-ins and the named (or packed) plugins and collect what they register.

    Raises UsageError with one line that names the plugin: not found, its import fails, a hook is misspelt or
    has the wrong signature, two plugins own one name, or a thing lacks what its kind must have.
    """
    sources = (BUILTIN, *pack(names, base))
    manager = pluggy.PluginManager("batchsd")
    manager.add_hookspecs(hookspecs)
    for source in sources:
        plugin = load(source)
        try:
            manager.register(plugin, source.name)
        except (ValueError, pluggy.PluginValidationError) as error:
            raise UsageError(f"plugin {source.name!r}: {'; '.join(str(error).splitlines())}") from error
        _check_hooks(manager, plugin, source.name)
    manager.check_pending()
    owners: dict[tuple[str, str], str] = {}
    schedulers = _collect(manager, "scheduler", _scheduler_fault, owners)
    _check_aliases(schedulers, owners)
    return Registry(
        schedulers=schedulers,
        tasks=_collect(manager, "task", _task_fault, owners),
        sinks=_collect(manager, "sink", _sink_fault, owners),
        scores=_collect(manager, "score", partial(_viewer_fault, Score), owners),
        filters=_collect(manager, "filter", partial(_viewer_fault, Filter), owners),
        owners=MappingProxyType(owners),
        sources=sources,
        manager=manager,
    )


def pack(names: Sequence[str | Source], base: Path) -> tuple[Source, ...]:
    """Find the named plugins without importing them, in a form that pickles and that `build` takes elsewhere.

    Files are taken relative to `base`. Raises UsageError where one is not found, is listed twice, or was
    packed on another node from other code than is installed here.
    """
    found: list[Source] = []
    for name in names:
        source = find(name, base) if isinstance(name, str) else recheck(name, base)
        for other in found:
            if source.name == other.name:
                raise UsageError(f"plugins: {source.name!r} is listed twice")
            if (short := short_name(source.name)) == short_name(other.name):
                raise UsageError(f"plugins: {other.name!r} and {source.name!r} are both called {short!r}; rename one")
        found.append(source)
    return tuple(found)


def describe(names: Sequence[str], base: Path) -> list[dict[str, str]]:
    """One row a thing for `batchsd plugins`: name, kind, thing, owner, origin, version.

    Installed plugins that `names` leaves out are listed as kind `not loaded`; they are not imported.
    """
    registry = build(names, base)
    sources = {source.name: source for source in registry.sources}
    rows = []
    for (kind, name), owner in registry.owners.items():
        thing = getattr(registry, f"{kind}s")[name]
        kind = "refused" if getattr(thing, "refused", "") else kind  # a scheduler that says why it cannot run
        rows.append(_row(name, kind, _python_name(thing), sources[owner]))
    for hook in WATCHERS:
        for impl in getattr(registry.manager.hook, hook).get_hookimpls():
            rows.append(_row(hook, "watcher", _python_name(impl.function), sources[impl.plugin_name]))
    for entry in sorted(entry_points(group=GROUP)):
        if entry.name not in sources:
            rows.append(_row(entry.name, "not loaded", entry.value, from_entry_point(entry)))
    return rows


def _row(name: str, kind: str, thing: str, source: Source) -> dict[str, str]:
    origin = source.origin if source is BUILTIN else f"{source.origin} {source.target}"
    return {
        "name": name,
        "kind": kind,
        "thing": thing,
        "owner": source.name,
        "origin": origin,
        "version": source.version,
    }


def _python_name(thing: object) -> str:
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}"


def _check_hooks(manager: pluggy.PluginManager, plugin: object, owner: str) -> None:
    """Every hook of the plugin is one of ours, and it has one: a forgotten @hookimpl would do nothing."""
    known = sorted(name for name, caller in vars(manager.hook).items() if caller.has_spec())
    callers = manager.get_hookcallers(plugin) or []
    for caller in callers:
        if not caller.has_spec():
            close = get_close_matches(caller.name, known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"have {', '.join(known)}"
            raise UsageError(f"plugin {owner!r}: unknown hook {caller.name!r}; {hint}")
    if not callers:
        have = ", ".join(known)
        raise UsageError(f"plugin {owner!r} has no hook; put @batchsd.hookimpl before one of {have}")


def _collect(
    manager: pluggy.PluginManager,
    kind: str,
    fault: Callable[[str, object], str | None],
    owners: dict[tuple[str, str], str],
) -> Mapping[str, Any]:
    """All things of one kind, by name; adds who brought each to `owners`."""
    things: dict[str, Any] = {}
    hook = f"register_{kind}s"
    for impl in getattr(manager.hook, hook).get_hookimpls():
        where = f"plugin {impl.plugin_name!r}: {hook}"
        try:
            brought = impl.function()
        except Exception as error:
            raise UsageError(f"{where} failed: {cause(error)}") from error
        if not isinstance(brought, Mapping):
            raise UsageError(f"{where} returned {type(brought).__name__}, not a mapping of name to {kind}")
        for name, thing in brought.items():
            if not isinstance(name, str) or not name:
                raise UsageError(f"{where}: the name {name!r} is not a word")
            if wrong := fault(name, thing):
                raise UsageError(f"{where}: {name!r} {wrong}")
            if name in things:
                both = f"{owners[kind, name]!r} and {impl.plugin_name!r}"
                raise UsageError(f"{kind} {name!r} is registered by both {both}; rename one or leave one out")
            things[name], owners[kind, name] = thing, impl.plugin_name
    return MappingProxyType(things)


def _check_aliases(schedulers: Mapping[str, Any], owners: Mapping[tuple[str, str], str]) -> None:
    """No two schedulers answer to one name, whatever its case: people write `DPM++ 2M` and `dpm++ 2m`."""
    claimed: dict[str, str] = {}
    for name, scheduler in schedulers.items():
        for said in filter(None, (name, *scheduler.aliases, scheduler.diffusers)):
            other = claimed.setdefault(said.lower(), name)
            if other != name:
                both = " and ".join(f"{n!r} of plugin {owners['scheduler', n]!r}" for n in (other, name))
                raise UsageError(f"schedulers {both} both claim the name {said!r}")


def _scheduler_fault(name: str, thing: object) -> str | None:
    """What is wrong with it; a short walk is traced, so that one that fits no table is refused here."""
    from batchsd.diffusion.scheduler import Scheduler

    if not isinstance(thing, Scheduler):
        return f"is {type(thing).__name__}, not a batchsd.Scheduler"
    if thing.name != name:
        return f"is a scheduler that calls itself {thing.name!r}; use one name"
    if thing.refused:
        return None
    try:
        thing.program(trial_schedule(), steps=5)
    except Exception as error:
        return f"cannot be used: {error if isinstance(error, UsageError) else cause(error)}"
    return None


@cache
def trial_schedule() -> Any:
    """One for all trials, so that a scheduler which comes again is not traced again."""
    import numpy as np

    from batchsd.diffusion.schedule import NoiseSchedule

    return NoiseSchedule(np.cumprod(1 - np.linspace(*BETAS, 1000)))


def _task_fault(name: str, thing: object) -> str | None:
    if isinstance(thing, type):
        return f"is the class {thing.__name__}; register an instance of it"
    if not isinstance(thing, Task):
        return f"({type(thing).__name__}) is not a task: it needs `columns` and `__call__`"
    if not isinstance(thing.columns, tuple) or not all(isinstance(c, str) for c in thing.columns):
        return f"({type(thing).__name__}) must give `columns` as a tuple of column names"
    return _call_fault(thing, "__call__", "request, model, generator")


def _sink_fault(name: str, thing: object) -> str | None:
    if isinstance(thing, type):
        return f"is the class {thing.__name__}; register an instance of it"
    if not isinstance(thing, Sink) or not callable(thing.open):
        return f"({type(thing).__name__}) is not a sink: it needs `open(folder, name, schema)`"
    return _call_fault(thing, "open", "folder, name, schema")


def _call_fault(thing: object, method: str, given: str) -> str | None:
    """What is wrong with the parameters of a method that is called with those `given`."""
    try:
        inspect.signature(getattr(thing, method)).bind(*given.split(", "))
    except TypeError as error:
        return f"({type(thing).__name__}): {method} is called with ({given}): {error}"
    except ValueError:  # compiled: it says nothing of its parameters
        return None
    return None


def _viewer_fault(kind: type[Viewer], name: str, thing: object) -> str | None:
    if not isinstance(thing, kind):
        wanted = f"batchsd.{kind.__name__}"
        return f"is {type(thing).__name__}, not a {wanted}; a function is wrapped: {wanted}.of(function)"
    if not callable(thing.load):
        return f"has a load that is {type(thing.load).__name__}, not a function of (settings, device)"
    if wrong := _call_fault(thing, "load", "settings, device"):
        return wrong
    if not NAMES.fullmatch(name):
        return "is no name for a column: a letter, then letters, digits, _ and -"
    if twice := set(thing.files) & set(thing.options):
        return f"has {sorted(twice)[0]!r} both in files and in options"
    if not isinstance(thing.files, tuple):
        return "must give `files` as a tuple of the names of settings"
    return None
