"""What pictures carry, read back by Pillow and, where it is installed, by exiftool."""

import io
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from batchsd.encode import encoder
from batchsd.provenance import Told, tell, untell
from batchsd.sinks.parquet import ParquetSink
from batchsd.testing import check_sink, example_records, example_schema

ALL = ("parameters", "row", "xmp")
NAME = "train-00000-of-00001"
PROMPT = 'höt, "red"\n<script>: 红'


def drawn(format, prompt=PROMPT, task="text"):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 56, 3), np.uint8)
    data, extension = encoder({"format": format})(pixels)
    record = example_records(1)[0]
    request = replace(record.request, prompt=prompt, task=task)
    return replace(record, request=request, image=data, extension=extension, height=40, width=56)


def told(record, embed=ALL):
    return tell(record, embed, example_schema(), NAME)


def read(data):
    """(parameters, row, XMP) as Pillow finds them."""
    picture = Image.open(io.BytesIO(data))
    if picture.format == "PNG":
        return picture.text.get("parameters"), picture.text.get("batchsd"), picture.info.get("xmp")
    exif = picture.getexif()
    comment = exif.get_ifd(0x8769).get(0x9286)
    text = comment and comment.removeprefix(b"UNICODE\0").decode("utf-16-be")
    return text, exif.get(0x010E), picture.info.get("xmp")


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_all_three_read_back_and_pixels_stand(format):
    record = drawn(format)
    data = told(record)
    text, row, xmp = read(data)
    assert text.splitlines()[:3] == [*PROMPT.splitlines(), "Negative prompt: blurry"]
    assert text.splitlines()[3].startswith("Steps: 20, Sampler: euler, CFG scale: 5, Seed: 7, Size: 56x40, Model: tiny")
    found = json.loads(row)
    assert found["prompt"] == PROMPT and found["seed"] == 7 and found["status"] == "ok" and "image" not in found
    assert b"digitalsourcetype/trainedAlgorithmicMedia" in xmp
    before, after = (np.asarray(Image.open(io.BytesIO(d)).convert("RGB")) for d in (record.image, data))
    assert np.array_equal(before, after)
    assert told(record) == data


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("left", [0, 1, 2])
def test_each_can_be_switched_off(format, left):
    embed = [name for i, name in enumerate(ALL) if i != left]
    found = read(told(drawn(format), embed))
    assert [part is None or not part for part in found] == [i == left for i in range(3)]
    assert told(drawn(format), ()) == drawn(format).image


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_a_told_picture_gives_the_encoders_bytes_again(format):
    record = drawn(format)
    assert untell(record.image) == record.image
    for embed in [(name,) for name in ALL] + [ALL, ()]:
        assert untell(told(record, embed)) == record.image


def test_pictures_that_hold_another_say_so():
    assert b"/compositeWithTrainedAlgorithmicMedia" in told(drawn("png", task="inpaint"))


def test_what_does_not_fit_a_jpeg_segment_is_left_out():
    record = drawn("jpeg", prompt="x" * 20000)
    text, row, _ = read(told(replace(record, request=replace(record.request, negative_prompt="y" * 20000))))
    assert not text and len(json.loads(row)["prompt"]) == 20000


def test_a_sink_whose_pictures_tell_keeps_its_promises(tmp_path):
    import pyarrow.parquet as pq

    def strip(data):
        """Without its text chunks: what the encoder gave."""
        if data is None:
            return None
        kept, at = data[:8], 8
        while at < len(data):
            end = at + 12 + int.from_bytes(data[at : at + 4], "big")
            kept += b"" if data[at + 4 : at + 8] in (b"tEXt", b"iTXt") else data[at:end]
            at = end
        return kept

    def pictures(folder):
        (file,) = folder.iterdir()
        return [strip(cell and cell["bytes"]) for cell in pq.read_table(file).column("image").to_pylist()]

    check_sink(Told(ParquetSink(), ALL), tmp_path, pictures)


@pytest.mark.skipif(not shutil.which("exiftool"), reason="exiftool is not installed")
@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_exiftool_reads_it(format, tmp_path):
    file = tmp_path / f"a.{format}"
    file.write_bytes(told(drawn(format)))
    out = subprocess.run(["exiftool", "-j", file], capture_output=True, check=True, text=True).stdout
    (found,) = json.loads(out)
    assert found["DigitalSourceType"].endswith("trainedAlgorithmicMedia")
    assert "Warning" not in found and "Error" not in found
    assert "Steps: 20" in found.get("Parameters", found.get("UserComment", ""))


def test_a_kept_picture_says_the_row_as_it_is_now(tmp_path: Path, checkpoint: Path) -> None:
    """An update redraws nothing where only a column changed that no pixel depends on; the file follows its row."""
    from null_model import job_at, rows_of, run_job, write_manifest

    from batchsd.revise import begin_update

    write_manifest(tmp_path / "prompts.parquet", ["a", "b"], note=["old", "same"])
    job, log = job_at(tmp_path, checkpoint), tmp_path / "log"
    run_job(job, log)
    before = rows_of(job)
    write_manifest(tmp_path / "prompts.parquet", ["a", "b"], note=["new", "same"])
    run_job(job, log, begin_update)
    assert sorted(log.read_text().split()) == ["id0", "id1"]  # drawn once
    now = rows_of(job)
    assert [row["note"] for row in now] == ["new", "same"] and now[1] == before[1]
    for was, row in zip(before, now, strict=True):
        opened, first = (Image.open(io.BytesIO(each["image"])) for each in (row, was))
        assert json.loads(opened.text["batchsd"])["note"] == row["note"]
        assert opened.tobytes() == first.tobytes()
