"""Checkpoints on S3: fetched once a machine, whole or not at all, again only when the bucket has another version."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from batchsd import fetch, object_store
from batchsd.cli import commands
from batchsd.fetch import local, local_spec
from batchsd.model.checkpoint import load
from batchsd.types import InfrastructureError, UsageError

UNET = "unet/diffusion_pytorch_model.safetensors"
PROCESS = "import sys; from batchsd.fetch import local; print(local(sys.argv[1], 'model.path', print), flush=True)"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BATCHSD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def put(bucket: str, name: str, data: bytes) -> None:
    object_store.client().put_object(Bucket=bucket, Key=name, Body=data)


def upload(bucket: str, folder: Path, name: str) -> str:
    for file in folder.rglob("*"):
        if file.is_file():
            put(bucket, f"{name}/{file.relative_to(folder).as_posix()}", file.read_bytes())
    return f"s3://{bucket}/{name}"


def test_a_folder(bucket: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "PIECE", 10_000)  # so that files come in many pieces
    uri = upload(bucket, checkpoint, "models/small")
    for name in ("unet/diffusion_pytorch_model.bin", "safety_checker/model.safetensors", "whole.safetensors"):
        put(bucket, f"models/small/{name}", b"never read")
    told: list[str] = []
    path = local(uri, "model.path", told.append)
    assert path.name == "small" and len(told) == 1 and told[0].startswith(f"fetching {uri}: ")
    assert (path / UNET).read_bytes() == (checkpoint / UNET).read_bytes()
    assert not [*path.rglob("*.bin"), *path.rglob("safety_checker"), *path.glob("*.safetensors")]
    assert load(path).native_size == load(checkpoint).native_size
    facts = json.loads((path.parent / "fetched.json").read_text())
    assert facts["from"] == uri and all(len(file["sha256"]) == 64 for file in facts["files"])
    assert local(uri + "/", "model.path", told.append) == path and len(told) == 1


def test_another_version_is_another_folder(bucket: str, checkpoint: Path) -> None:
    uri = upload(bucket, checkpoint, "m")
    first = local(uri, "model.path")
    put(bucket, "m/model_index.json", b"{}")
    second = local(uri, "model.path")
    assert first != second and (second / "model_index.json").read_text() == "{}"
    assert (first / "model_index.json").read_text() != "{}"


def test_a_file_that_was_cut_off_here_is_fetched_again(bucket: str) -> None:
    put(bucket, "style.safetensors", b"x" * 5000)
    path = local(f"s3://{bucket}/style.safetensors", "model.loras")
    path.write_bytes(b"x" * 100)
    assert local(f"s3://{bucket}/style.safetensors", "model.loras").read_bytes() == b"x" * 5000


def test_what_a_process_that_died_left_is_of_no_use(bucket: str, cache: Path) -> None:
    put(bucket, "a.safetensors", b"right" * 100)
    path = local(f"s3://{bucket}/a.safetensors", "model.path")
    shutil.move(path.parent, f"{path.parent}.part")
    Path(f"{path.parent}.part/a.safetensors").write_bytes(b"wrong" * 100)
    assert local(f"s3://{bucket}/a.safetensors", "model.path").read_bytes() == b"right" * 100


def test_weights_behind_a_colon(bucket: str) -> None:
    put(bucket, "a.safetensors", b"x")
    path = local(f"s3://{bucket}/a.safetensors", "model.loras")
    assert local_spec(f"s3://{bucket}/a.safetensors:0.8", "model.loras") == f"{path}:0.8"
    assert local_spec("/b.safetensors:0.8", "model.loras") == "/b.safetensors:0.8" and local_spec("", "") == ""


def test_processes_of_a_machine_fetch_once(bucket: str, checkpoint: Path) -> None:
    uri = upload(bucket, checkpoint, "m")
    both = [subprocess.Popen([sys.executable, "-c", PROCESS, uri], stdout=-1, text=True) for _ in range(3)]
    lines = [each.communicate()[0].splitlines() for each in both]
    assert all(each.returncode == 0 for each in both)
    assert len({each[-1] for each in lines}) == 1
    assert sum(line.startswith("fetching") for each in lines for line in each) == 1


def test_damage_on_the_way_is_found(bucket: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(bucket, "a.safetensors", b"right")
    monkeypatch.setattr(object_store.ObjectStore, "read_part", lambda *asked: b"wrong")
    with pytest.raises(InfrastructureError, match="a.safetensors: arrived damaged"):
        local(f"s3://{bucket}/a.safetensors", "model.path")
    assert not list(cache.glob("*/a.safetensors")) or all(".part" in str(p) for p in cache.glob("*/a.safetensors"))


def test_a_version_that_changes_while_it_is_read(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put(bucket, "a.safetensors", b"one")
    real = object_store.ObjectStore.version

    def then_changed(self: object_store.ObjectStore, name: str) -> tuple[int, str] | None:
        found = real(self, name)
        put(bucket, "a.safetensors", b"two")
        return found

    monkeypatch.setattr(object_store.ObjectStore, "version", then_changed)
    with pytest.raises(InfrastructureError, match="a.safetensors"):
        local(f"s3://{bucket}/a.safetensors", "model.path")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://{}/nowhere", "jobs/a.toml:3: model.path: s3://{}/nowhere: no file of that name"),
        ("s3://{}", "is a whole bucket; name the folder or file in it"),
        ("gs://{}/a", "checkpoints are paths, org/name or s3://bucket/folder"),
    ],
)
def test_what_is_not_there_is_one_line(bucket: str, uri: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        local(uri.format(bucket), "jobs/a.toml:3: model.path")
    assert message.format(bucket) in str(error.value) and "\n" not in str(error.value)


def test_a_bucket_that_is_not_there_may_come(bucket: str) -> None:
    with pytest.raises(InfrastructureError, match="NoSuchBucket"):
        local(f"s3://{bucket}-not/models/a", "model.path")


def test_inspect_fetches_too(bucket: str, checkpoint: Path) -> None:
    done = CliRunner().invoke(commands, ["inspect", upload(bucket, checkpoint, "m")])
    assert done.exit_code == 0 and "SD-like text because" in done.output
