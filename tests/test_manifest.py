"""Footers, schema, mapping, shards. The oracles: pyarrow, hashlib, and the messages' text."""

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchsd.find import Disk
from batchsd.job import Job, load
from batchsd.manifest import InputFile, Manifest, open_manifest
from batchsd.object_store import ObjectStore
from batchsd.rows import Names
from batchsd.scratch import Scratch
from batchsd.types import UsageError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def job(manifest: str = "p.parquet", *sets: str) -> Job:
    Path("a.toml").write_text(
        f'[input]\nmanifest = "{manifest}"\n[model]\npath = "tiny-scenes"\n[output]\nuri = "out"\n'
    )
    return load("a.toml", sets, {})


def write(name: str, columns: dict, **options) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def refusal(asked: Job) -> str:
    with pytest.raises(UsageError) as caught:
        open_manifest(asked)
    return str(caught.value)


def test_a_file_is_known_by_its_footer_and_hash():
    path = write("p.parquet", {"prompt": ["a"] * 25, "n": range(25)}, row_group_size=10)
    manifest = open_manifest(job())
    (file,) = manifest.files
    assert (file.name, file.row_groups, file.rows) == ("p.parquet", (10, 10, 5), 25)
    assert (file.size, file.mtime_ns) == (path.stat().st_size, path.stat().st_mtime_ns)
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert manifest.schema == pa.schema([("prompt", pa.string()), ("n", pa.int64())])


def test_known_files_are_not_hashed_again():
    write("p.parquet", {"prompt": ["a"]})
    (file,) = open_manifest(job()).files
    known = {(file.name, file.size, file.mtime_ns): "known"}
    assert open_manifest(job(), known).files[0].sha256 == "known"
    os.utime("p.parquet", ns=(0, 0))
    assert open_manifest(job(), known).files[0].sha256 == file.sha256


@pytest.mark.parametrize(
    ("pattern", "names"),
    {
        "in": ["a.parquet", "b.parquet", "sub/a.parquet"],
        "in/*.parquet": ["a.parquet", "b.parquet"],
        "in/**/*.parquet": ["a.parquet", "b.parquet", "sub/a.parquet"],
        "in/**/a.parquet": ["a.parquet", "sub/a.parquet"],
        "in/[!a].parquet": ["b.parquet"],
        "in/?.parquet": ["a.parquet", "b.parquet"],
        "in/s*/*.parquet": ["sub/a.parquet"],
        "in/b.parquet": ["b.parquet"],
        "in/[1].parquet": ["[1].parquet"],
    }.items(),
)
def test_files_folders_and_globs(here, pattern, names):
    for name in ("b", "a", "sub/a", "_hidden", ".hidden", "__batchsd/x"):
        write(f"in/{name}.parquet", {"prompt": ["a"]})
    Path("in/readme.txt").write_text("no manifest")
    if pattern == "in/[1].parquet":
        write("in/[1].parquet", {"prompt": ["a"]})
    assert [file.name for file in open_manifest(job(pattern)).files] == names
    if "?" not in pattern:  # in a URI it begins the query
        assert [file.name for file in open_manifest(job(f"file://{here}/{pattern}")).files] == names


def test_rows_of_equal_file_names_keep_different_keys():
    write("in/x/a.parquet", {"prompt": ["a"]})
    write("in/y/a.parquet", {"prompt": ["a"]})
    assert [f.name for f in open_manifest(job("in/*/a.parquet")).files] == ["x/a.parquet", "y/a.parquet"]


def test_columns_missing_in_some_files_are_null_and_encodings_are_one_type():
    write("in/a.parquet", {"prompt": pa.array(["a"], pa.large_string()), "n": pa.nulls(1), "d": ["x"]})
    write("in/b.parquet", {"extra": [1.5], "prompt": pa.array(["a"]).dictionary_encode(), "n": [1]})
    write(
        "in/c.parquet", {"prompt": pa.array(["a"], pa.string_view()), "d": pa.array(["x"], pa.string_view())}
    )
    assert open_manifest(job("in")).schema == pa.schema(
        [("prompt", pa.string()), ("n", pa.int64()), ("d", pa.string()), ("extra", pa.float64())]
    )


