from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from batchsd.place import choose_address, gpus_here, size_crew
from batchsd.types import InfrastructureError, UsageError


def test_the_option_is_over_the_environment_over_the_job(tmp_path: Path) -> None:
    none = tmp_path / "no cluster"
    assert choose_address("a:1", "c:3", {"RAY_ADDRESS": "b:2"}, none) == "a:1"
    assert choose_address(None, "c:3", {"RAY_ADDRESS": "b:2"}, none) == "b:2"
    assert choose_address(None, "c:3", {"RAY_ADDRESS": ""}, none) == "c:3"
    assert choose_address("none", "c:3", {"RAY_ADDRESS": "b:2"}, none) == "none"


def test_auto_joins_only_a_cluster_of_this_user_that_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    current = tmp_path / "ray_current_cluster"
    assert choose_address(None, "auto", {}, current) == "local"
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        current.write_text(address)
        assert choose_address(None, "auto", {}, current) == address
        assert choose_address(None, "local", {}, current) == "local"
        with monkeypatch.context() as other_user:
            other_user.setattr(os, "getuid", lambda: current.stat().st_uid + 1)
            assert choose_address(None, "auto", {}, current) == "local"
    assert choose_address(None, "auto", {}, current) == "local", "the cluster is gone, its file was left"


def test_an_address_that_is_no_driver_s_is_refused() -> None:
    for address in ("http://127.0.0.1:8265", "ray://head:10001"):
        with pytest.raises(UsageError, match="ray job submit"):
            choose_address(None, "auto", {"RAY_ADDRESS": address})
    for address in ("head", "head:", "head:ray"):
        with pytest.raises(UsageError, match="give host:port"):
            choose_address(address, "auto", {})


@pytest.mark.parametrize(
    ("workers", "each", "device", "resources", "crew"),
    [
        ("auto", 1, "auto", {"CPU": 8}, (1, 0, 8, 8, "cpu")),
        (2, 1, "auto", {"CPU": 2}, (2, 0, 1, 1, "cpu")),
        (3, 1, "cpu", {"CPU": 8, "GPU": 4}, (3, 0, 2, 2, "cpu")),
        ("auto", 1, "auto", {"CPU": 32, "GPU": 8}, (8, 1, 0, 4, "cuda")),
        ("auto", 0.5, "auto", {"CPU": 4, "GPU": 1}, (2, 0.5, 0, 2, "cuda")),
        ("auto", 0.1, "cuda", {"CPU": 4, "GPU": 1}, (10, 0.1, 0, 1, "cuda")),
        ("auto", 2, "cuda", {"GPU": 5}, (2, 2, 0, 1, "cuda")),
    ],
)
def test_the_crew_fits_what_is_there(workers, each, device, resources, crew) -> None:
    found, short = size_crew(workers, each, device, [resources], grows=False)
    assert (found.workers, found.gpus, found.cpus, found.threads, found.device) == crew
    assert short == ""
    assert found.workers * found.gpus <= resources.get("GPU", 0)
    assert found.workers * found.cpus <= resources.get("CPU", 0)


SMALL, LARGE, HEAD = {"CPU": 4, "GPU": 1}, {"CPU": 64, "GPU": 8}, {"CPU": 2}


@pytest.mark.parametrize(
    ("workers", "each", "device", "nodes", "crew"),
    [
        ("auto", 1, "auto", [HEAD, SMALL, LARGE], (9, 1, 0, 4, "cuda")),
        ("auto", 0.5, "auto", [HEAD, SMALL, LARGE], (18, 0.5, 0, 2, "cuda")),
        ("auto", 0.4, "auto", [LARGE, LARGE], (32, 0.4, 0, 4, "cuda")),  # two a GPU: a share never spans two
        ("auto", 2, "auto", [SMALL, SMALL, LARGE], (4, 2, 0, 16, "cuda")),  # never one GPU of each of two nodes
        ("auto", 1, "cuda", [{"GPU": 2}, {}], (2, 1, 0, 1, "cuda")),
        (2, 1, "cpu", [{"CPU": 32}, {"CPU": 16}, {"CPU": 16}], (2, 0, 16, 16, "cpu")),
        (2, 1, "cpu", [{"CPU": 5}, {"CPU": 1}], (2, 0, 2, 2, "cpu")),
        (3, 1, "cpu", [{"CPU": 1}, {"CPU": 1}, {}], (2, 0, 1, 1, "cpu")),
    ],
)
def test_a_worker_lies_on_one_node(workers, each, device, nodes, crew) -> None:
    found, _ = size_crew(workers, each, device, nodes, grows=False)
    assert (found.workers, found.gpus, found.cpus, found.threads, found.device) == crew


def test_gpus_of_several_nodes_are_no_worker_s() -> None:
    with pytest.raises(InfrastructureError, match="needs 2 GPU of one node .* has 3 on 3 nodes"):
        size_crew("auto", 2, "auto", [SMALL, SMALL, SMALL], grows=True)


def test_fewer_workers_than_asked_are_said() -> None:
    crew, short = size_crew(4, 1, "auto", [{"CPU": 16, "GPU": 2}], grows=False)
    assert crew.workers == 2 and "ray.workers = 4" in short and "room for 2" in short
    crew, short = size_crew(4, 1, "cpu", [{"CPU": 3}], grows=False)
    assert crew.workers == 3 and "room for 3" in short


def test_a_cluster_that_grows_is_taken_at_its_word() -> None:
    crew, short = size_crew(4, 1, "cuda", [{"CPU": 16, "GPU": 2}], grows=True)
    assert (crew.workers, crew.gpus) == (4, 1) and "room for 2" in short
    crew, _ = size_crew(3, 1, "cuda", [{"CPU": 2}], grows=True)
    assert (crew.workers, crew.gpus, crew.threads) == (3, 1, 1)
    crew, _ = size_crew("auto", 1, "cuda", [{"CPU": 2, "GPU": 2}], grows=True)
    assert crew.workers == 2
    with pytest.raises(InfrastructureError, match="has 0 "):
        size_crew("auto", 1, "cuda", [{"CPU": 8}], grows=True)


def test_a_cluster_without_gpus_draws_on_cpus_only_where_the_job_says_so() -> None:
    with pytest.raises(InfrastructureError, match="has 0 on 2 nodes; add one with GPUs, or set model.device = 'cpu'"):
        size_crew("auto", 1, "auto", [HEAD, {"CPU": 8}], grows=True)
    with pytest.raises(InfrastructureError, match="'cuda' waits"):
        size_crew(4, 1, "auto", [HEAD], grows=True)
    crew, _ = size_crew(4, 1, "auto", [HEAD, SMALL], grows=True)
    assert (crew.workers, crew.gpus, crew.device) == (4, 1, "cuda")
    crew, _ = size_crew("auto", 1, "cpu", [HEAD, {"CPU": 8}], grows=True)
    assert (crew.workers, crew.gpus, crew.device) == (1, 0, "cpu")
    crew, _ = size_crew("auto", 1, "auto", [{"CPU": 8}], grows=False)  # a laptop
    assert crew.device == "cpu"


def test_a_gpu_that_is_not_there_is_an_error_not_a_wait() -> None:
    with pytest.raises(InfrastructureError, match="needs 1 GPU .* has 0 "):
        size_crew("auto", 1, "cuda", [{"CPU": 8}], grows=False)


def test_torch_is_not_asked_without_a_gpu_s_device_file(tmp_path: Path) -> None:
    assert gpus_here(tmp_path) == 0
