"""The quickstart over separate `ray start` nodes, each with a network, processes and mounts of its own."""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from machines import Machine, machines, missing, reaches
from runs import ROOT, Started, check_every_row_once, command, environment, markers, started, who_drew

import batchsd
from batchsd.status import read_status

pytestmark = pytest.mark.cluster

PORT = 6379
RAY = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=1", "--object-store-memory=80000000"]
MODEL = ROOT / "batchsd" / "assets" / "tiny-scenes"


@dataclass(frozen=True)
class Net:
    """Two machines with a Ray node each; the first is the head, and the driver's."""

    head: Machine
    other: Machine
    environ: dict[str, str]

    def driver(
        self, output: Path, *options: str, on: Machine | None = None
    ) -> contextlib.AbstractContextManager[Started]:
        """The quickstart, begun on the head."""
        words = command(output, "--address", f"{self.head.address}:{PORT}", *options)
        return started((on or self.head).inside(words), output.parent / f"{output.name}.log", self.environ)


@contextlib.contextmanager
def joined() -> Iterator[Net]:
    if why := missing():
        pytest.skip(why)
    own = Path(tempfile.mkdtemp(prefix="bray"))  # short: Ray's sockets lie below it
    environ = environment(RAY_TMPDIR=str(own), RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="5" * 64, RAY_worker_niceness="0")
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, own)
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        head, other = stack.enter_context(machines(2, own))
        begin = [*RAY, "--block", "--head", f"--node-ip-address={head.address}", f"--port={PORT}"]
        stack.enter_context(started(head.inside([*begin, "--include-dashboard=false"]), logs / "head", environ))
        reaches(other, head.address, PORT)
        join = [*RAY, "--block", f"--node-ip-address={other.address}", f"--address={head.address}:{PORT}"]
        node = stack.enter_context(started(other.inside(join), logs / "other", environ))
        node.until(lambda: "Ray runtime started" in node.said)
        yield Net(head, other, environ)


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with joined() as net:
        yield net


def refused(net: Net, output: Path, *options: str) -> str:
    """The line of the other node, where the run ends with 2 before any worker is asked to load its model."""
    began = time.monotonic()
    with net.driver(output, *options) as process:
        said = process.ends(2)
    print(f"{time.monotonic() - began:.1f} s\n{said}")
    assert "Ray actor" not in said and not markers(output)
    (line,) = re.findall(r"^  (node .*)$", said, re.MULTILINE)
    address, _, text = line.removeprefix("node ").partition(": ")
    assert address == net.other.address
    return text


def test_an_output_that_the_nodes_do_not_share_is_refused(net: Net, tmp_path: Path) -> None:
    with net.other.instead(tmp_path):
        text = refused(net, tmp_path / "out")
    assert "output.uri" in text and f"{tmp_path}/out is another folder there" in text


def test_a_checkpoint_that_differs_or_lacks_is_refused(net: Net, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, altered = tmp_path / "model", tmp_path / "altered"
    shutil.copytree(MODEL, model)
    shutil.copytree(MODEL, altered)
    (weights,) = (altered / "unet").glob("*.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in load_file(weights).items()}, weights)
    with net.other.instead(model, altered):
        text = refused(net, tmp_path / "out", "--set", f"model.path={model}")
    assert re.search(rf"model\.path.*{model} is another checkpoint there \(\w{{12}}, here \w{{12}}\)", text)
    with net.other.instead(model):
        text = refused(net, tmp_path / "out2", "--set", f"model.path={model}")
    assert text.endswith(f"model.path: {model} holds no config or weights")


def test_another_batchsd_is_refused(net: Net, tmp_path: Path) -> None:
    door = ROOT / "batchsd" / "__init__.py"
    older = tmp_path / "older.py"
    older.write_text(door.read_text().replace(f'"{batchsd.__version__}"', '"0.0.1"'))
    with net.other.instead(door, older):
        text = refused(net, tmp_path / "out")
    assert text == f"batchsd is 0.0.1 there, {batchsd.__version__} here; install the same everywhere"


HERE = """
from pathlib import Path
from batchsd import Score, hookimpl

@hookimpl
def register_scores():
    return {"file_here": Score.of(lambda requests, pictures: [Path(__file__).exists()] * len(pictures))}
"""


def test_a_plugin_of_one_file_works_where_the_file_is_not(net: Net, tmp_path: Path) -> None:
    """Its text travels with the recipe; each machine says whether it sees the file. Its hash is a fact of the plan."""
    folder, output = tmp_path / "mine", tmp_path / "out"
    folder.mkdir()
    (folder / "mine.py").write_text(HERE.replace("Path(__file__).exists()", "float(Path(__file__).exists())"))
    asked = [f'plugins=["{folder}/mine.py"]', 'output.scores=["file_here"]']
    with net.other.instead(folder):
        with net.driver(output, *(word for text in asked for word in ("--set", text))) as process:
            process.ends(0)
    check_every_row_once(output)
    hosts = {marker["shard"]: marker["facts"]["host"] for marker in markers(output)}
    assert set(hosts.values()) == {net.head.name, net.other.name}
    for shard, host in hosts.items():
        (file,) = output.glob(f"data/train-{shard:05d}-of-*.parquet")
        assert set(pq.read_table(file)["file_here"].to_pylist()) == {float(host == net.head.name)}
    plan = (output / "__batchsd" / "plans" / "0001.json").read_text()
    assert hashlib.sha256((folder / "mine.py").read_bytes()).hexdigest() in plan


def test_the_quickstart_over_both_of_which_one_dies(net: Net, tmp_path: Path) -> None:
    """The last test: nobody brings the other machine back."""
    output = tmp_path / "out"
    with net.driver(output) as process:
        process.until(lambda: len({host for host, _ in who_drew(output)}) == 2)
        net.other.die()
        said = process.ends(0)
    print(said, who_drew(output))
    assert "the worker's node is gone" in said and "drawn alone" not in said
    assert {host for host, _ in who_drew(output)} == {net.head.name, net.other.name}
    check_every_row_once(output)


def test_the_head_dies_beside_its_driver(tmp_path: Path) -> None:
    """With it goes all that Ray knows: the driver, on the other machine, says so; a new cluster goes on."""
    output = tmp_path / "out"
    with joined() as first, first.driver(output, "--set", "input.repeat=8", on=first.other) as process:
        process.until(lambda: len(markers(output)) > 2)
        first.head.die()
        began = time.monotonic()
        said = process.ends(3)
    print(f"{time.monotonic() - began:.0f} s after the head's death:\n{said}")
    assert f"Ray's head at {first.head.address}:{PORT} has not answered for" in said and "Traceback" not in said
    assert read_status(str(output))["reason"] in said
    done = len(markers(output))
    with joined() as second, second.driver(output, "--set", "input.repeat=8") as process:
        said = process.ends(0)
    assert 0 < done < 48 and f"384 pictures in 48 shards, {8 * done} done" in said
    check_every_row_once(output, repeat=8)