def test_what_cannot_be_a_manifest(here):
    whole = write("whole.parquet", {"prompt": ["a"] * 100}).read_bytes()
    Path("cut.parquet").write_bytes(whole[:-20])
    Path("text.parquet").write_text("prompt\na red sphere\n")
    Path("zero.parquet").write_bytes(b"")
    Path("folder").mkdir()
    write("empty.parquet", {"prompt": pa.array([], pa.string())})
    for name, said in {
        "none.parquet": "no such file or folder",
        "*.csv": "no file matches",
        "folder": "no .parquet file in this folder",
        "zero.parquet": "not a readable Parquet file: Parquet file size is 0 bytes",
    }.items():
        assert refusal(job(name)) == f"a.toml:2: input.manifest: {here}/{name}: {said}"
    for name in ("cut.parquet", "text.parquet"):
        said = refusal(job(name))
        assert said.startswith(
            f"a.toml:2: input.manifest: {here}/{name}: not a readable Parquet file: Parquet magic"
        )
        assert "\n" not in said
    Path("a$b.csv").write_text("prompt\n")
    assert "to make one" not in refusal(job("a$b.csv"))
    for name, text in {"a.csv": "prompt\na red sphere\n", "b.jsonl": '{"prompt": "a red sphere"}\n'}.items():
        Path(name).write_text(text)
        advice = refusal(job(name)).rpartition("to make one: ")[2]
        subprocess.run(["sh", "-c", advice.replace("python", sys.executable, 1)], check=True)
        assert open_manifest(job(name.partition(".")[0] + ".parquet")).rows == 1
    assert refusal(job("empty.parquet")) == (
        "a.toml:2: input.manifest: the manifest is empty (empty.parquet, no rows)"
    )
    assert refusal(job("ftp://host/x.parquet")).startswith(
        "a.toml:2: input.manifest: ftp://host/x.parquet: not a place that can be opened: "
    )


