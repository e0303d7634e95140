"""Whether a run folder holds what its markers say: every shard once, every byte, every picture.

Nothing is taken on trust but the markers: files are hashed, tables counted, pictures decoded.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

from batchsd.columns import OURS
from batchsd.ledger import Ledger, Marker, place_of
from batchsd.store import open_store
from batchsd.types import InfrastructureError, OutputFile, UsageError

PICTURES = (".png", ".jpg", ".webp")


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
    ledger = Ledger(open_store(uri))
    plan = ledger.plan()
    if plan is None:
        raise UsageError(f"{uri}: no run of batchsd is here (no plan)")
    verdict, named, shards = Verdict(), set(), set()
    published = ledger.published()
    for marker in ledger.markers():
        shards.add(marker.shard)
        for fault in marker_faults(marker):
            found(f"marker of shard {marker.shard}: {fault}")
        pictures = 0
        for file in marker.files:
            place = place_of(file.name)
            if place in named:
                found(f"{place}: two shards name it")
            named.add(place)
            if published.get(place) != file.bytes:
                found(f"{place}: {published.get(place, 'no')} bytes, its marker says {file.bytes}")
                continue
            pictures += _look(ledger, file, found)
        if pictures != marker.ok:
            found(f"shard {marker.shard}: {pictures} pictures are whole, its marker says {marker.ok}")
        verdict.add(marker, pictures)
        looked(verdict)
    for name in sorted(published.keys() - named):
        found(f"{name}: no marker names it")
    if shards - set(range(plan.shards)):
        found(f"{len(shards - set(range(plan.shards)))} markers of shards that the plan has not")
    verdict.missing = plan.shards - len(shards)
    if not verdict.missing and verdict.rows != plan.rows:
        found(f"the markers hold {verdict.rows} rows, the plan {plan.rows}")
    return verdict


def marker_faults(marker: Marker) -> Iterator[str]:
    """What a marker says that cannot be."""
    failed = sum(marker.failed.values())
    if marker.ok + failed != marker.rows:
        yield f"{marker.ok} ok and {failed} failed are not {marker.rows} rows"
    if marker.bytes != sum(file.bytes for file in marker.files):
        yield f"{marker.bytes} bytes are not the sum of its files"


def _look(ledger: Ledger, file: OutputFile, found: Callable[[str], None]) -> int:
    """The pictures of one file that decode."""
    name = place_of(file.name)
    with ledger.store.open(name) as opened:
        digest = hashlib.sha256()
        while piece := opened.read(2**20):
            digest.update(piece)
        if digest.hexdigest() != file.sha256:
            found(f"{name}: its bytes have changed (sha256)")
            return 0
        opened.seek(0)
        whole = 0
        try:
            for place, data in pictures_in(PurePosixPath(file.name), opened):
                if trouble := undecodable(data):
                    found(f"{name}, {place}: {trouble}")
                else:
                    whole += 1
        except InfrastructureError:
            raise
        except Exception as error:  # a reader's own account of a damaged file
            found(f"{name}: cannot be read: {error}")
        return whole


def pictures_in(name: PurePosixPath, file: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """(place, bytes) of each drawn picture in a published file, of any of the built-in layouts."""
    if name.suffix == ".parquet":
        yield from _in_table(file)
    elif name.suffix == ".tar":
        with tarfile.open(fileobj=file) as tar:
            for member in tar:
                if PurePosixPath(member.name).suffix in PICTURES and (opened := tar.extractfile(member)):
                    yield member.name, opened.read()
    elif name.suffix in PICTURES:
        yield name.name, file.read()


def _in_table(file: BinaryIO) -> Iterator[tuple[str, bytes]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
        drawn = [field.name for field in parquet.schema_arrow if (field.metadata or {}).get(OURS) == b"image"]
        for group in range(parquet.metadata.num_row_groups if drawn else 0):
            for picture in parquet.read_row_group(group, columns=drawn).column(0).to_pylist():
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
