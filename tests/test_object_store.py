"""What goes wrong with an S3, each seen as a person would: one message with where, what and what next; exit code 3."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from null_model import job_at, run_job, write_manifest
from s3 import MemoryS3, flaky, point_at, refusal

import batchsd
from batchsd import object_store
from batchsd.object_store import ObjectStore
from batchsd.revise import replace_uri
from batchsd.scratch import Scratch
from batchsd.store import open_store
from batchsd.types import InfrastructureError, UsageError
from batchsd.verify import verify


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "FIRST_WAIT", 0.001)


@pytest.fixture
def store(memory: MemoryS3, tmp_path: Path) -> ObjectStore:
    return ObjectStore("s3://bucket/run", Scratch(tmp_path))


def fail(memory: MemoryS3, monkeypatch: pytest.MonkeyPatch, operation: str, *errors: Any) -> list[str]:
    """The next requests of that kind raise these, None being none; gives the list of those that were made."""
    waiting, made, real = list(errors), [], memory._make_api_call

    def call(name: str, arguments: dict[str, Any]) -> Any:
        if name == operation:
            made.append(arguments["Key"])
            if waiting and (error := waiting.pop(0)):
                raise error
        return real(name, arguments)

    monkeypatch.setattr(memory, "_make_api_call", call)
    return made


def test_a_missing_bucket(bucket: str) -> None:
    with pytest.raises(InfrastructureError, match=r"s3://test-none-such/run/x: .*NoSuchBucket.*; make the bucket, or"):
        open_store("s3://test-none-such/run").put("x", b"")


def test_no_permission_is_not_tried_again(
    store: ObjectStore, memory: MemoryS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = fail(memory, monkeypatch, "PutObject", refusal("AccessDenied", 403))
    with pytest.raises(InfrastructureError, match=r"s3://bucket/run/x: .*AccessDenied.*mend the bucket's policy"):
        store.put("x", b"")
    assert len(made) == 1


def test_no_credentials(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    point_at(endpoint, monkeypatch)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(InfrastructureError, match="credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        open_store("s3://bucket/run").read("x")


def test_an_endpoint_that_nobody_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    point_at("http://someone:sesame@127.0.0.1:9", monkeypatch)
    with pytest.raises(InfrastructureError) as error:
        open_store("s3://bucket/run").read("x")
    text = str(error.value)
    assert text.startswith("s3://bucket/run/x: ") and "127.0.0.1:9" in text
    assert text.endswith("(6 tries); run the same command again when that is mended")
    assert "sesame" not in text and "hidden-hidden" not in text


def test_what_passes_is_tried_again(store: ObjectStore, memory: MemoryS3, monkeypatch: pytest.MonkeyPatch) -> None:
    trouble = [refusal("InternalError", 500), refusal("SlowDown", 503), ConnectionResetError("reset by peer")]
    made = fail(memory, monkeypatch, "PutObject", *trouble)
    store.put("x", b"at last")
    assert store.read("x") == b"at last" and len(made) == 4
    fail(memory, monkeypatch, "GetObject", *[refusal("InternalError", 500)] * 6)
    with pytest.raises(InfrastructureError, match=r"InternalError.*\(6 tries\)"):
        store.read("x")


def test_a_truncated_upload_is_sent_again(
    store: ObjectStore, memory: MemoryS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = store.scratch("staging/a")
    (folder / "x.tar").write_bytes(b"x" * 1000)
    fail(memory, monkeypatch, "PutObject", refusal("BadDigest", 400))
    store.hand_in("staging/a")
    assert store.read("staging/a/x.tar") == b"x" * 1000


def test_a_create_whose_answer_is_lost_is_known_for_ours(
    store: ObjectStore, memory: MemoryS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, lost = memory.PutObject, [True, True]

    def put(**arguments: Any) -> Any:
        done = real(**arguments)
        if lost:
            lost.pop()
            raise ConnectionResetError("reset by peer")
        return done

    monkeypatch.setattr(memory, "PutObject", put)
    assert store.create_only("marker", b"mine")
    lost.append(True)
    memory.objects["run/other"] = b"another driver's"
    assert not store.create_only("other", b"mine")


@pytest.mark.parametrize("uri", ["s3://key:secretsecret@bucket/run", "s3://bucket/run?token=abc", "s3:///run", "s3://"])
def test_what_is_no_place_in_a_bucket(uri: str) -> None:
    with pytest.raises(UsageError, match="not of the form s3://bucket/folder; keys and endpoints come from") as error:
        open_store(uri)
    assert "secret" not in str(error.value).replace("AWS_SECRET", "") and "abc" not in str(error.value)


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.startswith("botocore"):
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    object_store.client.cache_clear()
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UsageError, match=r"pip install 'batchsd\[s3\]'"):
        open_store("s3://bucket/run")


@pytest.fixture
def storm(endpoint: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket behind a proxy that fails a fifth of all requests."""
    with flaky(endpoint, 0.2) as proxy:
        point_at(proxy, monkeypatch)
        yield bucket


def test_a_run_through_a_storm(storm: str, tmp_path: Path) -> None:
    model = Path(batchsd.__file__).parent / "assets/tiny-scenes"
    write_manifest(tmp_path / "prompts.parquet", [f"prompt {i}" for i in range(12)])
    job = replace_uri(job_at(tmp_path, model), f"s3://{storm}/run")
    total = run_job(job, tmp_path / "log", store=open_store(job.output.uri, str(tmp_path / "scratch")))
    assert (total.rows, total.ok) == (12, 12)
    faults: list[str] = []
    verdict = verify(job.output.uri, faults.append, lambda verdict: None)
    assert (faults, verdict.rows, verdict.pictures) == ([], 12, 12)
    assert list((tmp_path / "scratch").iterdir()) == []