REFUSED = {
    "no prompt": (
        {"id": [1], "caption": ["a"]}, (),
        "a.toml:2: input.manifest: no column 'prompt' (it has: id, caption) - name yours with "
        'input.columns = { prompt = "..." }, or build one with input.prompt = "a {...}"',
    ),
    "unknown mapping": (
        {"caption": ["a"], "id": [1]}, ("input.columns.prompt=captoin",),
        "--set input.columns.prompt: the manifest has no column 'captoin' "
        "- did you mean 'caption'?",
    ),
    "mapping like nothing": (
        {"caption": ["a"], "id": [1]}, ("input.columns={ prompt = 'zzz' }",),
        "--set input.columns: input.columns.prompt: the manifest has no column 'zzz'; "
        "it has: caption, id",
    ),
    "unknown in template": (
        {"color": ["red"]}, ("input.prompt=a {colour} {shape}",),
        "--set input.prompt: the template names {colour}, but the manifest has no such column "
        "- did you mean 'color'?",
    ),
    "attribute in template": (
        {"color": ["red"]}, ("input.prompt=a {color!r}",),
        "--set input.prompt: {color} needs a plain column name, as {color} "
        "(write {{ and }} for braces)",
    ),
    "open brace": (
        {"color": ["red"]}, ("input.prompt=a {color",),
        "--set input.prompt: expected '}' before end of string (write {{ and }} for braces)",
    ),
    "bytes in template": (
        {"color": [b"red"]}, ("input.prompt=a {color}",),
        "--set input.prompt: column 'color' is binary, which is no text",
    ),
    "template and mapping": (
        {"color": ["red"]}, ("input.prompt={color}", "input.columns.prompt=color"),
        "--set input.prompt and input.columns.prompt both say where prompts come from; "
        "keep one",
    ),
    "number for text": (
        {"prompt": [1]}, (),
        "a.toml:2: input.manifest: column 'prompt' is int64, but prompt must be text; "
        "write it so, or give the column another name",
    ),
    "text for a number": (
        {"prompt": ["a"], "n": ["20"]}, ("input.columns.steps=n",),
        "a.toml:2: input.manifest: column 'n' is string, but steps must be a number; "
        "write it so, or give the column another name",
    ),
    "a LoRA a row": (
        {"prompt": ["a"], "lora": ["style.safetensors"]}, (),
        "a.toml:2: input.manifest: column 'lora': LoRAs are merged when the model loads, one set for a whole run "
        "(model.loras), not row by row; make a run for each set, or give the column another name",
    ),
    "output's own name": (
        {"prompt": ["a"], "status": ["x"]}, (),
        "a.toml:2: input.manifest: the manifest's column 'status' bears the name of an output column - "
        'rename ours: output.columns = { status = "status_out" }',
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_manifest_that_does_not_fit_the_job_is_refused(name):
    columns, sets, message = REFUSED[name]
    write("p.parquet", columns)
    assert refusal(job("p.parquet", *sets)) == message


@pytest.mark.parametrize("name", ["image", "status", "error", "row_hash", "model", "batchsd", "repeat_index"])
def test_every_output_only_name_is_refused_until_ours_is_renamed(name):
    write("p.parquet", {"prompt": ["a"], name: ["x"]})
    assert f'output.columns = {{ {name} = "{name}_out" }}' in refusal(job())
    assert open_manifest(job("p.parquet", f"output.columns.{name}={name}_out")).rows == 1


def test_a_mapping_of_a_column_that_no_task_reads_is_refused():
    write("p.parquet", {"prompt": ["a"], "no": ["b"], "edges": ["c"]})
    names = Names((), {"text": (), "canny": ("edge_image",)})
    assert open_manifest(job("p.parquet", "input.columns.edge_image=edges"), names=names).rows == 1
    with pytest.raises(UsageError) as caught:
        open_manifest(job("p.parquet", "input.columns.negative_promt=no"), names=names)
    assert str(caught.value) == (
        "--set input.columns.negative_promt: unknown column "
        "- did you mean 'negative_prompt'?"
    )


def test_conflicting_types_name_both_files_and_types(here):
    write("in/a.parquet", {"prompt": ["a"], "steps": pa.nulls(1)})
    write("in/b.parquet", {"prompt": ["a"], "steps": [1]})
    write("in/c.parquet", {"prompt": ["a"], "steps": ["1"]})
    assert refusal(job("in")) == (
        "a.toml:2: input.manifest: column 'steps' is int64 in b.parquet but string in c.parquet; "
        "write both with one type"
    )


def test_kilobytes_that_ask_for_gigabytes_are_refused(here, monkeypatch):
    monkeypatch.setattr("batchsd.manifest.BOMB_BYTES", 2**20)
    write("p.parquet", {"prompt": ["a" * 1_000_000] * 4}, compression="zstd", use_dictionary=False)
    assert Path("p.parquet").stat().st_size < 10_000
    said = refusal(job())
    assert said.startswith(f"a.toml:2: input.manifest: {here}/p.parquet: column 'prompt' packs 4,000,")
    assert said.endswith(" a row; refused, as it could fill the memory")


def test_two_columns_of_one_name_are_refused():
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"]), "p.parquet")
    assert refusal(job()) == (
        "a.toml:2: input.manifest: p.parquet: two columns are called 'prompt'; rename one"
    )


# --- shards --------------------------------------------------------------------------------------------


def manifest_of(rows: list[int]) -> Manifest:
    files = tuple(InputFile(f"{i}.parquet", "", 1, 1, "", (n,) if n else (), 0, n) for i, n in enumerate(rows))
    return Manifest(Disk(""), files, pa.schema([("prompt", pa.string())]))


@given(st.lists(st.integers(0, 30), max_size=6), st.integers(1, 12), st.integers(1, 5))
def test_shards_cover_every_row_once_in_order_and_none_is_empty(rows, rows_per_shard, repeat):
    shards = manifest_of(rows).shards(rows_per_shard, repeat, plan=2)
    covered = [(s.file, row) for s in shards for row in range(s.start, s.start + s.count)]
    assert covered == [(file, row) for file, n in enumerate(rows) for row in range(n)]
    assert all(1 <= s.count <= max(1, rows_per_shard // repeat) for s in shards)
    assert [s.index for s in shards] == list(range(len(shards)))
    assert {(s.plan, s.total) for s in shards} <= {(2, len(shards))}


def test_more_shards_than_five_digits_can_name_are_refused():
    assert len(manifest_of([99_999]).shards(1, 1)) == 99_999
    for rows, asked, repeat in (([100_000], 1, 1), ([500_000, 3, 7], 10, 4)):
        with pytest.raises(UsageError) as caught:
            manifest_of(rows).shards(asked, repeat)
        made = sum(math.ceil(n / max(1, asked // repeat)) for n in rows)
        message = str(caught.value)
        assert message.startswith(
            f"output.rows_per_shard = {asked} makes {made:,} shards, at most 99,999: use "
        )
        advised = int(message.split()[-3].replace(",", ""))
        assert len(manifest_of(rows).shards(advised, repeat)) <= 99_999


# --- a list of manifests ---------------------------------------------------------------------------------


def listed(*manifests: str) -> Job:
    return job("p.parquet", f"input.manifest={json.dumps(manifests)}")


def test_a_list_is_taken_in_its_own_order_and_its_globs_in_theirs():
    for name in ("z.parquet", "in/b.parquet", "in/a.parquet", "m.parquet"):
        write(name, {"prompt": [name]})
    manifest = open_manifest(listed("z.parquet", "in/*.parquet", "m.parquet"))
    assert [file.name for file in manifest.files] == ["z.parquet", "a.parquet", "b.parquet", "m.parquet"]
    assert manifest.rows == 4


def test_files_of_one_name_are_told_apart_and_keep_their_names_when_the_list_grows():
    days = [f"{day}/prompts.parquet" for day in ("01", "02", "x/02")]
    for name in days:
        write(name, {"prompt": [name]})
    names = [[file.name for file in open_manifest(listed(*days[:n])).files] for n in (1, 2, 3)]
    assert names[2] == ["prompts.parquet", "02/prompts.parquet", "x/02/prompts.parquet"]
    assert names[0] == names[2][:1] and names[1] == names[2][:2]


def test_each_wrong_place_of_a_list_is_a_line(here: Path):
    write("a.parquet", {"prompt": ["a"]})
    wrong = "--set input.manifest: "
    assert refusal(listed("a.parquet", "no.parquet", "b/*.parquet", "*.parquet")).splitlines() == [
        f"{wrong}{here}/no.parquet: no such file or folder",
        f"{wrong}{here}/b/*.parquet: no file matches",
        f"{wrong}{here}/*.parquet: {here}/a.parquet is in the list twice",
    ]
    write("b.parquet", {"prompt": [1]})
    assert "column 'prompt' is string in a.parquet but int64 in b.parquet" in refusal(listed("a.parquet", "b.parquet"))


@pytest.mark.parametrize(
    ("value", "said"),
    [("[]", "[] should be text or a list that is not empty"), ("['']", '[""] should be text'), ("[1]", "[1] should")],
)
def test_a_list_of_no_places_is_no_job(value: str, said: str):
    with pytest.raises(UsageError) as caught:
        job("p.parquet", f"input.manifest={value}")
    assert str(caught.value).startswith(f"--set input.manifest = {said}")


def test_stores_are_not_mixed_in_one_list(bucket: str):
    path = write("a.parquet", {"prompt": ["a"]})
    ObjectStore(f"s3://{bucket}/in", Scratch(Path("s"))).put("b.parquet", path.read_bytes())
    assert "another store" in refusal(listed("a.parquet", f"s3://{bucket}/in/*.parquet"))
