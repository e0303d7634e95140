"""A marker is the commit of one shard; a tally is what markers add up to."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from batchsd.types import OutputFile


@dataclass(frozen=True, slots=True)
class Marker:
    """The commit of one shard: everything `status` and `verify` need to know about it."""

    shard: int
    rows: int
    ok: int
    failed: Mapping[str, int]
    bytes: int
    sha256: str
    files: tuple[OutputFile, ...]
    nonce: str
    attempt: int
    plan_hash: str
    facts: Mapping[str, Any]
    timings: Mapping[str, float]
    revision: int = 0


@dataclass(slots=True)
class Tally:
    """The sum of the markers."""

    done: set[int] = field(default_factory=set)
    rows: int = 0
    ok: int = 0
    failed: Counter[str] = field(default_factory=Counter)  # all that are not ok, rejected ones among them

    def add(self, marker: Marker) -> None:
        self.done.add(marker.shard)
        self.rows += marker.rows
        self.ok += marker.ok
        self.failed.update(marker.failed)

    @property
    def failures(self) -> Counter[str]:
        """Failed rows by kind. A rejected row is none: it was drawn."""
        return Counter({kind: count for kind, count in self.failed.items() if kind != "rejected"})

    @property
    def rejected(self) -> int:
        """Rows whose pictures the job's filters did not let pass."""
        return self.failed["rejected"]

    def fates(self) -> dict[str, Any]:
        """The counts as JSON files tell them."""
        return {"ok": self.ok, "failed": dict(self.failures), "rejected": self.rejected}


def sum_of(tallies: Iterable[Tally]) -> Tally:
    """Rows of several plans together; `done` stays empty, as each plan counts its shards from 0."""
    total = Tally()
    for tally in tallies:
        total.rows += tally.rows
        total.ok += tally.ok
        total.failed.update(tally.failed)
    return total


def read_marker(data: bytes) -> Marker:
    values = json.loads(data)
    return Marker(**{**values, "files": tuple(OutputFile(**file) for file in values["files"])})


def sha256_of(files: tuple[OutputFile, ...]) -> str:
    """The file's own hash; of several, the hash of what `sha256sum` would list."""
    if len(files) == 1:
        return files[0].sha256
    listing = "".join(f"{file.sha256}  {file.name}\n" for file in files)
    return hashlib.sha256(listing.encode()).hexdigest()
