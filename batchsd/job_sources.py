"""Where a job's settings come from: a TOML file, the environment, `--set`; each with its place and its paths.

A layer is flat, `("sampler", "steps") -> 20`, and knows for each key where it was written.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from batchsd.types import UsageError

Key = tuple[str, ...]

PREFIX = "BATCHSD_"
MANIFEST: Key = ("input", "manifest")
PATHS: frozenset[Key] = frozenset({MANIFEST, ("output", "uri"), ("run", "scratch")})
MODELS: frozenset[Key] = frozenset(
    ("model", name) for name in ("path", "vae", "loras", "embeddings", "tokenizer")
)
PLUGINS: Key = ("plugins",)
PLUGIN = "plugin"  # the section of plugins' settings
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True, slots=True)
class Layer:
    """Settings of one source; `origins` may also name tables, which have a line but no value."""

    values: Mapping[Key, Any]
    origins: Mapping[Key, str]


def file_layer(path: Path) -> Layer:
    """A job file's settings, each with `<file>:<line>`. Raises UsageError where it cannot be read as TOML."""
    try:
        text = path.read_text("utf-8")
        tables = tomllib.loads(text)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such job file") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not a job file: it is not UTF-8 text") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(_syntax_error(path, text, str(error))) from None
    values = {key: _anchored(key, value, path.parent) for key, value in _leaves(tables)}
    return Layer(values, {key: f"{path}:{line}" for key, line in key_lines(text).items()})


def environment_layer(environ: Mapping[str, str], job: type[BaseModel]) -> Layer:
    """Every BATCHSD_<SECTION>__<KEY>. Other names of that prefix are none of ours: Kubernetes makes them."""
    names = {name for name in environ if name.startswith(PREFIX) and "__" in name[len(PREFIX) :]}
    keys = {tuple(name[len(PREFIX) :].lower().split("__")): name for name in sorted(names)}
    values = {key: _anchored(key, parse_value(environ[name], key, job), Path()) for key, name in keys.items()}
    return Layer(values, {key: f"environment {name}" for key, name in keys.items()})


def set_layer(text: str, job: type[BaseModel]) -> Layer:
    """One `--set section.key=value`; the value is TOML, or else plain text."""
    name, equals, value = text.partition("=")
    key = tuple(part.strip() for part in name.split("."))
    if not equals or not all(key):
        raise UsageError(f"--set {text}: write it as section.key=value, such as sampler.steps=30")
    return Layer({key: _anchored(key, parse_value(value, key, job), Path())}, {key: f"--set {name.strip()}"})


def parse_value(text: str, key: Key, job: type[BaseModel]) -> Any:
    """`30`, `true`, `[1, 2]`, `{ a = "b" }` as TOML; anything else, or where text is wanted, as it stands."""
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = table["value"]
    # output.uri=2026 is a folder's name, not a number; and a text with a newline may have held another key.
    wants_text = _annotation(key, job) in (str, str | None)
    if key == MANIFEST:  # a text, or a list of them
        wants_text = not isinstance(value, list)
    return text if len(table) > 1 or (wants_text and not isinstance(value, str)) else value


def _annotation(key: Key, model: type[BaseModel]) -> Any:
    annotation: Any = model
    for part in key:
        fields = getattr(annotation, "model_fields", {})
        if part not in fields:
            return None
        annotation = fields[part].annotation
    return annotation


def _leaves(table: Mapping[str, Any], above: Key = ()) -> Iterator[tuple[Key, Any]]:
    for name, value in table.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*above, name))
        else:
            yield (*above, name), value


def _anchored(key: Key, value: Any, folder: Path) -> Any:
    """The value with relative paths made absolute from `folder`; URIs, shipped and hub names stay."""
    if key[0] == PLUGIN:
        return _anchored_setting(value, folder)
    if isinstance(value, list) and key in MODELS | {PLUGINS, MANIFEST}:
        return [_anchored(key, item, folder) for item in value]
    if not isinstance(value, str) or not value or "://" in value:
        return value
    path = os.path.abspath(folder / os.path.expanduser(value)) if "\0" not in value else value
    if key in PATHS:
        return path
    if key == PLUGINS:
        return path if "/" in value or value.endswith(".py") else value
    if key in MODELS:
        shipped = key == ("model", "path") and "/" not in value
        hub = HUB_NAME.fullmatch(value) and not os.path.exists(path)
        return value if shipped or hub else path
    return value


def _anchored_setting(value: Any, folder: Path) -> Any:
    """A plugin's setting: which ones are paths only its plugin knows, so that a path must look like one."""
    if isinstance(value, list):
        return [_anchored_setting(item, folder) for item in value]
    if isinstance(value, str) and value.startswith(("./", "../", "~/")) and "\0" not in value:
        return os.path.abspath(folder / os.path.expanduser(value))
    return value


# --- lines ---------------------------------------------------------------------------------------------

PART = r"""(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')"""
DOTTED = rf"{PART}(?:\s*\.\s*{PART})*"
HEADER = re.compile(rf"\s*\[\[?\s*({DOTTED})\s*\]")
ASSIGNMENT = re.compile(rf"\s*({DOTTED})\s*=")
TOKEN = re.compile(r'''"""|\'\'\'|"(?:\\.|[^"\\])*"|'[^']*'|#.*|[\[\]{}]''')


def key_lines(text: str) -> dict[Key, int]:
    """The line, counted from 1, of every table and key of a valid TOML text (tomllib keeps none)."""
    lines: dict[Key, int] = {}
    table: Key = ()
    state = _State()
    for number, line in enumerate(text.split("\n"), start=1):
        start = 0
        if state.between_statements:
            if header := HEADER.match(line):
                table = _split(header[1])
                lines.setdefault(table, number)
                continue
            if assignment := ASSIGNMENT.match(line):
                lines[*table, *_split(assignment[1])] = number
                start = assignment.end()
        state.feed(line, start)
    return lines


@dataclass(slots=True)
class _State:
    """Whether a line begins inside a value: a multi-line string or an open bracket."""

    quote: str = ""
    depth: int = 0

    @property
    def between_statements(self) -> bool:
        return not self.quote and not self.depth

    def feed(self, line: str, start: int) -> None:
        while True:
            if self.quote:
                end = line.find(self.quote, start)
                if end < 0:
                    return
                start, self.quote = end + 3, ""
            token = TOKEN.search(line, start)
            if not token:
                return
            start = token.end()
            if token[0] in ('"""', "'''"):
                self.quote = token[0]
            else:
                self.depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)


def _split(dotted: str) -> Key:
    return tuple(part.strip("\"'") for part in re.findall(PART, dotted))


def _syntax_error(path: Path, text: str, message: str) -> str:
    found = re.search(r" \(at line (\d+), column \d+\)$", message)
    line = found[1] if found else len(text.splitlines())
    reason = re.sub(r" \(at [^)]*\)$", "", message)
    return f"{path}:{line}: not valid TOML: {reason}"
