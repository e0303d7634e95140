"""A contact sheet: some of a run's pictures on one PNG, each with its prompt below it.

The rows are spread evenly over the run, so the sheet shows its end as well as its beginning. Only the row
groups that hold a chosen row are read, one at a time. The same run gives the same sheet.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from batchsd.columns import OURS
from batchsd.store import Store
from batchsd.types import UsageError

CONTACT = "contact.png"
MARGIN, GAP, TEXT, LINES = 24, 16, 13, 3  # pixels; the last is how many lines of a prompt are shown
LINE = TEXT + 5
PAPER, INK, PALE, GRAY = "#ffffff", "#1a1a1a", "#555555", "#d4d4d4"


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it is shown: the picture, or None with what went wrong."""

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
    """Which column holds which of our values: a job may have renamed them."""
    ours = {field.metadata[OURS].decode(): field.name for field in schema if OURS in (field.metadata or {})}
    return {name: ours[name] for name in ("image", "prompt", "status", "error")}


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
    label = " ".join((values[names["prompt"]] or "").split())
    if cell is None:
        failure = f"{values[names['status']]}: {values[names['error']] or 'no reason given'}"
        return Row(None, label, " ".join(failure.split()))
    return Row(_to_size(Image.open(io.BytesIO(cell["bytes"])).convert("RGB")), label, "")


def _to_size(picture: Image.Image) -> Image.Image:
    """Small pictures grow by whole numbers, so that people see them; large ones shrink to 256 pixels."""
    long = max(picture.size)
    if long > 256:
        picture.thumbnail((256, 256), Image.Resampling.LANCZOS)
        return picture
    scale = max(1, 192 // long)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.LANCZOS)


def _draw(rows: Sequence[Row], title: str) -> Image.Image:
    font = ImageFont.load_default(TEXT)
    tile = max((max(row.picture.size) for row in rows if row.picture), default=128)
    across = min(len(rows), max(4, 1600 // (tile + GAP)))
    down = -(-len(rows) // across)
    cell_height = tile + GAP // 2 + LINES * LINE + GAP
    top = MARGIN + 2 * LINE
    size = (2 * MARGIN + across * (tile + GAP) - GAP, top + down * cell_height - GAP + MARGIN)
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN), title, INK, ImageFont.load_default(TEXT + 5))
    for number, row in enumerate(rows):
        x = MARGIN + number % across * (tile + GAP)
        y = top + number // across * cell_height
        if row.picture is None:
            pen.rectangle((x, y, x + tile - 1, y + tile - 1), GRAY)
            lines = wrap(row.failure, font, tile - 16, (tile - 16) // LINE)
            pen.multiline_text((x + 8, y + 8), "\n".join(lines), INK, font, spacing=4)
        else:
            sheet.paste(row.picture, (x + (tile - row.picture.width) // 2, y + tile - row.picture.height))
        for i, line in enumerate(wrap(row.label, font, tile, LINES)):
            pen.text((x, y + tile + GAP // 2 + i * LINE), line, PALE, font)
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
    while stem and font.getlength(stem + "...") > width:
        stem = stem[:-1]
    return stem.rstrip() + "..."
