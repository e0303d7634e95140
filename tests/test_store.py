from __future__ import annotations

import threading
from pathlib import Path

import pytest

from batchsd.store import LocalStore, open_store
from batchsd.types import InfrastructureError, UsageError


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


def test_create_only_has_one_winner_among_many(store: LocalStore) -> None:
    won: list[int] = []
    start = threading.Barrier(16)

    def race(number: int) -> None:
        start.wait()
        if store.create_only("ledger/00001.json", b"%d" % number * 1000):
            won.append(number)

    threads = [threading.Thread(target=race, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.read("ledger/00001.json") == b"%d" % won[0] * 1000
    assert store.children("ledger") == ["00001.json"], "a loser left its temporary file"


def test_publish_can_be_repeated_and_says_when_the_source_is_gone(store: LocalStore) -> None:
    folder = store.scratch("staging/a")
    (folder / "x.parquet").write_bytes(b"x" * 10)
    store.hand_in("staging/a")
    assert store.publish("staging/a/x.parquet", "data/deep/x.parquet")
    assert not store.publish("staging/a/x.parquet", "data/deep/x.parquet")
    assert store.read("data/deep/x.parquet") == b"x" * 10
    assert dict(store.entries("data")) == {"deep/x.parquet": 10}


def test_scratch_is_never_shared(store: LocalStore) -> None:
    store.scratch("staging/a")
    with pytest.raises(InfrastructureError, match="staging/a"):
        store.scratch("staging/a")


def test_absent_things(store: LocalStore) -> None:
    assert store.read("nothing.json") is None
    assert store.children("nothing") == []
    assert list(store.entries("nothing")) == []
    store.remove("nothing")


def test_a_failing_disk_names_the_path_and_the_room(store: LocalStore, tmp_path: Path) -> None:
    (tmp_path / "run").write_bytes(b"a file where the folder should be")
    with pytest.raises(InfrastructureError, match=r"run/plans.*MiB free"):
        store.put("plans/1.json", b"{}")


def test_names_stay_below_the_root(store: LocalStore) -> None:
    for name in ("../x", "/etc/x", "data/../../x"):
        with pytest.raises(AssertionError, match="leaves the run folder"):
            store.put(name, b"")


def test_open_store_refuses_what_it_cannot_write(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="s3://bucket/run"):
        open_store("s3://bucket/run")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        open_store(str(tmp_path / "file"))


def test_a_scratch_folder_elsewhere_is_where_files_are_built(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "run"), str(tmp_path / "fast"))
    folder = store.scratch("staging/00007.abc")
    assert folder.is_relative_to(tmp_path / "fast") and not (tmp_path / "run").exists()
    (folder / "x.parquet").write_bytes(b"x")
    store.hand_in("staging/00007.abc")
    assert store.publish("staging/00007.abc/x.parquet", "data/x.parquet")
    assert store.read("data/x.parquet") == b"x"
    assert list((tmp_path / "fast").iterdir()) == []
