"""A contact sheet: some of a run's pictures on one PNG, each with its prompt below it.

The rows are spread evenly over the run, so the sheet shows its end as well as its beginning. Only the row
groups that hold a chosen row are read, one at a time. The same run gives the same sheet.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from batchsd.columns import OURS
from batchsd.types import UsageError

MARGIN, GAP, TEXT, LINES = 24, 16, 13, 3  # pixels; the last is how many lines of a prompt are shown
LINE = TEXT + 5
PAPER, INK, PALE, GRAY = "#ffffff", "#1a1a1a", "#555555", "#d4d4d4"


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it is shown: the picture, or None with what went wrong."""

    picture: Image.Image | None
    label: str
    failure: str


def write_contact_sheet(run_folder: Path, out: Path, most: int = 64) -> int:
    """Draw up to `most` rows of `run_folder/data/*.parquet` to the PNG file `out`; give how many were drawn.

    Raises UsageError where the run holds no rows yet.
    """
    files = sorted((run_folder / "data").glob("*.parquet"))
    total = sum(pq.read_metadata(file).num_rows for file in files)
    if not total:
        raise UsageError(f"{run_folder}: no rows in data/*.parquet to show; run the job first")
    count = min(most, total)
    chosen = [i * total // count for i in range(count)]
    names = _names(pq.read_schema(files[0]))
    rows = [_row(values, names) for values in _read(files, chosen, list(names.values()))]
    shown = f"{total} rows" if count == total else f"{count} of {total} rows"
    _draw(rows, f"{run_folder.resolve().name}: {shown}").save(out, "PNG")
    return count


def _names(schema: pa.Schema) -> dict[str, str]:
    """Which column holds which of our values: a job may have renamed them."""
    ours = {field.metadata[OURS].decode(): field.name for field in schema if OURS in (field.metadata or {})}
    return {name: ours[name] for name in ("image", "prompt", "status", "error")}


def _read(files: Sequence[Path], chosen: Sequence[int], names: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of those numbers, counted over all files; `chosen` rises."""
    first = 0  # number of the first row of the row group at hand
    wanted = list(chosen)
    for file in files:
        with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            for group in range(parquet.num_row_groups):
                size = parquet.metadata.row_group(group).num_rows
                here = [number - first for number in wanted if number < first + size]
                if here:
                    yield from parquet.read_row_group(group, names).take(here).to_pylist()
                wanted = wanted[len(here) :]
                first += size


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
