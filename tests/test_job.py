"""Job files: layers, places of errors, paths. The oracles: the text of each message, and tomllib."""

import json
import pickle
import subprocess
import sys
import tomllib
from datetime import date
from importlib import import_module
from pathlib import Path

import pytest
from smallest_job import SMALLEST, job

from batchsd.job import check_names, json_schema, load, model_path, pixel_settings
from batchsd.types import UsageError


def test_date_is_the_day_of_the_run_in_manifest_and_uri_alone(here):
    text = SMALLEST.replace("prompts.parquet", "{date}/p.parquet").replace("out/run1", "out/{date}")
    Path("jobs/a.toml").write_text(text + '[sampler]\nscheduler = "{date}"\n')
    dated = load("jobs/a.toml", (), {}, date(2026, 2, 3))
    assert dated.input.manifest == str(here / "jobs/2026-02-03/p.parquet")
    assert dated.output.uri == str(here / "jobs/out/2026-02-03")
    assert dated.sampler.scheduler == "{date}"
    several = 'input.manifest=["{date}/p.parquet", "s3://b/{date}/*.parquet"]'
    listed = load("jobs/a.toml", (several,), {}, date(2026, 2, 3))
    assert listed.input.manifest == (str(here / "2026-02-03/p.parquet"), "s3://b/2026-02-03/*.parquet")
    assert load("jobs/a.toml", ("output.uri=s3://b/{date}/x",), {}, date(2026, 2, 3)).output.uri == "s3://b/2026-02-03/x"
    assert load("jobs/a.toml", (), {}).output.uri.endswith(f"out/{date.today().isoformat()}")


def test_the_example_job_of_the_readme_has_every_key(here):
    """Every documented key, with a value other than its default, arrives."""
    text = """\
[input]
manifest = "p.parquet"
columns = { prompt = "caption" }
prompt = "a {color} {shape}"
repeat = 2
allow_hosts = ["images.example.org"]
[model]
path = "./model"
vae = "vae.safetensors"
loras = ["a.safetensors"]
embeddings = ["b.pt"]
clip_skip = 1
tokenizer = "tok"
ema = true
dtype = "float32"
device = "cpu"
backend = "compile"
[sampler]
scheduler = "euler"
steps = 7
guidance_scale = 1
height = 72
width = 80
spacing = "leading"
sigmas = "karras"
eta = 1
guidance_rescale = 0.5
guidance_interval = [0, 10.5]
final_sigma = "zero"
[conditioning]
task = "image"
strength = 0.5
image_guidance_scale = 2.0
resize = "pad"
paste_back = true
prompt_syntax = "a1111"
long_prompts = "chunk"
depth_convention = "stability"
keep_depth = true
[output]
uri = "s3://bucket/run"
sink = "folder"
rows_per_shard = 5
image = { format = "jpg", quality = 90 }
columns = { image = "picture" }
failed = "aside"
embed = ["row"]
keep_inputs = true
scores = ["clip_score"]
filters = ["clip_score > 0.25"]
rejected = "keep"
[run]
seed = 3
batch_size = 4
max_failed = 2
strict = true
deterministic = true
deadline = "05:00"
grace = 1.5
scratch = "tmp"
timeout = 9.5
[ray]
address = "local"
workers = 2
gpus_per_worker = 0.5
wait = 30.0
allow_unauthenticated = true
[plugin.mine]
threshold = 0.5
"""
    Path("jobs/all.toml").write_text('plugins = ["./mine.py", "named"]\n' + text)
    loaded = load("jobs/all.toml", [], {}).resolved()
    folder = str(here / "jobs")
    expected = tomllib.loads(text)
    expected["input"]["manifest"] = f"{folder}/p.parquet"
    expected["model"] |= {
        "path": f"{folder}/model", "vae": f"{folder}/vae.safetensors", "loras": [f"{folder}/a.safetensors"],
        "embeddings": [f"{folder}/b.pt"], "tokenizer": f"{folder}/tok",
    }  # fmt: skip
    expected["output"]["image"] = {"format": "jpeg", "quality": 90, "compress_level": None}
    expected["run"]["scratch"] = f"{folder}/tmp"
    assert loaded == {"plugins": [f"{folder}/mine.py", "named"], **expected}
    defaults = job().resolved()
    assert defaults.pop("plugin") == {} and expected.pop("plugin") == {"mine": {"threshold": 0.5}}
    assert {s: set(keys) for s, keys in defaults.items() if s != "plugins"} == {
        section: set(keys) for section, keys in expected.items()
    }


