"""Conditioned rows among others: one network call for all, odd ones alone, bad ones with a reason."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from batchsd.defaults import register_tasks
from batchsd.job import load as load_job
from batchsd.manifest import open_manifest
from batchsd.model.checkpoint import load
from batchsd.reader import Reader
from batchsd.rows import Names
from batchsd.types import Shard

from .test_parity import draw, engine, mask, picture, pixels, png, request


def array(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def test_text_image_and_inpaint_share_every_network_call(checkpoint: Path) -> None:
    both = {"init_image": png(picture()), "mask": png(mask())}
    rows = [
        request("text", key="text", height=24, width=32),
        request("image", key="image", inputs={"init_image": both["init_image"], "strength": 1.0}),
        request("inpaint", key="inpaint", inputs=both, scheduler="euler"),
    ]
    drawer = engine(checkpoint)
    before = drawer.meter.network_calls
    together = draw(drawer, *rows)
    assert drawer.meter.network_calls - before == 7, "each of 7 steps is one call for three rows"
    for row, record in zip(rows, together, strict=True):
        assert np.abs(pixels(record) - pixels(draw(drawer, row)[0])).max() <= 1


def test_strength_0_is_the_round_trip_of_the_vae(checkpoint: Path) -> None:
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(checkpoint / "vae")
    image = torch.from_numpy(np.asarray(picture(), np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    with torch.no_grad():
        latents = vae.encode(image).latent_dist.sample(torch.Generator().manual_seed(7))
        theirs = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0).numpy() * 255
    drawer = engine(checkpoint)
    calls = drawer.meter.network_calls
    for task, more in (("image", {}), ("inpaint", {"mask": png(mask())})):
        for strength in (0, 0.1):  # a tenth of 7 steps is none
            inputs = {"init_image": png(picture()), "strength": strength, **more}
            (record,) = draw(drawer, request(task, inputs=inputs))
            assert np.abs(pixels(record) - theirs).max() <= 1
    assert drawer.meter.network_calls == calls


def test_pasted_pixels_are_the_init_images_own(checkpoint: Path) -> None:
    inputs = {"init_image": png(picture()), "mask": png(mask())}
    plain, pasted = (
        pixels(draw(engine(checkpoint), request("inpaint", inputs={**inputs, "paste_back": paste}))[0])
        for paste in (False, True)
    )
    drawn = np.asarray(mask()) >= 128
    assert np.array_equal(pasted[~drawn], np.asarray(picture())[~drawn])
    assert np.array_equal(pasted[drawn], plain[drawn])
    assert np.abs(plain[~drawn] - np.asarray(picture())[~drawn]).max() > 3, "the VAE alone does not keep them"


def test_the_size_is_the_rows_else_the_images(checkpoint: Path) -> None:
    def size(**sides: int) -> tuple[int | None, int | None]:
        (record,) = draw(
            engine(checkpoint), request("image", inputs={"init_image": png(picture(70, 37))}, **sides)
        )
        return record.width, record.height

    factor = load(checkpoint).scale_factor
    assert size() == (70 // factor * factor, 37 // factor * factor)
    assert size(width=32, height=16) == (32, 16)
    assert size(height=16) == (round(70 * 16 / 37 / factor) * factor, 16)
    assert size(width=32) == (32, round(37 * 32 / 70 / factor) * factor)


# -- rows of a manifest, from cell to picture

GOOD = png(picture())
JPEG = io.BytesIO()
picture(256, 192).save(JPEG, "JPEG")
GIF = io.BytesIO()
picture().save(GIF, "GIF", save_all=True, append_images=[picture(seed=1)])
CMYK = io.BytesIO()
picture().convert("CMYK").save(CMYK, "TIFF")
WIDE = io.BytesIO()
Image.fromarray(np.linspace(0, 65535, 24 * 32).reshape(24, 32).astype(np.uint16)).save(WIDE, "PNG")

ROWS = {  # columns, status, a piece of the error
    "missing file": ({"init_image": "nowhere.png"}, "bad_image", "init_image: nowhere.png: no such file"),
    "web": ({"init_image": "http://host/a.png"}, "bad_image", "input.allow_hosts = ['host']"),
    "truncated JPEG": ({"init_image": JPEG.getvalue()[:1500]}, "bad_image", "cannot be decoded"),
    "zero bytes": ({"init_image": b""}, "bad_image", "zero bytes"),
    "null": ({"init_image": None}, "bad_input", "init_image: null; task 'image' needs it"),
    "strength": ({"init_image": GOOD, "strength": 1.5}, "bad_input", "strength: '1.5' is not a number of 0 to 1"),
    "tiny": ({"init_image": png(picture(9, 9))}, "bad_input", "give the row a size"),
    "no mask": ({"init_image": GOOD, "task": "inpaint"}, "bad_input", "mask: null"),
    "mask of another aspect": (
        {"init_image": GOOD, "mask": png(mask(32, 32)), "task": "inpaint"}, "bad_image",
        "mask: 32 x 32 pixels, the init image has 32 x 24",
    ),
    "mask of another size": ({"init_image": GOOD, "mask": png(mask(64, 48)), "task": "inpaint"}, "ok", ""),
    "depth on a text model": (
        {"depth": array(np.eye(8)), "task": "depth"}, "bad_input", "1 (depth) extra input channels",
    ),
    "CMYK": ({"init_image": CMYK.getvalue()}, "ok", ""),
    "animated GIF": ({"init_image": GIF.getvalue()}, "ok", ""),
    "16-bit PNG": ({"init_image": WIDE.getvalue()}, "ok", ""),
    "good": ({"init_image": GOOD}, "ok", ""),
}  # fmt: skip


@pytest.fixture
def written(tmp_path: Path) -> Path:
    rows = [
        {"id": name, "prompt": "a red cube", "seed": 7, **columns} for name, (columns, *_) in ROWS.items()
    ]
    blank = dict.fromkeys(("init_image", "mask", "depth"))
    picture_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

    def cell(value: object) -> dict | None:
        if value is None:
            return None
        return {"bytes": None, "path": value} if isinstance(value, str) else {"bytes": value, "path": None}

    for row in rows:
        row |= {name: cell(row.get(name)) for name in blank}
    schema = pa.schema(
        {
            "id": pa.string(), "prompt": pa.string(), "seed": pa.int64(), "task": pa.string(),
            "strength": pa.float64(), **dict.fromkeys(blank, picture_type),
        }
    )  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "m.parquet")
    (tmp_path / "a.toml").write_text(
        '[input]\nmanifest = "m.parquet"\n[model]\npath = "m"\n[output]\nuri = "o"\n'
        '[conditioning]\ntask = "image"\n[sampler]\nscheduler = "ddim"\nsteps = 7\n'
    )
    return tmp_path / "a.toml"


def test_bad_rows_have_a_reason_and_harm_nobody(checkpoint: Path, written: Path) -> None:
    job = load_job(written, [], {})
    names = Names(("ddim",), {name: task.columns for name, task in register_tasks().items()})
    read = Reader(open_manifest(job), job, names, hasher=lambda fields: "h").read
    rows = list(read(Shard(1, 0, 1, 0, 0, len(ROWS))))
    drawer = engine(checkpoint)
    records = dict(zip(ROWS, draw(drawer, *rows), strict=True))
    for name, (_, status, message) in ROWS.items():
        assert records[name].status == status, (name, records[name].error)
        assert message in (records[name].error or ""), name
    alone = request("image", prompt="a red cube", negative_prompt=None, inputs={"init_image": GOOD})
    assert np.abs(pixels(records["good"]) - pixels(draw(drawer, alone)[0])).max() <= 1
    grey = np.asarray(Image.open(io.BytesIO(WIDE.getvalue()))) / 257
    assert grey.max() > 250 and pixels(records["16-bit PNG"]).std() > 3
