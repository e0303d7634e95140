"""One row of a run drawn again, from the run folder alone, and laid beside the picture that is there.

    recorded job + the row as it was published -> Request (the same row_hash) -> engine -> picture, and what differs
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from posixpath import dirname
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from batchsd.cells import Cells
from batchsd.columns import IMAGE_INPUTS, MADE, MANIFEST, OURS, RESOLVED, manifest_column
from batchsd.find import Disk, disk_of
from batchsd.job import Job, pixel_settings
from batchsd.ledger import Ledger, ledgers, place_of
from batchsd.manifest import Manifest
from batchsd.marker import Marker
from batchsd.plan import Plan, shards_of
from batchsd.plugin_source import source_facts
from batchsd.published import Row, reread
from batchsd.recipe import WHO, Recipe, names_of, sink_of
from batchsd.revise import job_of_run
from batchsd.rows import key_text, row_hasher
from batchsd.store import Store, open_store
from batchsd.types import PIXELS_VERSION, Record, Request, RowError, Shard, Sink, UsageError

if TYPE_CHECKING:
    import numpy as np

    from batchsd.plugins import Registry

ROUNDING = 1  # of 255: what another machine or build may move a pixel by


@dataclass(frozen=True, slots=True)
class Found:
    """A published row: where it lies, and what it says."""

    plan: Plan
    marker: Marker
    shard: Shard
    index: int
    row: Row

    @property
    def place(self) -> str:
        """`prompts.parquet:17`, with its repeat where rows have several pictures."""
        file = self.plan.files[self.shard.file]["name"]
        repeat = f" (repeat {self.index % self.plan.repeat})" if self.plan.repeat > 1 else ""
        return f"{file}:{self.shard.start + self.index // self.plan.repeat}{repeat}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """A row then and now. `pixels` is None where one of the two has no picture; `versions` are lines for people."""

    found: Found
    drawn: Record
    pixels: Pixels | None
    versions: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Equal within rounding, or failed in the same way."""
        if self.pixels is None:
            return bool(self.drawn.image is None and self.drawn.status == self.found.row.ours["status"])
        return self.pixels.largest <= ROUNDING


@dataclass(frozen=True, slots=True)
class Pixels:
    """How two pictures differ, in steps of 255: `largest` anywhere, `mean` over all, `share` of pixels that do."""

    largest: int
    mean: float
    share: float


