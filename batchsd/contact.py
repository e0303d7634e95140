"""A contact sheet: some of a run's pictures on one PNG, each with its prompt below it.

Where the run holds the images that its rows began with (`output.keep_inputs`), they stand before each picture.

The rows are spread evenly over the run, so the sheet shows its end as well as its beginning. Only the row
groups that hold a chosen row are read, one at a time. The same run gives the same sheet.
"""

from __future__ import annotations

import io
import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from batchsd import images
from batchsd.columns import MANIFEST, ON_REQUEST, OURS, holds_bytes
from batchsd.store import Store
from batchsd.types import RowError, UsageError

CONTACT = "contact.png"
MARGIN, GAP, TEXT, LINES = 24, 16, 13, 3  # pixels; the last is how many lines of a prompt are shown
LINE = TEXT + 5
SIDE, SIDE_OF_MANY, SEAM = 256, 176, 4  # a picture at most; where inputs stand beside it; between them
BESIDE = ("init_image", "mask", "depth", *ON_REQUEST)
PAPER, INK, PALE, GRAY = "#ffffff", "#1a1a1a", "#555555", "#d4d4d4"


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it is shown: its inputs, and the picture, or None with what went wrong."""

    beside: tuple[Image.Image, ...]
    picture: Image.Image | None
    label: str
    failure: str


def write_contact_sheet(store: Store, tables: Sequence[tuple[str, int]], most: int = 64) -> int:
    """Draw up to `most` rows of a run to its `contact.png`; give how many were drawn.

    `tables` are its Parquet files in order, each with its number of rows; only those of chosen rows are opened.
    Raises UsageError where there are no rows.
    """
    total = sum(rows for _, rows in tables)
    if not total:
        raise UsageError(f"{store.uri}: no rows to show; run the job first")
    count = min(most, total)
    rows = list(_read(store, tables, [i * total // count for i in range(count)]))
    shown = f"{total} rows" if count == total else f"{count} of {total} rows"
    sheet = io.BytesIO()
    _draw(rows, f"{store.uri.rpartition('/')[2]}: {shown}").save(sheet, "PNG")
    store.put(CONTACT, sheet.getvalue())
    return count


def _names(schema: pa.Schema) -> dict[str, str]:
    """Which column holds which of our values, and the inputs that are there: a job may have renamed them."""
    ours, given, job = {}, {}, _job(schema)
    theirs = {job.get(name, name): name for name in (*BESIDE, "strength")}
    for field in schema:
        told = field.metadata or {}
        name = theirs.get(told.get(MANIFEST, b"").decode())
        if OURS in told:
            ours[told[OURS].decode()] = field.name
        elif name and (name == "strength" or holds_bytes(field.type)):
            given[name] = field.name
    wanted = ("image", "prompt", "status", "error", *(name for name in BESIDE if name in ours))
    return {name: ours[name] for name in wanted} | given


def _job(schema: pa.Schema) -> Mapping[str, str]:
    """The job's input.columns: ours = theirs."""
    told = json.loads((schema.metadata or {}).get(b"batchsd", b"{}"))
    return told.get("job", {}).get("input", {}).get("columns", {})


def _read(store: Store, tables: Sequence[tuple[str, int]], chosen: Sequence[int]) -> Iterator[Row]:
    """The rows of those numbers, counted over all tables; `chosen` rises."""
    first = 0  # number of the table's first row
    for table, rows in tables:
        here = [number - first for number in chosen if first <= number < first + rows]
        first += rows
        file = store.open(table) if here else None
        if file is None:  # not chosen; or gone, which is for `verify` to say
            continue
        with file, pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            names, start = _names(parquet.schema_arrow), 0
            for group in range(parquet.num_row_groups):
                size = parquet.metadata.row_group(group).num_rows
                wanted = [number - start for number in here if start <= number < start + size]
                start += size
                if wanted:
                    found = parquet.read_row_group(group, list(names.values())).take(wanted).to_pylist()
                    yield from (_row(values, names) for values in found)


