"""What a run is to make, fixed before the first row is drawn, and compared whenever it goes on.

A run has one plan; a manifest that grows adds plans 2, 3, ... for its new files and rows, each with shards of
its own. A plan whose rows are edited is revised.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

from batchsd.types import Shard


@dataclass(frozen=True)
class Plan:
    """`hard` facts change pixels: another value is another run. `soft` ones move them by rounding at most.

    `files` are the manifest's, in order: name, size, sha256, and the slice of their rows that this plan draws
    (`first`, `rows`). `rows` and `rows_per_shard` count output rows; `schema` is the output's, column -> Arrow
    type, and `arrow` the same to be read back exactly (Arrow's IPC form in base64). `limit` is that of a run of the
    manifest's first rows only.
    """

    number: int
    hard: Mapping[str, Any]
    soft: Mapping[str, Any]
    files: tuple[Mapping[str, Any], ...]
    rows: int
    rows_per_shard: int
    repeat: int
    shards: int
    sink: str
    schema: Mapping[str, str]
    job: Mapping[str, Any] = field(default_factory=dict)
    limit: int | None = None
    arrow: str = ""

    def identity(self) -> dict[str, Any]:
        """All that a resumed run must agree on, by dotted name."""
        facts: dict[str, Any] = {
            f"input file {f['name']}": f"{_rows(f)}, sha256 {f['sha256']}" for f in self.files
        }
        facts |= {f"output column {name}": kind for name, kind in self.schema.items()}
        facts["input files"] = [f["name"] for f in self.files]
        facts["output columns"] = list(self.schema)
        for name in ("rows", "rows_per_shard", "repeat", "shards", "sink"):
            facts[name] = getattr(self, name)
        return {**self.hard, **facts}

    @cached_property
    def hash(self) -> str:
        """128 bits, in hex, over the identity."""
        return hashlib.blake2b(_json(self.identity()), digest_size=16).hexdigest()

    def differences(self, other: Plan) -> list[str]:
        """One readable line for each fact in which `other` is another run."""
        mine, theirs = _plain(self.identity()), _plain(other.identity())
        names = [
            name for name in (*mine, *(theirs.keys() - mine.keys())) if mine.get(name) != theirs.get(name)
        ]
        return [f"{name}: {_short(mine.get(name))} -> {_short(theirs.get(name))}" for name in names]

    def to_json(self) -> bytes:
        """The plan's file."""
        return json.dumps({**asdict(self), "hash": self.hash}, indent=1).encode()


def from_json(data: bytes) -> Plan:
    """A plan from its file; keys that this version does not know are left out."""
    values = json.loads(data)
    kept = {f.name: values[f.name] for f in fields(Plan) if f.name in values}
    return Plan(**{**kept, "files": tuple(kept["files"])})


def shards_of(plan: Plan) -> list[Shard]:
    """The shards of a plan, from itself alone."""
    slices = [(file.get("first", 0), file["rows"]) for file in plan.files]
    return cut(slices, plan.rows_per_shard, plan.repeat, plan.number)


def cut(slices: Sequence[tuple[int, int]], rows_per_shard: int, repeat: int, plan: int) -> list[Shard]:
    """Shards of about `rows_per_shard` output rows, `repeat` to a manifest row, none empty.

    `slices` are (first row, rows) of each file. A shard never crosses files; the last of a file may be shorter.
    """
    count = max(1, rows_per_shard // repeat)
    pieces = [
        (number, start, min(count, first + rows - start))
        for number, (first, rows) in enumerate(slices)
        for start in range(first, first + rows, count)
    ]
    return [Shard(plan, index, len(pieces), *piece) for index, piece in enumerate(pieces)]


def _rows(file: Mapping[str, Any]) -> str:
    first = file.get("first", 0)
    return f"rows {first} to {first + file['rows'] - 1}" if first else f"{file['rows']} rows"


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _plain(value: Any) -> Any:
    """As it comes back from a JSON file: tuples are lists."""
    return json.loads(_json(value))


def _short(value: Any) -> str:
    text = "absent" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:48]} ... {text[-24:]}"
