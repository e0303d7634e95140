"""The house rules, read from the source with `ast`: who may import whom, who loads what, who prints.

A room is a file of batchsd/ or one of its packages. A new file needs its line in the table below.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import batchsd

HOUSE = Path(batchsd.__file__).parent
LONGEST = 330  # lines; a longer file is two files

# Who may import whom, from the roof down: a room names only rooms that stand below it in this table. Every
# room may import `types`, and `batchsd` itself (the front door: hookimpl and the version).
MAY_IMPORT = {
    # the command line
    "__main__": "cli",
    "cli": "access cluster doctor drive estimate export infra job ledger lock manifest marker model new_plugin place "
    "plugins prepare progress reader recipe rehearsal report reproduce revise starter status stop store summary verify",
    "summary": "card contact ledger marker prepare progress redact report revise",
    "report": "alike plan published redact reread store strips survey values",
    "strips": "diffusion engine lanes lock progress reproduce reread",
    "survey": "alike filters published reread values",
    "alike": "",
    "reproduce": "cells columns find job ledger manifest marker plan plugin_source plugins published recipe revise "
    "rows store",
    "infra": "job",
    "new_plugin": "plugins starter",
    "starter": "",
    "estimate": "bench diffusion prepare progress",
    "export": "card ledger reread store writer",
    "reread": "columns job ledger marker plan plugins published recipe rows sinks store values",
    "status": "ledger lock marker progress store",
    "verify": "columns ledger marker store",
    "card": "columns ledger plan progress redact store",
    "contact": "columns images store",
    "revise": "columns job ledger marker plan prepare published store",
    "doctor": "access job model place preflight prepare progress recipe store",
    "place": "access cluster deadlines executor job metrics preflight recipe seats",
    "metrics": "bench executor progress",
    "preflight": "access job model recipe store",
    "seats": "actor bench deadlines executor",
    "cluster": "access executor",
    "access": "",
    "actor": "bench executor run",
    "drive": "dispatch executor ledger marker plan progress stop",
    "dispatch": "bench executor ledger marker memory plan progress retrying stop",
    "executor": "bench deadlines progress run",
    "memory": "ledger lock plan poison",
    "poison": "",
    "deadlines": "",
    "stop": "marker progress",
    "prepare": "columns job judging ledger manifest model pinned plan plugin_source plugins reader recipe retrying "
    "store",
    "recipe": "bench diffusion encode engine job judging manifest model network pinned plugin_source plugins prompts "
    "provenance reader rows sinks store vouched",
    "rehearsal": "images model",
    "judging": "figures filters job job_errors model plugin_source plugins scores",
    # the trainer, which draws with what it has trained
    "training": "diffusion engine images model tasks",
    # the worker
    "run": "bench published writer",
    "writer": "bench ledger order scratch",
    "bench": "store",
    "published": "columns ledger store values",
    "provenance": "columns",
    "engine": "backends batch_size beside diffusion flow intake lanes meter model network pictures scores",
    "flow": "intake lanes meter network pictures",
    "pictures": "beside figures lanes meter network scores",
    "beside": "",
    "batch_size": "model network",
    "lanes": "diffusion network",
    "network": "backends diffusion meter model",
    "backends": "model",
    "intake": "",
    "meter": "",
    "order": "",
    # plugins
    "skeletons": "testing",
    "testing": "columns diffusion encode job scores",
    "defaults": "diffusion sinks tasks",
    "plugins": "diffusion filters hookspecs plugin_source scores",
    "vouched": "plugin_source",
    "plugin_source": "",
    "hookspecs": "diffusion scores",
    "filters": "",
    "tasks": "images settings",
    "sinks": "columns values",
    # input, output and the ledger
    "reader": "ahead cells columns find images job manifest rows web",
    "manifest": "columns find job job_errors plan rows",
    "rows": "columns job job_errors settings",
    "cells": "find redact",
    "images": "",
    "web": "redact",
    "ahead": "",
    "columns": "job job_errors redact values",
    "values": "",
    "find": "redact",
    "lock": "store",
    "ledger": "marker plan store",
    "marker": "",
    "plan": "",
    "retrying": "store",
    "store": "object_store redact scratch",
    "progress": "",
    "encode": "",
    # the job
    "pinned": "job",
    "job": "fetch job_errors job_sources model redact settings",
    "settings": "",
    "fetch": "object_store redact scratch",
    "object_store": "redact scratch",
    "scratch": "",
    "job_errors": "job_sources redact",
    "job_sources": "",
    "redact": "",
    # the mathematics, which know nothing of all that
    "prompts": "model",
    "model": "",
    "diffusion": "",
    # the vocabulary
    "__init__": "columns diffusion scores",
    "scores": "",
    "types": "figures",
    "figures": "",
}

# What comes from outside, and the rooms that may import it at all (strict where a room is its one door).
DOORS = {
    "ray": "cluster metrics seats",
    "transformers": "model training",
    "diffusers": "",
    "safetensors": "model training",
    "click": "cli",
    "rich": "cli",
    "pluggy": "__init__ hookspecs plugins",
    "pydantic": "job job_errors job_sources settings training",
    "pydantic_settings": "job",
    "botocore": "object_store",
}

# Slow to import: at the top of a file only in these rooms, elsewhere inside the function that needs it.
AT_THE_TOP = {
    "torch": "backends batch_size beside engine flow lanes network pictures model diffusion skeletons training",
    "transformers": "",
    "ray": "",
}

# These rooms import nothing from outside but this.
ONLY = {
    "model": "torch numpy transformers safetensors",
    "diffusion": "torch numpy",
    "types": "torch numpy pyarrow",
}

PRINTERS = "cli training"


@dataclass(frozen=True)
class Import:
    """One import: its file, that file's room, the whole module name, and whether it stands at the top."""

    file: str
    room: str
    module: str
    at_the_top: bool

    @property
    def package(self) -> str:
        return self.module.split(".")[0]

    @property
    def target(self) -> str:
        """The room that is imported, `__init__` for the front door itself."""
        return self.module.split(".")[1] if "." in self.module else "__init__"

    def __str__(self) -> str:
        return f"{self.file} imports {self.module}"


