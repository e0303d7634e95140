"""Broken and hostile checkpoints as a user meets them: one line from `inspect` and `run`, exit 2, no traceback."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from batchsd.cli import main
from tests.model.ldm import networks, to_ldm
from tests.model.test_folder import as_shards

UNET = "unet/diffusion_pytorch_model.safetensors"
SHARD = "unet/diffusion_pytorch_model-00002-of-00002.safetensors"
RAN = "pickle-ran"


class Hostile:
    """Makes a file where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {RAN}",)


def hostile_file(folder: Path) -> Path:
    torch.save({"state_dict": {"model.diffusion_model.a": Hostile()}}, folder / "a.ckpt")
    return folder / "a.ckpt"


def hostile_part(folder: Path) -> Path:
    (folder / UNET).unlink()
    torch.save({"conv_in.weight": torch.zeros(1), "more": Hostile()}, folder / "unet/diffusion_pytorch_model.bin")
    return folder


def cut_off(folder: Path) -> Path:
    content = (folder / UNET).read_bytes()
    (folder / UNET).write_bytes(content[: len(content) // 2])
    return folder


def written(name: str, content: bytes) -> Callable[[Path], Path]:
    def damage(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name if "/" not in name else folder

    return damage


def without(name: str) -> Callable[[Path], Path]:
    def damage(folder: Path) -> Path:
        shutil.rmtree(folder / name)
        return folder

    return damage


def missing_shard(folder: Path) -> Path:
    as_shards(folder)
    (folder / SHARD).unlink()
    return folder


def shard_outside(folder: Path) -> Path:
    as_shards(folder)
    save_file(load_file(folder / SHARD), folder / "outside.safetensors")
    index = folder / f"{UNET}.index.json"
    said = json.loads(index.read_text())
    names = {
        name: file.replace(Path(SHARD).name, "../outside.safetensors") for name, file in said["weight_map"].items()
    }
    index.write_text(json.dumps({"weight_map": names}))
    return folder


def refiner(folder: Path) -> Path:
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "requires_aesthetics_score": True}))
    return folder


HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * 3
BROKEN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a pickle that runs code": (hostile_file, "a.ckpt: refused, this pickle wants to run code"),
    "a pickle that runs code, in a folder": (hostile_part, ".bin: refused, this pickle wants to run code"),
    "safetensors cut off": (cut_off, f"{UNET}: not readable as safetensors"),
    "a text file": (written("a.safetensors", HTML), "a.safetensors: not readable as safetensors, it is a text file"),
    "zero bytes": (written("a.safetensors", b""), "a.safetensors: empty (zero bytes)"),
    "zero bytes, in a folder": (written(UNET, b""), f"{UNET}: empty (zero bytes)"),
    "a pickle of zero bytes": (written("a.ckpt", b""), "a.ckpt: empty (zero bytes)"),
    "a text file as a pickle": (written("a.ckpt", HTML), "a.ckpt: not readable as weights"),
    "a file of no known kind": (written("a.gguf", b"GGUF" * 99), "a.gguf: not a checkpoint's file"),
    "a folder without unet": (without("unet"), "is not a folder in diffusers layout (model_index.json, unet/"),
    "a folder without vae": (without("vae"), "vae/config.json: missing"),
    "a missing shard": (missing_shard, f"{SHARD}: missing"),
    "an index that points outside": (shard_outside, "names the shard '../outside.safetensors', which does not lie"),
    "a refiner": (refiner, "this is the SDXL refiner, which is not supported"),
    "nothing there": (lambda folder: folder / "nowhere", "no file or folder"),
}


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job file that draws one row; the current folder is a new one."""
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table({"prompt": ["a red cube"]}), "p.parquet")
    text = '[input]\nmanifest = "p.parquet"\n[model]\npath = "unsaid"\ndevice = "cpu"\n[output]\nuri = "out"\n'
    Path("job.toml").write_text(text + "[sampler]\nsteps = 2\nheight = 16\nwidth = 16\n[run]\nmax_failed = 1.0\n")
    return Path("job.toml")


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["batchsd", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        told = capsys.readouterr()
        return int(end.value.code or 0), told.out, told.err

    return run


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoints(job: Path, checkpoint: Path, call: Callable[..., Any], name: str) -> None:
    damage, message = BROKEN[name]
    path = damage(Path(shutil.copytree(checkpoint, "model")))
    for command in (("inspect", f"./{path}"), ("run", str(job), "--local", "--set", f"model.path=./{path}")):
        code, out, errors = call(*command)
        (line,) = errors.splitlines()
        assert code == 2 and line.startswith("batchsd: ") and message in line and not out, line
    assert not Path(RAN).exists() and not Path("out").exists()


def test_a_fp16_variant_alone_is_enough(job: Path, checkpoint: Path, call: Callable[..., Any]) -> None:
    folder = Path(shutil.copytree(checkpoint, "model"))
    for file in [*folder.rglob("*.safetensors")]:
        half = {name: value.half() if value.is_floating_point() else value for name, value in load_file(file).items()}
        file.unlink()
        save_file(half, file.with_suffix(".fp16.safetensors"))
    code, out, _ = call("inspect", "./model")
    assert code == 0 and "unet: " in out and "float16" in out
    code, out, errors = call("run", str(job), "--local", "--set", "model.path=./model")
    assert code == 0 and out.startswith("1 picture, 0 failed"), errors


def test_a_lora_of_another_family(job: Path, call: Callable[..., Any]) -> None:
    save_file(to_ldm(networks("SD1")), "sd1.safetensors")
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {f"{layer}.lora_down.weight": torch.zeros(4, 2048), f"{layer}.lora_up.weight": torch.zeros(32, 4)}
    save_file(tensors, "xl.safetensors")
    sets = ("--set", "model.path=./sd1.safetensors", "--set", "model.loras=['./xl.safetensors:0.8']")
    code, _, errors = call("run", str(job), "--local", *sets)
    last = errors.splitlines()[-1]
    assert code == 2 and "xl.safetensors: made for SDXL (cross-attention 2048), this checkpoint is" in last
    assert "Traceback" not in errors
    code, _, errors = call("inspect", "./xl.safetensors")
    assert code == 2 and "this is a LoRA (see model.loras)" in errors
