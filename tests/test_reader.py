"""Shards become Requests. The oracle is pyarrow reading the whole file at once."""

import io
import pickle
import threading
import time
from itertools import product
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import batchsd.reader
from batchsd import images
from batchsd.cells import Cells
from batchsd.job import Job, load
from batchsd.manifest import open_manifest
from batchsd.reader import BATCH_BYTES, Reader, scan
from batchsd.rows import Names
from batchsd.types import Shard, UsageError
from batchsd.web import Web

NAMES = Names(("dpmpp_2m", "euler"), {"text": (), "image": ("init_image", "strength")})


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def job(*sets: str) -> Job:
    Path("a.toml").write_text('[input]\nmanifest = "in"\n[model]\npath = "m"\n[output]\nuri = "out"\n')
    Path("in").mkdir(exist_ok=True)
    return load("a.toml", sets, {})


def write(columns: dict, name: str = "a", **options) -> None:
    Path("in").mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), f"in/{name}.parquet", **options)


def reader(asked: Job) -> Reader:
    return Reader(open_manifest(asked), asked, NAMES, hasher=lambda fields: "h")


def shard(file: int, start: int, count: int) -> Shard:
    return Shard(1, 0, 1, file, start, count)


@pytest.mark.parametrize(("group", "rows_per_shard", "batch"), product((7, 1000), (1, 5, 40), (3, 1024)))
def test_every_way_of_cutting_gives_the_same_rows(monkeypatch, group, rows_per_shard, batch):
    monkeypatch.setattr(batchsd.reader, "BATCH_ROWS", batch)
    rows = {"prompt": [f"p{i}" for i in range(40)], "n": list(range(40)), "seed": [None, 5] * 20}
    write(rows, row_group_size=group)
    write({"prompt": ["q"] * 3}, "b")
    asked = job("input.repeat=2")
    it = reader(asked)
    shards = it.manifest.shards(rows_per_shard * 2, 2)
    requests = [(s, list(it.read(s))) for s in shards]
    for s, found in requests:
        assert [r.index for r in found] == list(range(s.count * 2))
        assert [r.repeat_index for r in found] == [0, 1] * s.count
    flat = [r for _, found in requests for r in found]
    assert [r.prompt for r in flat] == [f"p{i}" for i in range(40) for _ in "xx"] + ["q"] * 6
    assert [r.key for r in flat[:3]] == ["a.parquet:0", "a.parquet:0", "a.parquet:1"]
    assert [r.key for r in flat[-2:]] == ["b.parquet:2"] * 2
    assert [r.seed for r in flat[2:4]] == [5, 6]
    whole = pa.table(rows)
    for i, request in enumerate(flat[:80]):
        assert request.columns == whole.slice(i // 2, 1)
    assert flat[-1].columns.to_pylist() == [{"prompt": "q", "n": None, "seed": None}]
    assert flat[-1].columns.schema == it.manifest.schema


def test_neighbours_are_read_on_and_others_are_found_again(monkeypatch):
    write({"prompt": [f"p{i}" for i in range(100)]})
    it = reader(job())
    opened = []
    open_file = Reader._open
    monkeypatch.setattr(Reader, "_open", lambda self, *where: opened.append(where) or open_file(self, *where))
    prompts = [r.prompt for start in (0, 10, 20, 90, 5) for r in it.read(shard(0, start, 10))]
    assert prompts == [f"p{start + i}" for start in (0, 10, 20, 90, 5) for i in range(10)]
    assert opened == [(0, 0), (0, 90), (0, 5)]


def test_two_shards_read_in_turns_do_not_disturb_each_other():
    write({"prompt": [f"p{i}" for i in range(20)]})
    it = reader(job())
    pairs = list(zip(it.read(shard(0, 0, 10)), it.read(shard(0, 10, 10)), strict=True))
    assert [(a.prompt, b.prompt) for a, b in pairs] == [(f"p{i}", f"p{i + 10}") for i in range(10)]


def test_a_reader_travels_to_a_worker():
    write({"prompt": ["a", "b"]})
    asked = job()
    manifest, again = pickle.loads(pickle.dumps((open_manifest(asked), asked)))
    assert [r.prompt for r in Reader(manifest, again, NAMES, lambda fields: "").read(shard(0, 1, 1))] == ["b"]
    assert len(pickle.dumps(shard(0, 1, 1))) < 200


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())], ids=str
)
def test_all_encodings_of_text(kind):
    texts = ["a", None, "", "é"]
    plain = pa.array(texts)
    write(
        {"prompt": plain.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else plain.cast(kind)}
    )
    found = list(reader(job()).read(shard(0, 0, 4)))
    assert [r.prompt for r in found] == texts
    assert [r.error and r.error.status for r in found] == [None, "bad_input", None, None]
    assert [r.columns["prompt"][0].as_py() for r in found] == texts
    assert all(r.columns.schema.field("prompt").type in (pa.string(), pa.large_string()) for r in found)


