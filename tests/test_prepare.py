from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchsd.job import Job, load
from batchsd.manifest import MAX_SHARDS
from batchsd.prepare import auto_rows, prepare
from batchsd.revise import replace_uri
from batchsd.types import Shard, UsageError


def write_job(folder: Path, checkpoint: Path, rows: int = 20, *sets: str) -> Job:
    prompts = {"prompt": [f"a red cube {i}" for i in range(rows)], "steps": [4] * rows}
    pq.write_table(pa.table(prompts), folder / "prompts.parquet")
    text = f'[input]\nmanifest = "prompts.parquet"\n[model]\npath = "{checkpoint}/"\n[output]\nuri = "out"\n'
    (folder / "job.toml").write_text(text)
    return load(folder / "job.toml", ["model.device=cpu", *sets], {})


@pytest.mark.parametrize(("rows", "repeat", "files", "workers"), [(48, 1, 1, 2), (5, 1, 1, 1), (30, 4, 2, 8)])
def test_small_jobs_keep_every_worker_busy(rows: int, repeat: int, files: int, workers: int) -> None:
    a_shard = auto_rows(rows, repeat, files, workers)
    shards = -(-rows * repeat // a_shard)
    assert a_shard % repeat == 0
    assert shards >= min(rows, 2 * workers)


@pytest.mark.parametrize(("rows", "files"), [(10**7, 1), (10**9, 1), (10**9, 50_000), (10**8, 99_000)])
def test_large_jobs_stay_within_five_digits(rows: int, files: int) -> None:
    a_shard = auto_rows(rows, 3, files, 64)
    sizes = [rows // files + (i < rows % files) for i in range(files)]
    assert sum(-(-size // (a_shard // 3)) for size in sizes) <= MAX_SHARDS


def test_a_limit_takes_the_first_rows_as_a_plan_of_their_own(tmp_path: Path, checkpoint: Path) -> None:
    job = write_job(tmp_path, checkpoint, 30, "output.rows_per_shard=10")

    def cut(limit: int | None) -> list[Shard]:
        (prepared,) = prepare(job, 1, False, limit)
        return prepared.shards

    assert cut(14) == [Shard(1, 0, 2, 0, 0, 10), Shard(1, 1, 2, 0, 10, 4)]
    assert cut(10) == [Shard(1, 0, 1, 0, 0, 10)]
    assert cut(1000) == cut(None) == [Shard(1, i, 3, 0, i * 10, 10) for i in range(3)]


def test_the_plan_depends_on_pixels_not_on_where_or_how_it_runs(tmp_path: Path, checkpoint: Path) -> None:
    def plan_hash(*sets: str, workers: int = 1) -> str:
        job = write_job(tmp_path, checkpoint, 20, "output.rows_per_shard=5", *sets)
        return prepare(job, workers, gpu=False)[0].plan.hash

    same = plan_hash()
    assert plan_hash("run.batch_size=4", "ray.workers=2", "run.max_failed=3", workers=2) == same
    (tmp_path / "elsewhere").symlink_to(checkpoint)
    assert plan_hash(f"model.path={tmp_path}/elsewhere") == same
    changed = ["sampler.eta=0.5", "run.seed=1", "model.dtype=bfloat16", "input.repeat=2", "sampler.steps=9"]
    assert len({same, *(plan_hash(setting) for setting in changed)}) == 1 + len(changed)


def test_auto_rows_a_shard_stay_as_they_were_planned(tmp_path: Path, checkpoint: Path) -> None:
    job = write_job(tmp_path, checkpoint)
    (first,) = prepare(job, workers=1, gpu=False)
    first.ledger.begin(first.plan)
    (again,) = prepare(job, workers=4, gpu=False)
    assert again.plan.hash == first.plan.hash and again.shards == first.shards
    (limited,) = prepare(replace_uri(job, f"{tmp_path}/limited"), workers=4, gpu=False, limit=8)
    assert (limited.plan.shards, limited.plan.rows) == (8, 8)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("sampler.scheduler=eulr", "sampler.scheduler: 'eulr' is unknown.*euler"),
        ("conditioning.task=txt", "conditioning.task: 'txt' is unknown"),
        ("output.sink=parkett", "output.sink: 'parkett' is unknown.*parquet"),
        ("model.path=tiny-scene", "model.path: 'tiny-scene' does not ship"),
        ("input.manifest=nothing.parquet", "input.manifest: .*nothing.parquet: no such file"),
    ],
)
def test_what_is_wrong_is_said_before_anything_loads(
    tmp_path: Path, checkpoint: Path, setting: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        prepare(write_job(tmp_path, checkpoint, 20, setting), 1, gpu=False)


def test_strict_refuses_bad_rows_up_front(tmp_path: Path, checkpoint: Path) -> None:
    job = write_job(tmp_path, checkpoint, 4, "run.strict=true")
    pq.write_table(pa.table({"prompt": ["a", None, "b"], "steps": [4, 4, 0]}), tmp_path / "prompts.parquet")
    with pytest.raises(UsageError, match="(?s)row prompts.parquet:1: prompt.*row prompts.parquet:2: steps"):
        prepare(job, 1, gpu=False)


def test_changed_soft_facts_are_said(tmp_path: Path, checkpoint: Path) -> None:
    (first,) = prepare(write_job(tmp_path, checkpoint), 1, gpu=False)
    assert first.warnings == ()
    first.ledger.begin(first.plan)
    (again,) = prepare(write_job(tmp_path, checkpoint, 20, "run.batch_size=4"), 1, gpu=False)
    assert again.warnings == ("batch_size was auto when this run began, now 4",)


def test_what_the_checkpoint_is_stands_in_the_plan(tmp_path: Path, checkpoint: Path) -> None:
    (prepared,) = prepare(write_job(tmp_path, checkpoint), 1, gpu=False)
    assert prepared.recognised[0].startswith("SD-like text because unet/config.json has in_channels 4")
    prepared.ledger.begin(prepared.plan)
    standing = prepared.ledger.plan()
    assert standing is not None and standing.soft["model"] == list(prepared.recognised)


def test_a_checkpoint_that_is_not_whole_is_found_before_a_worker_starts(tmp_path: Path, checkpoint: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    file = folder / "vae/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UsageError, match="vae/diffusion_pytorch_model.safetensors: .* is the download complete?"):
        prepare(write_job(tmp_path, folder), 1, gpu=False)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types_on_a_cpu_are_warned_of(tmp_path: Path, checkpoint: Path, dtype: str) -> None:
    job = write_job(tmp_path, checkpoint, 20, f"model.dtype={dtype}")
    (warning,) = prepare(job, 1, gpu=False)[0].warnings
    assert warning.startswith(f"model.dtype {dtype} on a CPU is 25 to 120 times slower")
    assert prepare(job, 1, gpu=True)[0].warnings == ()


def test_a_machine_with_another_checkpoint_does_not_draw(tmp_path: Path, checkpoint: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    recipe = prepare(write_job(tmp_path, folder), 1, gpu=False)[0].recipe
    config = folder / "scheduler/scheduler_config.json"
    config.write_text(config.read_text().replace("0.012", "0.013"))
    with pytest.raises(UsageError, match="model.path: .*copy on .* is checkpoint .*, the plan was made of"):
        recipe()


@pytest.mark.parametrize(("setting", "rows"), [("run.max_failed=3", 3), ("run.max_failed=0.25", 5.0)])
def test_max_failed_is_a_count_or_a_share(
    tmp_path: Path, checkpoint: Path, setting: str, rows: float
) -> None:
    (prepared,) = prepare(write_job(tmp_path, checkpoint, 20, setting), 1, gpu=False)
    assert prepared.max_failed == rows
