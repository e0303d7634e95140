"""The rendered sbatch script on a real Slurm cluster of two nodes.

BATCHSD_SLURM says where: a folder whose up.sh FOLDER begins a cluster there (FOLDER/slurm.conf, down.sh FOLDER ends
it), or `here` for the one that this machine's sbatch knows.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from runs import ROOT, check_every_row_once, environment, who_drew

pytestmark = pytest.mark.cluster

LONGEST = 900.0  # seconds, of a job and its second start


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which sbatch finds its cluster."""
    scripts = os.environ.get("BATCHSD_SLURM", "")
    if not scripts or shutil.which("sbatch") is None:
        pytest.skip("BATCHSD_SLURM names no Slurm cluster, or there is no sbatch (see tests/test_slurm.py)")
    if scripts == "here":
        yield environment()
        return
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([f"{scripts}/up.sh", folder], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield environment(SLURM_CONF=str(folder / "slurm.conf"))
    subprocess.run([f"{scripts}/down.sh", folder], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


Submit = Callable[..., dict[str, str]]


@pytest.fixture
def submit(slurm: dict[str, str], tmp_path: Path) -> Iterator[Submit]:
    """Renders the quickstart, hands it in, waits for its end: what Slurm knows of it then."""
    handed_in = []

    def told(*words: str) -> str:
        done = subprocess.run(words, env=slurm, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def hand_in(nodes: int, limit: str, *options: str) -> dict[str, str]:
        render = [sys.executable, "-m", "batchsd", "infra", "slurm", str(ROOT / "jobs" / "quickstart.toml")]
        render += ["--nodes", str(nodes), "--cpus", "1", "--time-limit", limit]
        for text in ("output.uri=out", "model.device=cpu", "output.rows_per_shard=4", *options):
            render += ["--set", text]
        (tmp_path / "job.sh").write_text(told(*render))
        number = told("sbatch", "--parsable", "job.sh").strip()
        handed_in.append(number)
        end = time.monotonic() + LONGEST
        while told("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={number}").strip() in (
            "PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD"
        ):  # fmt: skip
            assert time.monotonic() < end, log(tmp_path)
            time.sleep(1)
        return dict(re.findall(r"(\w+)=(\S*)", told("scontrol", "show", "job", number)))

    yield hand_in
    for number in handed_in:
        subprocess.run(["scancel", number], env=slurm)


def log(folder: Path) -> str:
    return "\n".join(path.read_text() for path in folder.glob("quickstart-*.log"))


def test_both_nodes_draw(submit: Submit, tmp_path: Path) -> None:
    job = submit(2, "15")
    print(job["RunTime"], log(tmp_path), who_drew(tmp_path / "out"))
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "0"), log(tmp_path)
    assert len({host for host, _ in who_drew(tmp_path / "out")}) == 2
    check_every_row_once(tmp_path / "out")


SLOW = """
import time
import batchsd

@batchsd.hookimpl
def shard_done(shard, result):
    time.sleep({seconds})
"""


@pytest.mark.parametrize("nodes", [1, 2])
def test_stopped_before_its_limit_it_is_queued_again_and_finishes(nodes: int, submit: Submit, tmp_path: Path) -> None:
    """Its limit is 6 minutes, SIGUSR1 comes 3 to 4 before that; 24 shards take as long on any machine."""
    (tmp_path / "slow.py").write_text(SLOW.format(seconds=9 * nodes))
    job = submit(nodes, "6", f"ray.workers={nodes}", "input.repeat=2", 'plugins=["./slow.py"]')
    said = log(tmp_path)
    print(job["Restarts"], said, who_drew(tmp_path / "out"))
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0") and int(job["Restarts"]) >= 1, said
    assert "stopped by SIGUSR1" in said and "DUE TO TIME LIMIT" not in said
    check_every_row_once(tmp_path / "out", repeat=2)


def test_what_would_only_repeat_itself_is_not_queued_again(submit: Submit, tmp_path: Path) -> None:
    job = submit(1, "15", "model.path=/no/such/model")
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0"), log(tmp_path)
    assert "no file or folder /no/such/model" in log(tmp_path)
