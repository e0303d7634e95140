"""Where a plugin comes from: a name in a job is found, packed to travel, and loaded.

    source = find("./my_file.py", base);  plugin = load(source)

A name is an installed entry point of the group `batchsd`, a module, or a file beside the job. A one-file
plugin travels as its source text; the others travel as a name with a hash over their Python files, so that
another node loads the same code or says that it cannot.
"""

from __future__ import annotations

import hashlib
import importlib
import linecache
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from importlib.util import decode_source, find_spec
from pathlib import Path
from types import ModuleType

from batchsd.types import UsageError

GROUP = "batchsd"


@dataclass(frozen=True, slots=True)
class Source:
    """One plugin, with enough to load it in another process.

    `name` is what the job says; `origin` is `built-in`, `entry point`, `module` or `file`; `target` is the
    module path (`package.module:attribute`) or the file. `sha256` is over the Python files; `text` is the
    source of a one-file plugin, which therefore must stand alone.
    """

    name: str
    origin: str
    target: str
    version: str = ""
    sha256: str = ""
    text: str | None = None


def find(name: str, base: Path) -> Source:
    """The plugin of that name, not imported yet; files are taken relative to `base`. Raises UsageError."""
    if name.endswith(".py") or "/" in name:
        return _from_file(name, base)
    entries = [entry for entry in entry_points(group=GROUP) if entry.name == name]
    if len(entries) > 1:
        owners = " and ".join(sorted(repr(entry.dist.name) for entry in entries if entry.dist))
        raise UsageError(f"plugin {name!r} is an entry point of both {owners}; uninstall one of them")
    if entries:
        return from_entry_point(entries[0])
    digest = _module_hash(name)
    if digest is not None:
        return Source(name, "module", name, _version_of(name.partition(".")[0]), digest)
    raise UsageError(f"plugin {name!r} is no installed plugin and no module; {_advice(name, base)}")


def short_name(plugin: str) -> str:
    """What `[plugin.<name>]` and a plan call it: `mine` for `./mine.py`, wherever that is, else as `plugins` has it."""
    return Path(plugin).stem if plugin.endswith(".py") or "/" in plugin else plugin


def source_facts(sources: Iterable[Source]) -> dict[str, str]:
    """Hard facts of a plan: each plugin under its short name, by the hash of its text, else by its version."""
    return {f"plugin {short_name(source.name)}": source.sha256 or source.version for source in sources}


def recheck(packed: Source, base: Path) -> Source:
    """A packed plugin on this node: its own text, or what is installed here if that is the same code."""
    if packed.text is not None:
        return packed
    here = find(packed.name, base)
    if here.sha256 != packed.sha256:
        raise UsageError(
            f"plugin {packed.name!r} ({packed.target}) differs between nodes: sha256 {packed.sha256[:12]} "
            f"where the job started, {here.sha256[:12]} here; install the same version on every node"
        )
    return here


def load(source: Source) -> object:
    """Import the plugin. What its import raises becomes one UsageError that names plugin, file and line."""
    try:
        if source.text is not None:
            return _run_text(source, source.text)
        module, _, attribute = source.target.partition(":")
        plugin: object = importlib.import_module(module.strip())
        for part in filter(None, attribute.split(".")):
            plugin = getattr(plugin, part.strip())
        return plugin
    except (Exception, SystemExit) as error:
        raise UsageError(f"plugin {source.name!r} does not import: {cause(error)}") from error


def cause(error: BaseException) -> str:
    """One line of what a plugin raised and where: `ValueError: no such colour (my_file.py:12)`."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} ({error.filename}:{error.lineno})"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_machinery(f.filename)]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"


def from_entry_point(entry: EntryPoint) -> Source:
    """The source that an installed entry point names; its package is not imported."""
    release = entry.dist.version if entry.dist else ""
    return Source(entry.name, "entry point", entry.value, release, _module_hash(entry.module) or "")


def _from_file(name: str, base: Path) -> Source:
    path = base / name
    try:
        data = path.read_bytes()
        text = decode_source(data)
    except OSError as error:
        raise UsageError(f"plugin {name!r}: cannot read {path}: {error.strerror}") from error
    except (SyntaxError, UnicodeDecodeError) as error:
        raise UsageError(f"plugin {name!r}: {path} is not Python text: {error}") from error
    return Source(name, "file", str(path), sha256=hashlib.sha256(data).hexdigest(), text=text)


def _run_text(source: Source, text: str) -> ModuleType:
    """The module of a one-file plugin, made once a process: its classes pickle, tracebacks show its lines."""
    name = f"batchsd_plugin_{Path(source.target).stem}_{source.sha256[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = source.target
    sys.modules[name] = module
    linecache.cache[source.target] = (len(text), None, text.splitlines(keepends=True), source.target)
    try:
        exec(compile(text, source.target, "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _advice(name: str, base: Path) -> str:
    installed = sorted({entry.name for entry in entry_points(group=GROUP)})
    if (base / f"{name}.py").is_file():
        return f"a file beside the job is written './{name}.py'"
    if close := get_close_matches(name, installed, 1):
        return f"did you mean {close[0]!r}?"
    return f"installed plugins: {', '.join(installed) or 'none'}; a file is written './my_file.py'"


def _module_hash(module: str) -> str | None:
    """sha256 over a module's file, or over a package's Python files; None where there is no such module."""
    try:
        spec = find_spec(module)  # imports the parents of a dotted name, but not the module
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    digest = hashlib.sha256()
    if spec.submodule_search_locations is None:
        known = spec.has_location and spec.origin  # a module built into Python has no file
        digest.update(Path(known).read_bytes() if known else module.encode())
    for folder in spec.submodule_search_locations or ():
        for path in sorted(Path(folder).rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _version_of(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def _is_machinery(filename: str) -> bool:
    return filename.startswith("<frozen") or filename in (__file__, importlib.__file__)
