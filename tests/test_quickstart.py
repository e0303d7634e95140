"""The quickstart as a user runs it: the command, the shipped model, two Ray workers, other people's reader."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from batchsd.job import shipped_models

ROOT = Path(__file__).parent.parent


def batchsd(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "batchsd", *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    done = batchsd("run", "jobs/quickstart.toml", "--set", f"output.uri={folder}")
    assert done.returncode == 0, done.stderr
    assert "2 Ray actors here" in done.stderr
    assert re.search(r"^48 pictures, 0 failed in \d+ s -> ", done.stdout), done.stdout
    return folder


def test_datasets_shows_the_pictures(run_folder: Path) -> None:
    from datasets import load_dataset

    rows = load_dataset(str(run_folder), cache_dir=str(run_folder.parent / "cache"))["train"]
    manifest = pq.read_table(ROOT / "jobs" / "quickstart.parquet")
    assert rows["id"][:] == manifest["id"].to_pylist()
    assert rows["collection"][:] == manifest["collection"].to_pylist()
    assert set(rows["status"]) == {"ok"}
    assert rows[0]["image"].size == (64, 64)
    assert len({row["image"].tobytes() for row in rows}) == 48, "equal pictures for different rows"


def test_a_row_equals_diffusers(run_folder: Path) -> None:
    """From the output's own columns, with nothing of ours, the same picture comes out of diffusers."""
    from datasets import load_dataset
    from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionPipeline

    rows = load_dataset(str(run_folder), cache_dir=str(run_folder.parent / "cache"))["train"]
    row = next(row for row in rows if row["scheduler"] == "euler_a")
    model = ROOT / "batchsd" / "assets" / "tiny-scenes"
    pipe = StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    theirs = pipe(
        row["prompt"], guidance_scale=row["guidance_scale"], num_inference_steps=row["steps"], output_type="np",
        generator=torch.Generator().manual_seed(row["seed"]),
    ).images[0]  # fmt: skip
    ours = np.asarray(row["image"]).astype(float)
    assert np.abs(ours - theirs * 255).max() <= 1


def test_again_there_is_nothing_to_do(run_folder: Path) -> None:
    before = {path: path.read_bytes() for path in (run_folder / "data").iterdir()}
    again = batchsd("run", "jobs/quickstart.toml", "--set", f"output.uri={run_folder}")
    assert again.returncode == 0 and again.stdout.startswith("nothing to do"), again.stdout + again.stderr
    assert {path: path.read_bytes() for path in (run_folder / "data").iterdir()} == before
    assert (run_folder / "contact.png").stat().st_size > 10_000
    assert (run_folder / "report.html").read_text().count("<img ") >= 48


def pictures_of(folder: Path) -> np.ndarray:
    cells = pq.ParquetDataset(folder / "data").read()["image"].to_pylist()
    return np.stack([np.asarray(Image.open(io.BytesIO(cell["bytes"]))).astype(int) for cell in cells])


def test_one_file_plugin_on_ray(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from batchsd import Scheduler, hookimpl\n\n"
        "def euler(denoise, x, levels, noise):\n"
        "    for here, there in levels:\n"
        "        x = x + (there.sigma - here.sigma) * denoise.eps(x, here)\n"
        "    return x\n\n"
        "@hookimpl\n"
        "def register_schedulers():\n"
        "    return {'my_euler': Scheduler('my_euler', euler)}\n"
    )
    manifest = pq.read_table(ROOT / "jobs" / "quickstart.parquet").slice(0, 6).select(["id", "prompt"])
    pq.write_table(manifest, tmp_path / "six.parquet")
    job = tmp_path / "job.toml"
    job.write_text(
        'plugins = ["./mine.py"]\n[input]\nmanifest = "six.parquet"\n[model]\npath = "tiny-scenes"\n'
        '[sampler]\nscheduler = "my_euler"\nsteps = 4\n[output]\nuri = "run"\n[ray]\nworkers = 2\n'
    )
    done = batchsd("run", job)
    assert done.returncode == 0, done.stderr
    assert "2 Ray actors" in done.stderr
    made = pq.ParquetDataset(tmp_path / "run" / "data").read()
    assert made["scheduler"].to_pylist() == ["my_euler"] * 6 and made["status"].to_pylist() == ["ok"] * 6
    listed = batchsd("plugins", job)
    assert re.search(r"scheduler +my_euler +.*mine", listed.stdout), listed.stdout
    same = tmp_path / "same"
    settings = ("--set", "sampler.scheduler=euler", "--set", f"output.uri={same}")
    assert batchsd("run", job, "--local", *settings).returncode == 0
    difference = pictures_of(tmp_path / "run") - pictures_of(same)
    assert np.abs(difference).max() <= 1


def test_shipped_models_are_small() -> None:
    for name in shipped_models():
        folder = ROOT / "batchsd" / "assets" / name
        most = 12e6 + (2.1e6 if (folder / "depth_estimator").is_dir() else 0)
        assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= most, name
