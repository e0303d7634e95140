"""Whether a run folder holds what its markers say: every shard once, every byte, every picture.

Nothing is taken on trust but the markers: files are hashed, tables counted, pictures decoded.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath
from typing import BinaryIO

from batchsd.columns import OURS
from batchsd.ledger import Ledger, ledgers, place_of
from batchsd.marker import Marker
from batchsd.store import Store, open_store
from batchsd.types import InfrastructureError, OutputFile, UsageError

PICTURES = (".png", ".jpg", ".webp")
BUILT_IN = ("parquet", "webdataset", "folder")  # layouts whose rows can be counted
AT_ONCE = 4  # files


@dataclass(slots=True)
class Verdict:
    """What was looked at. `missing` counts shards that are not drawn yet, which is no fault."""

    shards: int = 0
    missing: int = 0
    rows: int = 0
    pictures: int = 0
    bytes: int = 0

    def add(self, marker: Marker, pictures: int) -> None:
        self.shards += 1
        self.rows += marker.rows
        self.pictures += pictures
        self.bytes += marker.bytes


def verify(uri: str, found: Callable[[str], None], looked: Callable[[Verdict], None]) -> Verdict:
    """Look at every published file. `found` is told each fault, `looked` is called after each shard.

    Raises UsageError where there is no run, InfrastructureError where the storage fails.
    """
    store = open_store(uri)
    plans = ledgers(store)
    if not plans:
        raise UsageError(f"{uri}: no run of batchsd is here (no plan)")
    verdict, named, published = Verdict(), set[str](), plans[0].published()
    with ThreadPoolExecutor(AT_ONCE) as workers:
        for ledger in plans:
            _verify_plan(ledger, published, named, verdict, workers, found, looked)
    for name in sorted(published.keys() - named):
        found(f"{name}: no marker names it")
    return verdict


def _verify_plan(
    ledger: Ledger,
    published: Mapping[str, int],
    named: set[str],
    verdict: Verdict,
    workers: ThreadPoolExecutor,
    found: Callable[[str], None],
    looked: Callable[[Verdict], None],
) -> None:
    """All shards of one plan of the run; `named` gets the files that its markers name."""
    plan, shards, rows = ledger.plan(), set[int](), 0
    assert plan is not None, ledger.number
    for marker in ledger.markers():
        shards.add(marker.shard)
        rows += marker.rows
        name = f"shard {marker.shard}" + (f" of plan {plan.number}" if plan.number > 1 else "")
        for fault in (*marker_faults(marker), *_unlike(marker, published, named)):
            found(fault)
        seen = Seen()
        for one in workers.map(partial(look_at, ledger.store), _present(marker, published)):
            seen.rows, seen.pictures = seen.rows + one.rows, seen.pictures + one.pictures
            for fault in one.faults:
                found(fault)
        kept = marker.failed.get("rejected", 0) if plan.hard.get("output.rejected") == "keep" else 0
        if seen.pictures != marker.ok + kept:
            found(f"{name}: {seen.pictures} pictures are whole, its marker says {marker.ok + kept}")
        if plan.sink in BUILT_IN and seen.rows != marker.rows:
            found(f"{name}: its files hold {seen.rows} rows, its marker says {marker.rows}")
        named |= {place_of(file.name) for file in marker.files}
        verdict.add(marker, seen.pictures)
        looked(verdict)
    if shards - set(range(plan.shards)):
        found(f"{len(shards - set(range(plan.shards)))} markers of shards that the plan has not")
    missing = plan.shards - len(shards)
    verdict.missing += missing
    if not missing and rows != plan.rows:
        found(f"the markers hold {rows} rows, the plan {plan.rows}")


def _present(marker: Marker, published: Mapping[str, int]) -> list[OutputFile]:
    return [file for file in marker.files if published.get(place_of(file.name)) == file.bytes]


def _unlike(marker: Marker, published: Mapping[str, int], named: Collection[str]) -> Iterator[str]:
    """What a listing shows already: files that are absent, of another size, or another shard's too."""
    for file in marker.files:
        place = place_of(file.name)
        if place in named:
            yield f"{place}: two shards name it"
        if published.get(place) != file.bytes:
            yield f"{place}: {published.get(place, 'no')} bytes, its marker says {file.bytes}"


def marker_faults(marker: Marker) -> Iterator[str]:
    """What a marker says that cannot be."""
    failed = sum(marker.failed.values())
    if marker.ok + failed != marker.rows:
        yield f"marker of shard {marker.shard}: {marker.ok} ok and {failed} failed are not {marker.rows} rows"
    if marker.bytes != sum(file.bytes for file in marker.files):
        yield f"marker of shard {marker.shard}: {marker.bytes} bytes are not the sum of its files"


@dataclass(slots=True)
class Seen:
    """What one published file holds: rows (of tables, and of tars the rows' JSON), pictures that decode."""

    rows: int = 0
    pictures: int = 0
    faults: list[str] = field(default_factory=list)


def look_at(store: Store, file: OutputFile) -> Seen:
    """Read a published file whole: its hash, and then as its readers would."""
    name, seen, digest = place_of(file.name), Seen(), hashlib.sha256()
    opened = store.open(name)
    if opened is None:
        return Seen(faults=[f"{name}: is gone"])
    with opened:
        while piece := opened.read(2**20):
            digest.update(piece)
        if digest.hexdigest() != file.sha256:
            return Seen(faults=[f"{name}: its bytes have changed (sha256)"])
        opened.seek(0)
        try:
            for place, data in contents(PurePosixPath(file.name), opened):
                if place is None:
                    seen.rows += 1
                elif trouble := undecodable(data):
                    seen.faults.append(f"{name}, {place}: {trouble}")
                else:
                    seen.pictures += 1
        except InfrastructureError:
            raise
        except Exception as error:  # a reader's own account of a damaged file
            seen.faults.append(f"{name}: cannot be read: {error}")
        return seen


def contents(name: PurePosixPath, file: BinaryIO) -> Iterator[tuple[str | None, bytes]]:
    """(place, bytes) of each drawn picture and (None, b"") for each row of a file, of any built-in layout."""
    if name.suffix == ".parquet":
        yield from _in_table(file)
    elif name.suffix == ".tar":
        with tarfile.open(fileobj=file) as tar:
            for member in tar:
                if PurePosixPath(member.name).suffix in PICTURES and (opened := tar.extractfile(member)):
                    yield member.name, opened.read()
                elif member.name.endswith(".json"):
                    yield None, b""
    elif name.suffix in PICTURES:
        yield name.name, file.read()


def _in_table(file: BinaryIO) -> Iterator[tuple[str | None, bytes]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
        drawn = [field.name for field in parquet.schema_arrow if (field.metadata or {}).get(OURS) == b"image"]
        for group in range(parquet.metadata.num_row_groups):
            yield from [(None, b"")] * parquet.metadata.row_group(group).num_rows
            for picture in parquet.read_row_group(group, columns=drawn).column(0).to_pylist() if drawn else ():
                if picture is not None:
                    yield picture["path"], picture["bytes"]


def undecodable(data: bytes) -> str:
    """Why a picture cannot be decoded; "" where it can."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
    except Exception as error:  # Pillow raises what it likes
        return f"{type(error).__name__}: {error}"
    return ""