def test_a_model_is_a_shipped_name_a_path_or_a_hub_name(here):
    (here / "org/folder").mkdir(parents=True)
    assert job().model.path == "tiny-scenes"
    assert job(sets=("model.path=org/name",)).model.path == "org/name"
    assert job(sets=("model.path=org/folder",)).model.path == str(here / "org/folder")
    assert model_path(job(sets=("model.path=org/folder",))) == here / "org/folder"
    said = r"--set model.path: 'tiny' does not ship with batchsd; .*a slash: ./tiny"
    with pytest.raises(UsageError, match=said):
        model_path(job(sets=("model.path=tiny",)))
    with pytest.raises(
        UsageError, match=f"^--set model.path: no file or folder {here}/none/x/y$"
    ):
        model_path(job(sets=("model.path=none/x/y",)))


def test_a_hub_name_comes_from_the_local_cache_only(here, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(here / "hub"))
    asked = job(sets=("model.path=org/name",))
    said = "org/name is no path and not in the local hub cache; `hf download org/name` fetches it"
    with pytest.raises(UsageError, match=f"^--set model.path: {said}$"):
        model_path(asked)
    (here / "hub/models--org--name/snapshots/abc").mkdir(parents=True)
    assert model_path(asked) == here / "hub/models--org--name/snapshots/abc"


def test_unknown_names_are_refused_at_their_line(here):
    asked = job('[sampler]\nscheduler = "dpm"\n')
    with pytest.raises(UsageError) as caught:
        check_names(asked, "sampler.scheduler", ["euler", "ddim"])
    assert str(caught.value) == "jobs/a.toml:8: sampler.scheduler: 'dpm' is unknown; have ddim, euler"
    check_names(asked, "conditioning.task", ["text"])


def test_a_job_is_frozen_travels_and_keeps_its_hash(here):
    one = job("[sampler]\nsteps = 30\n")
    with pytest.raises(ValueError, match="frozen"):
        one.sampler.steps = 3
    copy = pickle.loads(pickle.dumps(one))
    assert copy == one and copy.hash() == one.hash()
    assert copy.where("sampler.steps") == "jobs/a.toml:8: sampler.steps"
    renamed = job(sets=("output.columns.image=x",))
    assert renamed.where("output.columns") == "--set output.columns.image: output.columns"
    assert one.where("sampler.width") == "jobs/a.toml:7: sampler.width"
    assert one.hash() != job().hash() and len(one.hash()) == 32
    assert json.loads(json.dumps(one.resolved())) == one.resolved()
    tokens = [job(sets=(f"output.uri=s3://b/k?token={t}",)).hash() for t in "ab"]
    assert tokens[0] == tokens[1] != one.hash()


def test_pixel_settings_change_with_every_setting_that_changes_pixels_and_no_other(here):
    before = pixel_settings(job())
    for hard in ("sampler.eta=0.5", "sampler.spacing=leading", "conditioning.prompt_syntax=a1111",
                 "run.seed=1",
                 "model.clip_skip=1", "input.prompt=a", "output.image.compress_level=2"):  # fmt: skip
        assert pixel_settings(job(sets=(hard,))) != before, hard
    for soft in ("run.batch_size=2", "ray.workers=2", "output.uri=x", "model.path=./m", "run.max_failed=3"):
        assert pixel_settings(job(sets=(soft,))) == before, soft


def test_the_job_and_the_samplers_know_the_same_words():
    curves, levels = import_module("batchsd.diffusion.curves"), import_module("batchsd.diffusion.levels")
    sampler = json_schema()["$defs"]["Sampler"]["properties"]
    assert set(sampler["sigmas"]["enum"]) == {"", "model", *curves.CURVES}
    assert set(sampler["spacing"]["enum"]) == {"", *levels.SPACINGS}


def test_the_schema_is_json_and_knows_ranges():
    schema = json.loads(json.dumps(json_schema()))
    assert schema["$defs"]["Sampler"]["properties"]["steps"] | {"title": ""} == {
        "default": 20, "minimum": 1, "maximum": 1000, "type": "integer", "title": "",
    }  # fmt: skip
    assert set(schema["required"]) == {"input", "model", "output"}


def test_nothing_heavy_is_imported():
    code = "import batchsd.job, batchsd.manifest, batchsd.reader, batchsd.columns, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "ray", "transformers", "pandas"}.isdisjoint(done.stdout.split())