class Run:
    """A run folder, opened to find rows in it. `model` is where its checkpoint lies now, "" for where it was."""

    def __init__(self, uri: str, model: str = "") -> None:
        from pathlib import Path

        from batchsd import plugins

        self.store: Store = open_store(uri)
        self.ledgers: list[Ledger] = ledgers(self.store)
        newest = self.ledgers[-1].plan() if self.ledgers else None
        if newest is None:
            raise UsageError(f"{uri}: no run of batchsd is here (no plan)")
        job, _ = job_of_run(uri)
        self.job = job.model_copy(update={"model": job.model.model_copy(update={"path": model})}) if model else job
        self.registry: Registry = plugins.build(job.plugins, Path())
        self.schema = schema_of(newest, job)
        self.sink: Sink = sink_of(job, self.registry)

    def find(self, wanted: str, repeat: int = 0) -> Found:
        """The row whose `id` is `wanted`, else the one at `<file>:<row>`.

        Raises UsageError where there is none, or several bear that id: it names their places.
        """
        places = list(self._with_id(wanted)) or list(self._at(wanted))
        found = [place for place in places if place[3] % place[0].repeat == repeat]
        if not found:
            what = f"row {wanted!r} has no repeat {repeat}" if places else f"no row has the id {wanted!r}"
            raise UsageError(f"{self.store.uri}: {what}; give an id, or <manifest file>:<row>, of a finished shard")
        if len(found) > 1:
            keys = [self.at(*place).place for place in found[:5]]
            raise UsageError(
                f"{self.store.uri}: {len(found)} rows have the id {wanted!r}; give the place of one: {', '.join(keys)}"
                + (", ..." if len(found) > 5 else "")
            )
        return self.at(*found[0])

    def at(self, plan: Plan, marker: Marker, shard: Shard, index: int) -> Found:
        """One row of a published shard."""
        for i, row in enumerate(reread(self.store, self.sink, shard, self.schema, {index})):
            if i == index:
                return Found(plan, marker, shard, index, row)
        raise UsageError(f"{self.store.uri}: {shard.name} cannot be read back up to row {index}; batchsd verify")

    def _with_id(self, wanted: str) -> Iterator[tuple[Plan, Marker, Shard, int]]:
        theirs = manifest_column("id", self.job)
        names = [f.name for f in self.schema if f.metadata.get(MANIFEST) == theirs.encode()]
        for plan, marker, shard in self._shards() if names else ():
            if self._may_hold(marker, names[0], wanted):
                for index, row in enumerate(reread(self.store, self.sink, shard, self.schema, False)):
                    if _is(row.travelled.get(theirs), wanted):
                        yield plan, marker, shard, index

    def _may_hold(self, marker: Marker, column: str, wanted: str) -> bool:
        """Whether a shard is worth reading whole: of tables one column tells, of other files nothing."""
        import pyarrow.parquet as pq

        tables = [place_of(file.name) for file in marker.files if file.name.endswith(".parquet")]
        for name in tables:
            opened = self.store.open(name)
            if opened is not None:
                with opened, pq.ParquetFile(opened) as table:
                    if column in table.schema_arrow.names:
                        values = table.read([column]).column(0).to_pylist()
                        if any(_is(value, wanted) for value in values):
                            return True
        return not tables

    def _at(self, wanted: str) -> Iterator[tuple[Plan, Marker, Shard, int]]:
        name, _, row = wanted.rpartition(":")
        for plan, marker, shard in self._shards() if row.isdigit() else ():
            offset = int(row) - shard.start
            if plan.files[shard.file]["name"] == name and 0 <= offset < shard.count:
                yield from ((plan, marker, shard, offset * plan.repeat + i) for i in range(plan.repeat))

    def _shards(self) -> Iterator[tuple[Plan, Marker, Shard]]:
        for ledger in self.ledgers:
            plan = ledger.plan()
            assert plan is not None, ledger.number
            shards = shards_of(plan)
            for marker in ledger.markers():
                yield plan, marker, shards[marker.shard]

    def request(self, found: Found) -> Request:
        """What the row asked, as its output columns say it; images from where they were.

        Raises UsageError where that is not all: its hash must be the row's own.
        """
        ours = found.row.ours
        if not ours["row_hash"]:
            raise UsageError(f"{found.place} was refused ({ours['status']}: {ours['error']}): there is nothing to draw")
        hasher = row_hasher(found.plan.hard["checkpoint"], {k: found.plan.hard[k] for k in pixel_settings(self.job)})
        # A size may have been left to the model or the init image: the output tells what came of it.
        sizes = [{"height": h, "width": w} for h in (ours["height"], None) for w in (ours["width"], None)]
        for inputs in (self._recorded_inputs, self._manifest_inputs):
            try:
                asked = {name: ours[name] for name in RESOLVED} | {"inputs": inputs(found)}
            except (RowError, UsageError):
                continue
            for fields in (asked | size for size in sizes):
                if hasher(fields) == ours["row_hash"]:
                    given = pa.Table.from_pylist([dict(found.row.travelled)])
                    return Request(key=found.place, index=0, columns=given, row_hash=ours["row_hash"], **fields)
        raise UsageError(
            f"{found.place}: what it asked cannot be had again (its row_hash is another): its input images are not in "
            "the output (output.keep_inputs puts them there), and its manifest is gone or has other ones now"
        )

    def _recorded_inputs(self, found: Found) -> dict[str, Any]:
        return self._inputs(found, found.row.travelled)

    def _manifest_inputs(self, found: Found) -> dict[str, Any]:
        """The manifest's cells of that row, for images that did not travel."""
        import pyarrow.parquet as pq

        file, disk = found.plan.files[found.shard.file], disk_of(self.job.input.manifest)
        row = found.shard.start + found.index // found.plan.repeat
        with pq.ParquetFile(disk.files().open_input_file(file["path"])) as table:
            for group in range(table.metadata.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                if row < rows:
                    return self._inputs(found, table.read_row_group(group).slice(row, 1).to_pylist()[0])
                row -= rows
        raise UsageError(f"{file['path']}: no row {row}")

    def _inputs(self, found: Found, values: Mapping[str, Any]) -> dict[str, Any]:
        task, file = found.row.ours["task"], found.plan.files[found.shard.file]
        cells, inputs = Cells(disk_of(self.job.input.manifest), dirname(file["path"])), {}
        for name in names_of(self.registry).tasks[task]:
            value = values.get(manifest_column(name, self.job))
            if value is None or value != value:
                value = getattr(self.job.conditioning, name, None)
            elif name in IMAGE_INPUTS:
                value = cells.read(value)
            inputs[name] = value
        return inputs

    def recipe(self, plan: Plan) -> Recipe:
        """The worker as the plan has it. Raises UsageError where its checkpoint is not at hand."""
        hard, empty = plan.hard, Manifest(Disk(""), (), pa.schema([]))
        packed = self.registry.sources[1:]
        return Recipe(self.job, empty, packed, self.schema, hard["checkpoint"], hard["model.dtype"], self.store.uri)

    def compare(self, found: Found, device: str = "") -> Comparison:
        """Draw the row again, alone, and look at what differs."""
        request = self.request(found)
        wanted = found.plan.hard["checkpoint"]
        try:
            bench = self.recipe(found.plan)(device)
        except UsageError as error:
            where = f"this row was drawn with checkpoint {wanted}; --model says where it lies now"
            raise UsageError(f"{error}; {where}") from None
        ((_, drawn),) = bench.generate([(replace(found.shard, count=1), iter([request]))])
        stored = (found.row.ours["image"] or {}).get("bytes")
        pixels = difference(pixels_of(stored), pixels_of(drawn.image)) if stored and drawn.image else None
        return Comparison(found, drawn, pixels, tuple(self._versions(found, bench.facts)))

    def _versions(self, found: Found, now: Mapping[str, Any]) -> Iterator[str]:
        """Everything that could move a pixel and is not as it was when the shard was drawn."""
        then, hard = found.marker.facts, found.plan.hard
        for name in dict.fromkeys([*then, *now]):
            if then.get(name) != now.get(name) and name not in WHO:
                yield f"{name}: {then.get(name, 'unknown')} then, {now.get(name, 'none')} now"
        if hard["pixels_version"] != PIXELS_VERSION:
            yield f"pixels_version: {hard['pixels_version']} then, {PIXELS_VERSION} now: other pixels on purpose"
        for name, here in source_facts(self.registry.sources[1:]).items():
            if hard.get(name) != here:
                yield f"{name}: {hard.get(name)} then, {here} now"


def schema_of(plan: Plan, job: Job) -> pa.Schema:
    """The output's columns by their origins, from the plan alone; types are not told."""
    ours = {job.output.columns.get(name, name): name for name in (*RESOLVED, *MADE)}
    given = {new: name for name, new in job.output.columns.items()}
    fields = []
    for name in plan.schema:
        origin = {OURS: ours[name]} if name in ours else {MANIFEST: given.get(name, name)}
        fields.append(pa.field(name, pa.null(), metadata=origin))
    return pa.schema(fields)


def pixels_of(data: bytes) -> np.ndarray:
    """H W 3, uint8."""
    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def difference(one_HW3: np.ndarray, other_HW3: np.ndarray) -> Pixels:
    """Pictures of different sizes differ in all their pixels."""
    import numpy as np

    if one_HW3.shape != other_HW3.shape:
        return Pixels(255, 255.0, 1.0)
    apart_HW3 = np.abs(one_HW3.astype(np.int16) - other_HW3)
    return Pixels(int(apart_HW3.max()), float(apart_HW3.mean()), float((apart_HW3.max(-1) > 0).mean()))


def side_by_side(comparison: Comparison) -> bytes:
    """A PNG of both pictures, the stored one on the left; a missing one is grey."""
    from PIL import Image

    stored = (comparison.found.row.ours["image"] or {}).get("bytes")
    both = (stored, comparison.drawn.image)
    pictures = [Image.open(io.BytesIO(data)).convert("RGB") if data else None for data in both]
    size = next((picture.size for picture in pictures if picture), (64, 64))
    sheet = Image.new("RGB", (2 * size[0] + 8, size[1]), "grey")
    for i, picture in enumerate(pictures):
        if picture:
            sheet.paste(picture, (i * (size[0] + 8), 0))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _is(value: Any, wanted: str) -> bool:
    return value is not None and key_text("id", value) == wanted