def _row(values: Mapping[str, Any], names: Mapping[str, str]) -> Row:
    cell = values[names["image"]]
    inputs = [values[names[name]] for name in BESIDE if name in names]
    side = SIDE_OF_MANY if inputs else SIDE
    beside = tuple(_input(value, side) for value in inputs)
    label = " ".join((values[names["prompt"]] or "").split())
    if "strength" in names and isinstance(strength := values[names["strength"]], float):
        label = f"({strength:g}) {label}"
    if cell is None:
        failure = f"{values[names['status']]}: {values[names['error']] or 'no reason given'}"
        return Row(beside, None, label, " ".join(failure.split()))
    return Row(beside, _to_size(Image.open(io.BytesIO(cell["bytes"])).convert("RGB"), side), label, "")


def _input(cell: Any, side: int) -> Image.Image:
    """An input as it is shown: an empty tile where there is none, or none that can be shown."""
    content = cell["bytes"] if isinstance(cell, Mapping) else cell
    try:
        return _to_size(images.rgb(content), side) if content else Image.new("RGB", (side // 2, side // 2), PAPER)
    except RowError:
        return Image.new("RGB", (side // 2, side // 2), GRAY)


def _to_size(picture: Image.Image, side: int) -> Image.Image:
    """Small pictures grow by whole numbers, so that people see them; large ones shrink to `side` pixels."""
    long = max(picture.size)
    if long > side:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        return picture
    scale = max(1, side * 3 // 4 // long)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.LANCZOS)


def _draw(rows: Sequence[Row], title: str) -> Image.Image:
    font = ImageFont.load_default(TEXT)
    tile = max((max(row.picture.size) for row in rows if row.picture), default=128)
    width = tile + max(len(row.beside) for row in rows) * (tile + SEAM)
    across = min(len(rows), max(3, 1600 // (width + GAP)))
    down = -(-len(rows) // across)
    cell_height = tile + GAP // 2 + LINES * LINE + GAP
    top = MARGIN + 2 * LINE
    size = (2 * MARGIN + across * (width + GAP) - GAP, top + down * cell_height - GAP + MARGIN)
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN), title, INK, ImageFont.load_default(TEXT + 5))
    for number, row in enumerate(rows):
        left = x = MARGIN + number % across * (width + GAP)
        y = top + number // across * cell_height
        for picture in row.beside:
            picture.thumbnail((tile, tile))
            sheet.paste(picture, (x + (tile - picture.width) // 2, y + tile - picture.height))
            x += tile + SEAM
        if row.picture is None:
            pen.rectangle((x, y, x + tile - 1, y + tile - 1), GRAY)
            lines = wrap(row.failure, font, tile - 16, (tile - 16) // LINE)
            pen.multiline_text((x + 8, y + 8), "\n".join(lines), INK, font, spacing=4)
        else:
            sheet.paste(row.picture, (x + (tile - row.picture.width) // 2, y + tile - row.picture.height))
        for i, line in enumerate(wrap(row.label, font, width, LINES)):
            pen.text((left, y + tile + GAP // 2 + i * LINE), line, PALE, font)
    return sheet


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, lines: int) -> list[str]:
    """Break the text into at most `lines` lines of `width` pixels; what does not fit ends in three dots."""
    done: list[str] = []
    line = ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if font.getlength(longer) <= width:
            line = longer
            continue
        if len(done) == lines - 1:
            return [*done, _cut(longer + "...", font, width)]
        if line:
            done.append(line)
        line = _cut(word, font, width)
    return [*done, line] if line else done


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text if it fits, else its beginning and three dots."""
    if font.getlength(text) <= width:
        return text
    stem = text.removesuffix("...")
    # halving, for a word may have 20,000 letters
    first_too_long = bisect_left(range(len(stem)), True, key=lambda n: font.getlength(stem[:n] + "...") > width)
    return stem[: max(0, first_too_long - 1)].rstrip() + "..."
