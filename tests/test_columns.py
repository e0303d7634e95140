"""What an output row holds. The oracles: the tables written out here, and `datasets` reading them."""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchsd.columns import (
    IMAGE_TYPE,
    MADE,
    RESOLVED,
    output_schema,
    picture_column,
    to_table,
    travelling,
)
from batchsd.job import Job, load
from batchsd.types import Record, Request, RowError, UsageError
from batchsd.values import picture_name

NAME = "train-00042-of-00391"
FACTS = {"model": "tiny", "version": "1.2", "plan": "abc"}


@pytest.fixture
def job(tmp_path: Path):
    def make(*sets: str) -> Job:
        path = tmp_path / "a.toml"
        path.write_text('[input]\nmanifest = "p"\n[model]\npath = "m"\n[output]\nuri = "s3://b/o?token=x"\n')
        return load(path, sets, {})

    return make


def request(columns: pa.Table, **values) -> Request:
    defaults = {
        "key": "k", "index": 17, "repeat_index": 0, "prompt": "a", "negative_prompt": None, "seed": 2**32 - 1,
        "steps": 20, "guidance_scale": 5.0, "height": None, "width": None, "scheduler": "euler",
        "task": "text",
        "inputs": {}, "columns": columns, "row_hash": "ff",
    }  # fmt: skip
    return Request(**defaults | values)


