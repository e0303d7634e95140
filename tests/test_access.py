"""Who may give a cluster orders, as rules. The oracle: addresses of this machine and of none (RFC 5737), Ray."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from runs import ROOT, SLOW, environment

from batchsd.access import check_access, has_token, is_loopback, is_node, mode_here, warning
from batchsd.types import UsageError

ELSEWHERE = "203.0.113.7:6379"  # for documentation: nobody's


def hostname_address() -> str:
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("203.0.113.7", 9))  # nothing is sent: the kernel chooses our side
        return str(probe.getsockname()[0])


@pytest.mark.parametrize("address", ["127.0.0.1:6379", "localhost:6379", "127.1.2.3:1", "[::1]:6379", "local"])
def test_loopback_is_nobody_else_s(address: str) -> None:
    assert is_loopback(address)
    check_access(address, False, "", {}, False)
    assert warning(address, {"127.0.0.1": "open"}) == ""


def test_a_node_is_known_by_its_head_s_address_or_by_ray_start(tmp_path: Path) -> None:
    none = tmp_path / "no cluster"
    assert is_node(f"{hostname_address()}:6379", none) and is_node("localhost:6379", none)
    assert not is_node(ELSEWHERE, none) and not is_node("no.such.host.invalid:6379", none)
    joined = tmp_path / "ray_current_cluster"
    joined.write_text(ELSEWHERE)
    assert is_node(ELSEWHERE, joined) and not is_node("203.0.113.8:6379", joined)


def test_from_outside_an_open_cluster_is_refused_unless_allowed() -> None:
    with pytest.raises(UsageError, match=r"203.0.113.7:6379: .*RAY_AUTH_MODE=token.* or a.toml:9: ray.allow = true"):
        check_access(ELSEWHERE, False, "a.toml:9: ray.allow", {"RAY_AUTH_MODE": "disabled"}, inside=False)
    check_access(ELSEWHERE, True, "", {"RAY_AUTH_MODE": "disabled"}, inside=False)
    check_access(ELSEWHERE, False, "", {"RAY_AUTH_MODE": "disabled"}, inside=True)
    check_access(ELSEWHERE, False, "", {"RAY_AUTH_MODE": "token"}, inside=False)


def test_inside_it_is_one_line() -> None:
    assert warning(ELSEWHERE, {"a": "token", "b": "token"}) == ""
    said = warning(ELSEWHERE, {"a": "token", "b": "open"})
    assert "anyone" in said and "1 of 2 nodes" in said and "\n" not in said


@pytest.mark.parametrize(
    "environ, file",
    [({"RAY_AUTH_MODE": "disabled"}, True), ({"RAY_AUTH_TOKEN": "a" * 32}, False), ({}, True), ({}, False)],
    ids=["disabled", "a token", "a file", "nothing"],
)
def test_ray_decides_as_we_say(environ: dict[str, str], file: bool, tmp_path: Path) -> None:
    """Ray's own start-up rule, in a process of that environment and home."""
    if file:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("b" * 32)
    code = (
        "from ray._private.authentication import authentication_token_setup as s\n"
        "import os\n"
        "print(s.maybe_enable_token_auth_if_token_available(), os.environ.get('RAY_AUTH_MODE'))"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**clean, "HOME": str(tmp_path), **environ}, capture_output=True, text=True
    )
    asks, mode = done.stdout.split()
    assert has_token(environ, tmp_path / ".ray" / "auth_token") is (asks == "True"), done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_AUTH_MODE", raising=False)
        if mode != "None":
            patch.setenv("RAY_AUTH_MODE", mode)  # what a raylet hands down to its workers
        assert mode_here() == ("token" if asks == "True" else "open")


CLUSTER = """
import sys
from ray.cluster_utils import Cluster
found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
print("address", found.address, flush=True)
sys.stdin.read()
found.shutdown()
"""


@contextmanager
def cluster(**environ: str) -> Iterator[str]:
    """One node without a GPU, at this machine's outer address: its address. A process of its own, for Ray asks once
    a process whether it needs a token."""
    folder = tempfile.mkdtemp(prefix="bray")  # short: sockets lie below it
    told = environment(RAY_TMPDIR=folder, RAY_worker_niceness="0", **environ)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", CLUSTER], env=told, text=True, **pipes) as process:
        assert process.stdin and process.stdout
        try:
            lines = (line.split() for line in process.stdout)
            yield next(words[1] for words in lines if words[:1] == ["address"])
        finally:
            process.stdin.close()
    shutil.rmtree(folder, ignore_errors=True)


def batchsd(*words: str, **environ: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "batchsd", *words],
        env=environment(**environ), capture_output=True, text=True, timeout=SLOW, cwd=ROOT,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.cluster
def test_a_cluster_that_is_open_and_has_no_gpu(tmp_path: Path) -> None:
    with cluster(RAY_AUTH_MODE="disabled") as address:
        code, said = batchsd("doctor", "--address", address, RAY_AUTH_MODE="disabled")
        print(said)
        assert code == 0 and "1 of 1 nodes ask for no token" in said
        words = ("run", "jobs/quickstart.toml", "--address", address, "--set", f"output.uri={tmp_path / 'out'}")
        code, said = batchsd(*words, RAY_AUTH_MODE="disabled")
        print(said)
        assert code == 3 and "the cluster has 0 on 1 nodes; add one with GPUs, or set model.device = 'cpu'" in said
        assert not (tmp_path / "out").exists()


@pytest.mark.cluster
def test_a_cluster_that_asks_for_a_token() -> None:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 40}
    with cluster(**token) as address:
        code, said = batchsd("doctor", "--address", address, **token)
        print(said)
        assert code == 0 and "every node asks for a token" in said
        code, said = batchsd("doctor", "--address", address, RAY_AUTH_MODE="disabled")
        print(said)
        assert code == 3 and "RAY_AUTH_TOKEN here too" in said
