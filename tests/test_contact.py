"""The contact sheet, measured on its own pixels: what stands where, and that it is the same each time."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFont

from batchsd import contact
from batchsd.columns import IMAGE_TYPE, MANIFEST, OURS
from batchsd.contact import GAP, GRAY, LINE, MARGIN, SEAM, wrap, write_contact_sheet
from batchsd.store import LocalStore
from batchsd.types import UsageError


def ours(name, column, kind):
    """A column as `output_schema` marks it: the prompt is renamed here."""
    return pa.field(column, kind, metadata={OURS: name})


SCHEMA = pa.schema(
    [
        ours("image", "image", IMAGE_TYPE),
        ours("prompt", "text", pa.string()),
        ours("status", "status", pa.string()),
        ours("error", "error", pa.string()),
        pa.field("extra", pa.int64()),
    ]
)
TOP = MARGIN + 2 * LINE


def color(number):
    """A colour of its own for each row."""
    return (number * 5 % 256, 255 - number, number * 90 % 256)


def row(number, failed=False, size=(64, 64)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color(number)).save(buffer, "PNG")
    image = None if failed else {"bytes": buffer.getvalue(), "path": f"{number}.png"}
    status, error = ("bad_input", "height 60") if failed else ("ok", None)
    return {"image": image, "text": f"prompt {number}", "status": status, "error": error, "extra": number}


@pytest.fixture
def run(tmp_path):
    """Writes rows as a run of three shards with small row groups."""

    def write(rows, schema=SCHEMA):
        (tmp_path / "run" / "data").mkdir(parents=True)
        step = -(-len(rows) // 3)
        for start in range(0, len(rows), step):
            table = pa.Table.from_pylist(rows[start : start + step], schema)
            name = f"train-{start // step:05d}-of-00003.parquet"
            pq.write_table(table, tmp_path / "run" / "data" / name, row_group_size=4)
        return tmp_path / "run"

    return write


def write(run_folder, **options):
    paths = sorted((run_folder / "data").glob("*.parquet"))
    tables = [(f"data/{path.name}", pq.read_metadata(path).num_rows) for path in paths]
    return write_contact_sheet(LocalStore(run_folder), tables, **options)


def sheet(run_folder, **options):
    count = write(run_folder, **options)
    return count, np.asarray(Image.open(run_folder / "contact.png"))


def corner(number, tile, across):
    """Top left pixel of a tile."""
    x = MARGIN + number % across * (tile + GAP)
    y = TOP + number // across * (tile + GAP // 2 + contact.LINES * LINE + GAP)
    return x, y


def test_pictures_stand_in_row_order(run):
    count, pixels = sheet(run([row(i) for i in range(20)]))
    assert count == 20
    for number in range(20):
        x, y = corner(number, 192, 7)
        tile = pixels[y : y + 192, x : x + 192].reshape(-1, 3)
        assert (tile == color(number)).all()  # 64 pixels grew three times


def test_the_label_is_drawn_below(run):
    _, pixels = sheet(run([row(i) for i in range(3)]))
    x, y = corner(1, 192, 3)
    label = pixels[y + 192 + GAP // 2 : y + 192 + GAP // 2 + LINE, x : x + 192]
    assert (label < 128).any() and (label == 255).mean() > 0.8


def test_inputs_stand_before_what_became_of_them(run):
    """Kept as bytes or in a struct, under another name too; a path is no picture, and one may be damaged."""

    def png(value):
        file = io.BytesIO()
        Image.new("RGB", (64, 64), value).save(file, "PNG")
        return file.getvalue()

    given = {"start": pa.binary(), "mask": IMAGE_TYPE, "depth": pa.string(), "strength": pa.float64()}
    schema = pa.schema(
        [*SCHEMA, *(pa.field(name, kind, metadata={MANIFEST: name}) for name, kind in given.items())],
        {"batchsd": json.dumps({"job": {"input": {"columns": {"init_image": "start"}}}})},
    )
    rows = [
        {**row(i), "start": png((9, 9, 200)), "mask": {"bytes": png("white")}, "depth": "a.png", "strength": 0.5}
        for i in range(3)
    ]
    rows[1]["start"], rows[2]["mask"] = b"no picture", None
    _, pixels = sheet(run(rows, schema))
    for number in range(3):
        left, y = MARGIN + number * (3 * 128 + 2 * SEAM + GAP), TOP
        places = [left + k * (128 + SEAM) for k in range(3)]
        start, mask, drawn = (pixels[y + 64 : y + 128, x : x + 128] for x in places)
        assert (drawn == color(number)).all()
        assert number == 1 or (start == (9, 9, 200)).all()
        assert (mask == 255).all()
    damaged = pixels[TOP + 64 : TOP + 128, MARGIN + 3 * 128 + 2 * SEAM + GAP :][:, :128]
    assert (damaged == int(GRAY[1:3], 16)).any()


def test_failed_row_is_a_gray_tile_with_words(run):
    _, pixels = sheet(run([row(0), row(1, failed=True)]))
    x, y = corner(1, 192, 2)
    tile = pixels[y : y + 192, x : x + 192]
    gray = int(GRAY[1:3], 16)
    assert (tile[100:] == gray).all()
    assert (tile[8 : 8 + LINE] < 100).any()


def test_all_rows_failed(run):
    count, pixels = sheet(run([row(i, failed=True) for i in range(2)]))
    assert count == 2 and (pixels == int(GRAY[1:3], 16)).any()


def test_rows_are_spread_over_the_whole_run(run):
    count, pixels = sheet(run([row(i) for i in range(45)]), most=5)
    assert count == 5
    for place, number in enumerate([0, 9, 18, 27, 36]):
        x, y = corner(place, 192, 5)
        assert tuple(pixels[y + 96, x + 96]) == color(number)


def test_only_the_row_groups_of_shown_rows_are_read(run, monkeypatch):
    seen = []
    read = pq.ParquetFile.read_row_group

    def watch(self, group, columns):
        seen.append((group, tuple(columns)))
        return read(self, group, columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", watch)
    sheet(run([row(i) for i in range(60)]), most=3)
    assert [group for group, _ in seen] == [0, 0, 0]  # rows 0, 20 and 40 begin the three files
    assert seen[0][1] == ("image", "text", "status", "error")


def test_same_run_same_bytes(run):
    folder = run([row(i, failed=i == 2) for i in range(6)])
    outs = []
    for _ in range(2):
        write(folder)
        outs.append((folder / "contact.png").read_bytes())
    assert outs[0] == outs[1]


@pytest.mark.parametrize(
    "size, shown", [((512, 256), (256, 128)), ((64, 96), (128, 192)), ((200, 200), (200, 200))]
)
def test_sizes(run, size, shown):
    _, pixels = sheet(run([row(0, size=size)]))
    ys, xs = np.where((pixels == color(0)).all(-1))
    assert (xs.max() - xs.min() + 1, ys.max() - ys.min() + 1) == shown


def test_wrap_keeps_width_and_lines():
    font = ImageFont.load_default(13)
    text = "a very long prompt " * 9 + "w" * 200
    lines = wrap(text, font, 150, 3)
    assert len(lines) == 3 and all(font.getlength(line) <= 150 for line in lines)
    assert lines[-1].endswith("...") and text.startswith(f"{lines[0]} {lines[1]}")
    (cut,) = wrap("w" * 20_000, font, 150, 3)
    assert font.getlength(cut) <= 150 < font.getlength("w" + cut) and set(cut) == {"w", "."}
    assert wrap("short one", font, 150, 3) == ["short one"]
    assert wrap("", font, 150, 3) == []


def test_a_run_without_rows(tmp_path):
    with pytest.raises(UsageError, match="no rows"):
        write(tmp_path)