def test_the_manifests_columns_come_first_then_what_was_used_then_what_was_made(job):
    manifest = pa.schema([("seed", pa.float64()), ("note", pa.large_string()), ("prompt", pa.large_string())])
    schema = output_schema(manifest, job(), FACTS)
    assert [(f.name, f.type) for f in schema] == [
        ("seed", pa.int64()), ("note", pa.large_string()), ("prompt", pa.string()),
        ("negative_prompt", pa.string()), ("steps", pa.int32()), ("guidance_scale", pa.float64()),
        ("height", pa.int32()), ("width", pa.int32()), ("scheduler", pa.string()), ("task", pa.string()),
        ("repeat_index", pa.int32()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("status", pa.string()), ("error", pa.string()), ("tokens_cut", pa.int32()), ("row_hash", pa.string()),
        ("model", pa.string()), ("batchsd", pa.string()), ("mean", pa.float64()),
        ("deviation", pa.float64()), ("dhash", pa.string()),
    ]  # fmt: skip
    assert all(field.nullable for field in schema)


def test_the_metadata_shows_pictures_and_holds_the_job_without_secrets(job):
    schema = output_schema(pa.schema([("prompt", pa.string())]), job("output.columns.image=picture"), FACTS)
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert features == {"picture": {"_type": "Image"}}
    ours = json.loads(schema.metadata[b"batchsd"])
    assert ours["plan"] == "abc" and len(ours["job_hash"]) == 32
    assert ours["job"]["output"]["uri"] == "s3://b/o?<redacted>"
    assert ours["job"]["sampler"]["steps"] == 20


@pytest.mark.parametrize(
    ("manifest", "sets", "expected"),
    [
        (["prompt", "x"], ("output.columns={ prompt = 'text' }",), ["text", "x"]),
        (["caption"], ("input.columns.prompt=caption",), ["caption", "prompt"]),
        (["text"], ("input.columns.prompt=text", "output.columns.prompt=text"), ["text", "negative_prompt"]),
        (["caption", "prompt"], ("input.columns.prompt=caption", "output.columns.prompt=used"),
         ["caption", "prompt", "used"]),
        (["uuid", "prompt"], ("input.columns.id=uuid", "output.columns.id=key"), ["key", "prompt"]),
        (["x", "prompt"], ("output.columns.x=y",), ["y", "prompt"]),
        (["status", "prompt"], ("output.columns.status=fate",), ["status", "prompt"]),
    ],
)  # fmt: skip
def test_renames(job, manifest, sets, expected):
    schema = output_schema(pa.schema([(name, pa.string()) for name in manifest]), job(*sets), FACTS)
    assert schema.names[: len(expected)] == expected
    assert len(set(schema.names)) == len(schema.names)


def test_an_estimated_map_is_a_column_where_the_job_keeps_it(job):
    manifest = pa.schema([("prompt", pa.string())])
    assert "estimated_depth" not in output_schema(manifest, job(), FACTS).names
    schema = output_schema(manifest, job("conditioning.keep_depth=true"), FACTS)
    assert picture_column(schema) == "image" and schema.field("estimated_depth").type == IMAGE_TYPE
    asked = request(pa.table({"prompt": ["a"]}))
    rows = [Record(asked, "ok", image=b"png", made={"estimated_depth": b"map"}), Record(asked, "ok", image=b"png")]
    found = to_table(rows, schema, NAME)["estimated_depth"].to_pylist()
    assert found == [{"bytes": b"map", "path": "00042-000017.estimated_depth.png"}, None]


@pytest.mark.parametrize(
    ("manifest", "sets", "message"),
    [
        (["prompt", "image"], (), "input.manifest: the manifest's column 'image' bears the name of an output "
         'column - rename ours: output.columns = { image = "image_out" }'),
        (["caption", "prompt"], ("input.columns.prompt=caption",),
         "input.manifest: the manifest's column 'prompt' bears the name of an output column - "
         'rename ours: output.columns = { prompt = "prompt_out" }'),
        (["prompt"], ("output.scores=['mean']",),
         "output.scores: the score 'mean' bears the name of an output column - "
         'rename ours: output.columns = { mean = "mean_out" }'),
        (["prompt", "text"], ("output.columns.prompt=text",),
         "output.columns: two output columns would be called 'text'; choose another name"),
        (["prompt"], ("output.columns={ image = 'a', prompt = 'a' }",),
         "output.columns: two output columns would be called 'a'; choose another name"),
        (["prompt"], ("output.columns={ promt = 'a' }",),
         "output.columns: no column 'promt' - did you mean 'prompt'?"),
    ],
)  # fmt: skip
def test_names_that_clash_are_refused(job, manifest, sets, message):
    with pytest.raises(UsageError) as caught:
        output_schema(pa.schema([(name, pa.string()) for name in manifest]), job(*sets), FACTS)
    assert str(caught.value).endswith(message)


def test_condition_images_stay_behind_unless_kept_and_paths_travel(job):
    manifest = pa.schema([
        ("prompt", pa.string()), ("init_image", IMAGE_TYPE), ("mask", pa.string()),
        ("depth", pa.large_binary()), ("photo", pa.binary()), ("other", pa.binary()),
    ])  # fmt: skip
    mapped = job("input.columns.control_image=photo")
    assert travelling(manifest, mapped) == ["prompt", "mask", "other"]
    kept = output_schema(manifest, job("output.keep_inputs=true"), FACTS)
    assert kept.names[:6] == manifest.names
    assert set(json.loads(kept.metadata[b"huggingface"])["info"]["features"]) == {"init_image", "image"}


def test_an_input_called_image_that_stays_behind_does_not_clash(job):
    manifest = pa.schema([("prompt", pa.string()), ("image", IMAGE_TYPE)])
    assert output_schema(manifest, job("input.columns.init_image=image"), FACTS).names.count("image") == 1


def test_rows_hold_what_was_used_and_failed_rows_no_picture(job):
    manifest = pa.schema([("note", pa.list_(pa.int64())), ("prompt", pa.string()), ("steps", pa.float64())])
    rows = pa.table({"note": [[1], None], "prompt": ["given", None], "steps": [7.0, 2.5]}, schema=manifest)
    schema = output_schema(manifest, job("output.columns.prompt=text"), FACTS)
    figures = {"mean": 0.5, "dhash": "0f" * 8}
    used = request(rows.slice(0, 1), prompt="used", steps=7)
    good = Record(used, "ok", None, b"png", "png", 64, 96, figures=figures, tokens_cut=3)
    error = RowError("bad_input", "both")
    bad = request(
        rows.slice(1, 1), index=18, prompt=None, steps=None, seed=None, row_hash="", error=error, height=72
    )
    table = to_table([good, Record(bad, "bad_input", "both \udcff")], schema, NAME)
    common = {
        "negative_prompt": None, "guidance_scale": 5.0, "scheduler": "euler", "task": "text",
        "repeat_index": 0,
        "model": "tiny", "batchsd": "1.2",
    }  # fmt: skip
    assert table.schema.equals(schema, check_metadata=True)
    assert table.to_pylist() == [
        {**common, "note": [1], "text": "used", "steps": 7, "seed": 2**32 - 1, "height": 64, "width": 96,
         "image": {"bytes": b"png", "path": "00042-000017.png"}, "status": "ok", "error": None,
         "tokens_cut": 3, "row_hash": "ff", "mean": 0.5, "deviation": None, "dhash": "0f" * 8},
        {**common, "note": None, "text": None, "steps": None, "seed": None, "height": 72, "width": None,
         "image": None, "status": "bad_input", "error": "both ?", "tokens_cut": None, "row_hash": None,
         "mean": None, "deviation": None, "dhash": None},
    ]  # fmt: skip


@given(st.integers(0, 99_999), st.integers(1, 9_999), st.integers(0, 10**7))
def test_picture_names_are_safe_and_differ(index, plan, row):
    shard = f"train-{index:05d}-of-99999" + (f"-p{plan:04d}" if plan > 1 else "")
    name = picture_name(shard, row, "webp")
    assert name == f"{index:05d}-" + (f"p{plan:04d}-" if plan > 1 else "") + f"{row:06d}.webp"
    assert name.count(".") == 1 and "/" not in name


def test_datasets_shows_the_pictures(job, tmp_path):
    from datasets import load_dataset
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (8, 16), "red").save(buffer, "PNG")
    manifest = pa.schema([("prompt", pa.string()), ("tags", pa.list_(pa.string()))])
    rows = pa.table({"prompt": ["a", "b"], "tags": [["x"], None]}, schema=manifest)
    schema = output_schema(manifest, job("output.columns.image=picture"), FACTS)
    records = [
        Record(request(rows.slice(0, 1)), "ok", None, buffer.getvalue()),
        Record(request(rows.slice(1, 1), index=18), "oom", "too large"),
    ]
    pq.write_table(to_table(records, schema, NAME), tmp_path / "train-00000-of-00001.parquet")
    first, second = load_dataset(
        "parquet", data_files=str(tmp_path / "*.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert first["picture"].size == (8, 16) and first["picture"].getpixel((0, 0)) == (255, 0, 0)
    assert second["picture"] is None and second["status"] == "oom"
    assert set(first) == {*manifest.names, *RESOLVED, *MADE, "picture"} - {"image"}