def files() -> list[Path]:
    return sorted(HOUSE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(HOUSE).parts[0].removesuffix(".py")


def modules(node: ast.AST) -> list[str]:
    """The modules that a statement imports; `from batchsd import plugins` is batchsd.plugins."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    assert node.level == 0, f"line {node.lineno}: relative import; write `from batchsd.x import y`"
    module = node.module or ""
    below = HOUSE.parent / module.replace(".", "/")
    names = [alias.name for alias in node.names]
    found = [name for name in names if (below / name).is_dir() or (below / f"{name}.py").is_file()]
    return [f"{module}.{name}" for name in found] + [module] * (len(found) < len(names))


def for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def statements(tree: ast.AST, top: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    """Every node with whether it runs when the file is imported."""
    for node in ast.iter_child_nodes(tree):
        yield node, top
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or for_types_only(node)
        yield from statements(node, top and not inside)


def imports() -> list[Import]:
    return [
        Import(path.relative_to(HOUSE).as_posix(), room_of(path), module, top)
        for path in files()
        for node, top in statements(ast.parse(path.read_text()))
        for module in modules(node)
    ]


IMPORTS = imports()


def words(rules: dict[str, str], name: str) -> set[str]:
    return set(rules[name].split())


def test_the_reader_sees_what_python_does():
    seen = {(i.room, i.module, i.at_the_top) for i in IMPORTS}
    assert ("plugins", "batchsd.hookspecs", True) in seen  # from batchsd import hookspecs
    assert ("defaults", "batchsd", True) in seen  # from batchsd import hookimpl
    assert ("defaults", "batchsd.diffusion.builtin", False) in seen  # inside a function
    assert ("__init__", "batchsd.diffusion.scheduler", False) in seen  # for types only
    assert ("engine", "torch", True) in seen


def test_every_room_has_its_line():
    assert {room_of(path) for path in files()} == set(MAY_IMPORT)


def test_the_table_goes_downwards_only():
    order = list(MAY_IMPORT)
    up = [
        f"{room} -> {below}"
        for room in order
        for below in words(MAY_IMPORT, room)
        if room != "__init__" and order.index(below) <= order.index(room)
    ]
    assert up == []


def test_who_imports_whom():
    allowed = {room: words(MAY_IMPORT, room) | {room, "types", "__init__"} for room in MAY_IMPORT}
    wrong = [str(i) for i in IMPORTS if i.package == "batchsd" and i.target not in allowed.get(i.room, ())]
    assert wrong == []


def test_no_line_of_the_table_is_stale():
    used = {(i.room, i.target) for i in IMPORTS if i.package == "batchsd"}
    stale = [
        f"{room} -> {x}" for room in MAY_IMPORT for x in words(MAY_IMPORT, room) if (room, x) not in used
    ]
    assert stale == []


@pytest.mark.parametrize("package", DOORS)
def test_one_door_for_each_foreign_thing(package):
    assert [str(i) for i in IMPORTS if i.package == package and i.room not in words(DOORS, package)] == []


@pytest.mark.parametrize("package", AT_THE_TOP)
def test_slow_packages_are_imported_where_they_are_needed(package):
    rooms = words(AT_THE_TOP, package)
    assert [str(i) for i in IMPORTS if i.package == package and i.at_the_top and i.room not in rooms] == []


@pytest.mark.parametrize("room", ONLY)
def test_rooms_that_import_little(room):
    import sys

    known = words(ONLY, room) | sys.stdlib_module_names | {"batchsd"}
    assert [str(i) for i in IMPORTS if i.room == room and i.package not in known] == []


def test_only_the_command_line_prints():
    wrong = []
    for path in files():
        for node, _ in statements(ast.parse(path.read_text())):
            printed = isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "print",
                "sys.stdout.write",
                "sys.stderr.write",
            )
            if printed and room_of(path) not in PRINTERS.split():
                wrong.append(f"{path.relative_to(HOUSE)}:{node.lineno}")
    assert wrong == []


def test_files_are_short():
    lengths = {path.relative_to(HOUSE).as_posix(): len(path.read_text().splitlines()) for path in files()}
    assert {name: lines for name, lines in lengths.items() if lines >= LONGEST} == {}