def test_text_that_is_not_utf8_fails_its_row_and_no_reader_of_the_output():
    raw = pa.array([b"good", b"\xffbad", b"good"])
    broken = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    write({"prompt": broken, "note": broken})
    found = list(reader(job()).read(shard(0, 0, 3)))
    assert [str(r.error) for r in found] == ["None", "prompt: not valid UTF-8 at byte 0", "None"]
    assert found[1].columns.to_pylist() == [{"prompt": "\ufffdbad", "note": "\ufffdbad"}]


def test_values_of_every_number_type_are_taken():
    write(
        {
            "prompt": ["a"] * 3,
            "steps": pa.array([20.0, 2.5, float("nan")]),
            "seed": pa.array([1, 2, 3], pa.uint8()),
            "guidance_scale": pa.array([1, 2, 3], pa.int16()),
            "width": pa.array([64, 65, 72], pa.decimal128(5, 2)),
        }
    )
    found = list(reader(job()).read(shard(0, 0, 3)))
    assert [(r.steps, r.seed, r.guidance_scale, r.width) for r in found[::2]] == [
        (20, 1, 1.0, 64),
        (20, 3, 3.0, 72),
    ]
    assert str(found[1].error) == "steps: 2.5 is not a whole number; width: 65 is not a multiple of 8"
    assert found[1].columns.to_pylist()[0]["steps"] == 2.5


def test_mapped_and_templated_prompts():
    write({"caption": ["a"], "no": ["b"], "color": ["red"], "name": ["k"]})
    (mapped,) = reader(job("input.columns={ prompt = 'caption', negative_prompt = 'no', id = 'name' }")).read(
        shard(0, 0, 1)
    )
    assert (mapped.prompt, mapped.negative_prompt, mapped.key) == ("a", "b", "k")
    (filled,) = reader(job("input.prompt=a {color} {{cube}}")).read(shard(0, 0, 1))
    assert filled.prompt == "a red {cube}"
    assert filled.columns.column_names == ["caption", "no", "color", "name"]


def test_only_the_columns_of_the_rows_task_are_its_inputs():
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pictures = pa.array([{"bytes": b"x", "path": "p"}] * 2, picture)
    write({"prompt": ["a"] * 2, "init_image": pictures, "strength": [0.5, float("nan")]})
    text, _ = reader(job()).read(shard(0, 0, 2))
    assert text.inputs == {} and text.columns.column_names == ["prompt", "strength"]
    first, second = reader(job("conditioning.task=image")).read(shard(0, 0, 2))
    assert first.inputs == {"init_image": b"x", "strength": 0.5}
    assert second.inputs["strength"] is None
    kept, _ = reader(job("output.keep_inputs=true")).read(shard(0, 0, 2))
    assert kept.columns.column_names == ["prompt", "init_image", "strength"]


def test_images_are_read_from_beside_the_manifest():
    whole = str(Path("in/pictures/a.png").absolute())
    write({"prompt": ["a"] * 3, "init_image": ["pictures/a.png", "no.png", whole]})
    Path("in/pictures").mkdir()
    Path("in/pictures/a.png").write_bytes(b"a picture")
    beside, missing, absolute = reader(job("conditioning.task=image")).read(shard(0, 0, 3))
    assert beside.inputs["init_image"] == absolute.inputs["init_image"] == b"a picture"
    assert missing.error.status == "bad_image" and str(missing.error) == "init_image: no.png: no such file"
    assert beside.error is None and beside.columns.column("init_image").to_pylist() == ["pictures/a.png"]


def test_a_small_file_of_long_repeated_values_is_read_in_small_pieces():
    """60 rows of one value of 10 MB, stored once: 600 MB, were they decoded together."""
    write({"prompt": ["a" * 10_000_000] * 60}, compression="zstd", dictionary_pagesize_limit=2**30)
    assert Path("in/a.parquet").stat().st_size < 10_000
    it = reader(job())
    before, held = pa.total_allocated_bytes(), set()
    for request in it.read(shard(0, 0, 60)):
        assert str(request.error) == "prompt: 10,000,000 characters, at most 20,000"
        held.add(pa.total_allocated_bytes() - before)
    assert max(held) < 4 * BATCH_BYTES


