from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from batchsd.retrying import Backoff, Retrying, patient
from batchsd.store import LocalStore
from batchsd.types import InfrastructureError


class Flaky(LocalStore):
    """Each operation fails a number of times, `create_only` after it has done its work."""

    def __init__(self, root: Path, failures: int) -> None:
        super().__init__(root)
        self.failures = failures

    def _maybe_fail(self) -> None:
        if self.failures:
            self.failures -= 1
            raise InfrastructureError("no space left")

    def create_only(self, name: str, data: bytes) -> bool:
        done = super().create_only(name, data)
        self._maybe_fail()
        return done

    def put(self, name: str, data: bytes) -> None:
        self._maybe_fail()
        super().put(name, data)


def test_two_failures_pass_and_a_third_does_not(tmp_path: Path) -> None:
    Retrying(Flaky(tmp_path, 2), (0, 0)).put("a", b"1")
    assert (tmp_path / "a").read_bytes() == b"1"
    with pytest.raises(InfrastructureError, match="no space left"):
        Retrying(Flaky(tmp_path, 3), (0, 0)).put("a", b"2")
    assert (tmp_path / "a").read_bytes() == b"1"


def test_a_file_that_was_made_by_a_try_that_failed_is_ours(tmp_path: Path) -> None:
    assert Retrying(Flaky(tmp_path, 1), (0, 0)).create_only("marker", b"mine") is True
    assert Retrying(Flaky(tmp_path, 1), (0, 0)).create_only("marker", b"another's") is False
    assert (tmp_path / "marker").read_bytes() == b"mine"


def test_only_stores_without_tries_of_their_own_are_wrapped(tmp_path: Path) -> None:
    other: Any = object()
    assert patient(other) is other
    assert isinstance(patient(LocalStore(tmp_path)), Retrying)


def test_failures_of_many_workers_at_once_are_one() -> None:
    now = 0.0
    backoff = Backoff((2, 10), lambda: now)
    assert [backoff.failed("full") for _ in range(8)] == [2] * 8 and backoff.waiting
    now = 2.5
    assert not backoff.waiting and backoff.failed("full") == 10
    now = 13.0
    with pytest.raises(InfrastructureError, match=r"full \(3 tries\)"):
        backoff.failed("full")
    backoff.worked()
    assert backoff.failed("full") == 2


def test_a_wave_of_reads_is_tried_again_as_one(tmp_path: Path) -> None:
    class Stumbling(Flaky):
        def read(self, name: str) -> bytes | None:
            self._maybe_fail()
            return super().read(name)

    LocalStore(tmp_path).put("b", b"2")
    assert list(Retrying(Stumbling(tmp_path, 2), (0, 0)).read_each(["a", "b"])) == [None, b"2"]
    with pytest.raises(InfrastructureError, match="no space left"):
        list(Retrying(Stumbling(tmp_path, 3), (0, 0)).read_each(["a", "b"]))
