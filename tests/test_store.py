from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from batchsd.object_store import ObjectStore
from batchsd.scratch import Scratch
from batchsd.store import LocalStore, Store, open_store
from batchsd.types import InfrastructureError, UsageError


@pytest.fixture(params=["local", "moto", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return LocalStore(tmp_path / "run")
    bucket = request.getfixturevalue("bucket" if request.param == "moto" else "memory")
    name = bucket if request.param == "moto" else "bucket"
    return ObjectStore(f"s3://{name}/deep/run", Scratch(tmp_path / "scratch"))


def test_create_only_has_one_winner_among_many(store: Store) -> None:
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


def test_publish_can_be_repeated_and_says_when_the_source_is_gone(store: Store) -> None:
    folder = store.scratch("staging/a")
    (folder / "x.parquet").write_bytes(b"x" * 10)
    (folder / "y").mkdir()
    (folder / "y/z.txt").write_bytes(b"z")
    store.hand_in("staging/a")
    pairs = [("staging/a/x.parquet", "data/deep/x.parquet"), ("staging/a/y/z.txt", "data/z.txt")]
    assert store.publish(pairs)
    store.remove("staging/a")
    assert not store.publish(pairs)
    assert store.read("data/deep/x.parquet") == b"x" * 10
    assert dict(store.entries("data")) == {"deep/x.parquet": 10, "z.txt": 1}
    assert store.children("data") == ["deep", "z.txt"] and store.children("staging") == []


def test_put_replaces_and_files_are_read_at_any_place(store: Store) -> None:
    store.put("a.bin", b"before")
    store.put("a.bin", bytes(range(256)) * 100)
    with store.open("a.bin") as file:
        assert file.seek(-3, os.SEEK_END) == 25597 and file.read() == b"\xfd\xfe\xff"
        assert file.seek(256) == 256 and file.read(4) == b"\0\1\2\3" and file.tell() == 260
        assert file.seek(0) == 0 and len(file.read()) == 25600
    store.put("b.bin", b"b")
    assert list(store.read_each(["b.bin", "none", "b.bin"])) == [b"b", None, b"b"]


def test_a_folder_is_not_its_neighbour_of_a_longer_name(store: Store) -> None:
    store.put("staging/00001.ab/x", b"1")
    store.put("staging/00001.abc/x", b"2")
    store.remove("staging/00001.ab")
    assert dict(store.entries("staging")) == {"00001.abc/x": 1}
    store.remove("staging/00001.abc/x")
    assert store.children("staging/00001.abc") == []


def test_scratch_is_never_shared(store: Store) -> None:
    store.scratch("staging/a")
    with pytest.raises(InfrastructureError, match="a: File exists"):
        store.scratch("staging/a")


def test_absent_things(store: Store) -> None:
    assert store.read("nothing.json") is None
    assert store.children("nothing") == []
    assert list(store.entries("nothing")) == []
    store.remove("nothing")


def test_a_failing_disk_names_the_path_and_the_room(tmp_path: Path) -> None:
    (tmp_path / "run").write_bytes(b"a file where the folder should be")
    store = LocalStore(tmp_path / "run")
    with pytest.raises(InfrastructureError, match=r"run/plans.*MiB free"):
        store.put("plans/1.json", b"{}")


def test_names_stay_below_the_root(store: Store) -> None:
    for name in ("../x", "/etc/x", "data/../../x"):
        with pytest.raises(AssertionError, match="leaves the run folder"):
            store.put(name, b"")


def test_open_store_refuses_what_it_cannot_write(tmp_path: Path) -> None:
    for uri in ("ftp://host/run", "http://bucket/run"):
        with pytest.raises(UsageError, match=f"{uri}.*give a path, or s3://"):
            open_store(uri)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        open_store(str(tmp_path / "file"))


def test_a_scratch_folder_elsewhere_is_where_files_are_built(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "run"), str(tmp_path / "fast"))
    folder = store.scratch("staging/00007.abc")
    assert folder.is_relative_to(tmp_path / "fast") and not (tmp_path / "run").exists()
    (folder / "x.parquet").write_bytes(b"x")
    store.hand_in("staging/00007.abc")
    assert store.publish([("staging/00007.abc/x.parquet", "data/x.parquet")])
    assert store.read("data/x.parquet") == b"x"
    assert list((tmp_path / "fast").iterdir()) == []


def test_many_files_come_in_the_order_asked(store: Store) -> None:
    for i in range(0, 1100, 100):
        store.put(f"ledger/{i}.json", b"%d" % i)
    asked = [f"ledger/{i}.json" for i in range(1100)]  # more than one wave of reads
    assert list(store.read_each(asked)) == [b"%d" % i if i % 100 == 0 else None for i in range(1100)]


def test_entries_leave_out_what_goes_meanwhile(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for name in ("data/a/x", "data/a/y", "data/b"):
        store.put(name, b"12")
    (tmp_path / "data/gone").symlink_to(tmp_path / "nothing")
    assert dict(store.entries("data")) == {"a/x": 2, "a/y": 2, "b": 2}
    assert list(store.entries("data/b")) == list(store.entries("nowhere")) == []