def test_a_changed_file_and_a_damaged_page_are_said_in_one_line(here):
    write({"prompt": [f"prompt {i}" for i in range(1000)]}, compression=None, write_page_checksum=True)
    path = Path("in/a.parquet")
    it = reader(job())
    data = bytearray(path.read_bytes())
    write({"prompt": ["other"]})
    with pytest.raises(UsageError) as caught:
        list(it.read(shard(0, 0, 1)))
    assert (
        str(caught.value)
        == f"{here}/in/a.parquet: changed since the plan was made; run again to see what differs"
    )
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UsageError) as caught:
        list(reader(job()).read(shard(0, 0, 1000)))
    assert str(caught.value).startswith(f"{here}/in/a.parquet: rows from 0: ")
    assert "checksum" in str(caught.value) and "\n" not in str(caught.value)


def test_scan_finds_all_bad_rows_and_only_these():
    write({"id": ["x", None, "z"], "prompt": ["a", None, "c"], "steps": [5, 5, 0]})
    write({"prompt": ["a", "b"], "height": [64, 65]}, "b")
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), "in/c.parquet")
    asked = job("input.repeat=2")
    assert list(scan(open_manifest(asked), asked, NAMES)) == [
        ("a.parquet:1", "prompt: null (an empty text is a valid prompt)"),
        ("z", "steps: 0 is outside 1 to 1000"),
        ("b.parquet:1", "height: 65 is not a multiple of 8"),
    ]


def png(colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


def test_images_are_read_ahead_in_order_and_each_fails_alone(monkeypatch):
    threads, lock = set(), threading.Lock()
    read = Cells.read

    def noted(self, cell):
        with lock:
            threads.add(threading.current_thread().name)
        time.sleep(0.01 if cell == "0.png" else 0)  # the first is the slowest
        return read(self, cell)

    monkeypatch.setattr(Cells, "read", noted)
    write({"prompt": [f"p{i}" for i in range(40)], "init_image": [f"{i}.png" for i in range(40)]})
    for i in range(40):
        if i != 7:
            Path(f"in/{i}.png").write_bytes(png() if i != 9 else b"<html>")
    it = reader(job("conditioning.task=image", "input.repeat=2"))
    found = list(it.read(shard(0, 0, 25))) + list(it.read(shard(0, 25, 15)))
    assert [(r.prompt, r.index, r.repeat_index) for r in found] == [
        (f"p{i}", 2 * (i if i < 25 else i - 25) + k, k) for i in range(40) for k in (0, 1)
    ]
    assert {r.key: str(r.error) for r in found if r.error} == {
        "a.parquet:7": "init_image: 7.png: no such file"
    }, "what cannot be decoded fails where it is used"
    assert all(name.startswith("images") for name in threads) and len(threads) > 1
    content = found[0].inputs["init_image"]
    assert content == png() and content.held == len(png()) + 8 * 8 * 3
    assert images.rgb(content) is images.rgb(found[1].inputs["init_image"]), "decoded once for both repeats"
    assert content.held == len(png()), "and let go with the last use"
    assert images.rgb(content).getpixel((0, 0)) == (255, 0, 0)


def test_validate_looks_at_headers():
    truncated = png()[:-30]
    cells = [png(), b"<html>", b"", truncated]
    write({"prompt": ["p"] * 4, "init_image": cells})
    asked = job("conditioning.task=image")
    assert list(scan(open_manifest(asked), asked, NAMES)) == [
        ("a.parquet:1", "init_image: not an image file of PNG, JPEG, WEBP, GIF, BMP, TIFF"),
        ("a.parquet:2", "init_image: an empty file: zero bytes"),
    ]


def test_the_web_is_asked_where_the_job_names_hosts(monkeypatch):
    write({"prompt": ["p"], "init_image": ["https://a.example/p.png"]})
    (refused,) = reader(job("conditioning.task=image")).read(shard(0, 0, 1))
    assert "input.allow_hosts = ['a.example']" in str(refused.error)
    web = Web(("a.example",), resolve=lambda host, port: ["10.0.0.1"])
    monkeypatch.setattr(batchsd.reader, "Web", lambda hosts: web if tuple(hosts) == ("a.example",) else None)
    allowed = job("conditioning.task=image", "input.allow_hosts=['a.example']")
    (inner,) = reader(allowed).read(shard(0, 0, 1))
    assert str(inner.error) == "init_image: https://a.example/p.png: a.example is 10.0.0.1, which is no public address"
    for wrong in ("https://a.example", "a.example/x", "*", "localhost"):
        with pytest.raises(UsageError, match=r"input\.allow_hosts.*should be a host's name"):
            job(f"input.allow_hosts=['{wrong}']")
