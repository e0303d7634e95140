"""A job whose manifest holds everything that goes wrong, run as a user runs it, on the shipped model.

The oracle is the same job without the bad rows: what stands beside them must be equal to the byte.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from batchsd.cli import commands
from tests.test_images import bands, file, header_only_png

JOB = """
[input]
manifest = "{name}.parquet"
[model]
path = "tiny-scenes"
[conditioning]
task = "image"
strength = 0.5
[sampler]
steps = 3
guidance_scale = 2.0
height = 64
width = 64
[output]
uri = "{name}"
[run]
seed = 3
deterministic = true
batch_size = 4
max_failed = 1.0
"""

MASK = Image.fromarray(np.pad(np.full((32, 32), 255, np.uint8), 16))

GOOD = {
    "png": {"init_image": "good.png"},
    "text": {"task": "text"},
    "inpaint": {"task": "inpaint", "init_image": "good.png", "mask": "mask.png"},
    "last": {"init_image": "below/good.jpg", "strength": 0.9},
}

TEXT = {"task": "text"}

ODD_VALUES: dict[str, dict[str, object]] = {
    "a link": {"init_image": "link.png"},
    **{f"strength {value}": {"init_image": "good.png", "strength": value} for value in (np.nan, 0.0, 1.0)},
    **{f"prompt {name}": {**TEXT, "prompt": prompt} for name, prompt in (
        ("empty", ""), ("spaces", "  "), ("emoji", "a \U0001f408 \U0001f9ff"), ("null byte", "a\0b"),
        ("lines", "a\r\nb"), ("marks", "<|endoftext|> {x} {{"), ("long", "y" * 19_999),
    )},
    **{f"{name} {value}": {**TEXT, name: value} for name, value in (
        ("steps", 1.0), ("steps", np.nan), ("guidance_scale", 0.0), ("guidance_scale", -3.0),
        ("guidance_scale", np.nan), ("seed", -1.0), ("seed", 3.0), ("seed", 2.0**32 - 1), ("negative_prompt", ""),
        ("scheduler", "DPM++ 2M Karras"), ("scheduler", "EULER"),
    )},
}  # fmt: skip
"""Values at the edge of what is taken: pictures too."""

ODD = ("cmyk.jpg", "frames.gif", "wide.png", "clear.png", "palette.png", "bits.png", "turned.jpg", "grey-alpha.png")
"""Unusual, and still pictures."""

BAD: dict[str, tuple[dict[str, object], str, str]] = {  # columns, status, a piece of the error
    "missing file": ({"init_image": "no.png"}, "bad_image", "init_image: no.png: no such file"),
    "truncated JPEG": ({"init_image": "half.jpg"}, "bad_image", "init_image: cannot be decoded"),
    "30000 x 30000": ({"init_image": "huge.png"}, "bad_image", "init_image: more than 67,108,864 pixels"),
    "zero bytes": ({"init_image": "empty.png"}, "bad_image", "init_image: an empty file: zero bytes"),
    "a web page": ({"init_image": "page.png"}, "bad_image", "init_image: not an image file of PNG, JPEG"),
    "mask of another size": (
        {"task": "inpaint", "init_image": "good.png", "mask": "wide-mask.png"}, "bad_image",
        "mask: 64 x 32 pixels, the init image has 64 x 64: another aspect",
    ),
    "no mask": ({"task": "inpaint", "init_image": "good.png"}, "bad_input", "mask: null; task 'inpaint' needs it"),
    "no image": ({}, "bad_input", "init_image: null; task 'image' needs it"),
    "depth of a text model": (
        {"task": "depth", "depth": "nan.npy", "init_image": "good.png"}, "bad_input", "1 (depth) extra input channels",
    ),
    "pipe": ({"init_image": "pipe.png"}, "bad_image", "init_image: pipe.png: not a plain file"),
    "device": ({"init_image": "/dev/zero"}, "bad_image", "init_image: /dev/zero: not a plain file"),
    "folder": ({"init_image": "below"}, "bad_image", "init_image: below: not a plain file"),
    "out of the folder": ({"init_image": "../" * 30 + "etc/passwd"}, "bad_image", "not an image file of"),
    "web": ({"init_image": "https://a.example/p.png"}, "bad_image", "input.allow_hosts = ['a.example']"),
    "bad base64": ({"init_image": "data:image/png;base64,#"}, "bad_image", "base64 is damaged"),
    "strength": ({"init_image": "good.png", "strength": 7.0}, "bad_input", "strength: '7.0' is not a number of 0 to 1"),
    "link to nowhere": ({"init_image": "dead.png"}, "bad_image", "init_image: dead.png: no such file"),
    "link to itself": ({"init_image": "loop.png"}, "bad_image", "init_image: loop.png: no such file"),
    "empty path": ({"init_image": ""}, "bad_image", "init_image: an empty text is neither a picture's bytes"),
    "long path": ({"init_image": "a" * 5000}, "bad_image", "File name too long"),
    "null byte in a path": ({"init_image": "a\0.png"}, "bad_image", "a path, or a URI of"),
    "other scheme": ({"init_image": "ftp://a.example/p.png"}, "bad_image", "a path, or a URI of file, s3"),
} | {
    f"{name} {value}": ({**TEXT, name: value}, "bad_input", f"{name}: {message}")
    for name, value, message in (
        ("steps", 0.0, "0 is outside 1 to 1000"), ("steps", 1e9, "1000000000 is outside"),
        ("steps", 2.5, "2.5 is not a whole number"), ("seed", -2.0, "-2 is outside -1 to 4294967295"),
        ("seed", 2.0**63, "9223372036854775808 is outside"), ("guidance_scale", np.inf, "inf is not a finite number"),
        ("height", 60.0, "60 is not a multiple of 8"), ("width", 0.0, "0 is outside 16 to 4096"),
        ("width", 1e300, "100000000000000005250476025520442024870446858110815915491... is outside 16"),
        ("scheduler", "nope", "'nope' is unknown; have ddim"), ("task", "", "'' is unknown; have depth"),
        ("prompt", None, "null (an empty text is a valid prompt)"),
        ("prompt", "x " * 50_000, "100,000 characters, at most 20,000"),
        ("negative_prompt", "x " * 50_000, "100,000 characters, at most 20,000"),
    )
}  # fmt: skip


def write_files(folder: Path) -> None:
    (folder / "below").mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    scene = bands().resize((64, 64))
    files = {
        "good.png": file(scene), "mask.png": file(MASK), "below/good.jpg": file(scene, "JPEG"),
        "wide-mask.png": file(MASK.resize((64, 32))), "half.jpg": file(scene.resize((256, 256)), "JPEG")[:900],
        "huge.png": header_only_png(30000, 30000), "empty.png": b"", "page.png": b"<!doctype html><p>404",
        "cmyk.jpg": file(scene.convert("CMYK"), "JPEG"),
        "frames.gif": file(scene, "GIF", save_all=True, append_images=[MASK.convert("RGB")]),
        "wide.png": file(Image.fromarray(np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16))),
        "clear.png": file(scene.convert("RGBA")), "palette.png": file(scene.convert("P"), transparency=0),
        "bits.png": file(MASK.convert("1")), "turned.jpg": file(scene, "JPEG", exif=turned),
        "grey-alpha.png": file(scene.convert("LA")),
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_bytes(content)
    np.save(folder / "nan.npy", np.full((8, 8), np.nan, np.float32))
    os.mkfifo(folder / "pipe.png")
    for name, target in (("link", "good"), ("dead", "nowhere"), ("loop", "loop")):
        (folder / f"{name}.png").symlink_to(f"{target}.png")


def write_job(folder: Path, name: str, rows: dict[str, dict[str, object]]) -> Path:
    texts = ("id", "prompt", "negative_prompt", "scheduler", "task", "init_image", "mask", "depth")
    numbers = ("strength", "steps", "seed", "guidance_scale", "height", "width")
    schema = pa.schema({**dict.fromkeys(texts, pa.string()), **dict.fromkeys(numbers, pa.float64())})
    table = [{"id": key, "prompt": "a large red cube", **columns} for key, columns in rows.items()]
    pq.write_table(pa.Table.from_pylist(table, schema), folder / f"{name}.parquet")
    (folder / f"{name}.toml").write_text(JOB.format(name=name))
    return folder / f"{name}.toml"


def drawn(folder: Path, name: str) -> dict[str, dict]:
    files = sorted((folder / name / "data").glob("*.parquet"))
    return {row["id"]: row for path in files for row in pq.read_table(path).to_pylist()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write_files(folder)
    good = list(GOOD.items())
    odd = [(name, {"init_image": name}) for name in ODD]
    odd += ODD_VALUES.items()
    bad = [(name, columns) for name, (columns, *_) in BAD.items()]
    # good rows first, among and after the bad ones
    write_job(folder, "all", dict([*good[:2], *bad[:8], *odd[:4], good[2], *bad[8:], *odd[4:], good[3]]))
    write_job(folder, "good", dict(good))
    for name in ("all", "good"):
        done = CliRunner().invoke(commands, ["run", str(folder / f"{name}.toml"), "--local"])
        assert done.exit_code == 0, done.output
    return folder


def test_each_bad_row_says_why(folder: Path) -> None:
    rows = drawn(folder, "all")
    assert len(rows) == len(GOOD) + len(ODD) + len(ODD_VALUES) + len(BAD)
    for name, (_, status, message) in BAD.items():
        row = rows[name]
        assert (row["status"], row["image"]) == (status, None), name
        assert message in row["error"] and "\n" not in row["error"], (name, row["error"])
        column, _, rest = row["error"].partition(": ")
        assert not rest.startswith(f"{column}: "), row["error"]


def test_unusual_pictures_are_pictures(folder: Path) -> None:
    rows = drawn(folder, "all")
    for name in (*ODD, *ODD_VALUES):
        assert rows[name]["status"] == "ok", (name, rows[name]["error"])
        pixels = np.asarray(Image.open(io.BytesIO(rows[name]["image"]["bytes"])))
        assert pixels.shape == (64, 64, 3) and pixels.std() > 3


def test_the_others_are_as_they_are_without_them(folder: Path) -> None:
    rows, without = drawn(folder, "all"), drawn(folder, "good")
    assert set(without) == set(GOOD)
    for name in GOOD:
        assert without[name]["status"] == "ok", without[name]["error"]
        assert rows[name]["image"]["bytes"] == without[name]["image"]["bytes"], name
        assert rows[name]["row_hash"] == without[name]["row_hash"]


def test_validate_names_what_can_be_seen_without_drawing(folder: Path) -> None:
    done = CliRunner().invoke(commands, ["validate", str(folder / "all.toml")])
    named = {line.partition(": ")[0] for line in done.output.splitlines()}
    unseen = {"truncated JPEG"}
    listed = [name for name in BAD if name not in unseen][:20]  # as many lines as are shown
    assert set(listed) <= named and not named & {*GOOD, *ODD, *ODD_VALUES, *unseen}
    assert f", {len(set(BAD) - unseen)} bad" in done.output
