"""The scrape configuration and the alerts, by promtool; and Prometheus itself beside a run on Ray (-m cluster)."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from runs import ROOT, SLOW, check_every_row_once, command, environment, markers, started
from s3 import free_port, wait_for

from batchsd.metrics import METRICS

FOLDER = ROOT / "infra" / "prometheus"
DISCOVERED = "/tmp/ray/prom_metrics_service_discovery.json"  # as the shipped configuration has it

# Where the extra lies on PYTHONPATH, and not in the virtual environment, nodes need that too.
ENVIRON = environment(PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))

promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed (Debian: prometheus)")


@promtool
@pytest.mark.parametrize(
    "words",
    [
        ("check", "config", FOLDER / "prometheus.yml"),
        ("check", "rules", FOLDER / "alerts.yml"),
        ("test", "rules", Path(__file__).parent / "alerts.yml"),
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_promtool_finds_nothing(words: tuple[str | Path, ...]) -> None:
    done = subprocess.run(["promtool", *map(str, words)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_ask_for_metrics_that_are_there_by_labels_that_they_have() -> None:
    text = (FOLDER / "alerts.yml").read_text()
    used = re.findall(r"ray_(batchsd_\w+)(?:\{(\w+))?", text)
    assert len(used) > 10
    for name, label in used:
        assert name in METRICS and label in ("", METRICS[name].label)


@contextmanager
def cluster_with_metrics() -> Iterator[tuple[str, Path]]:
    """A Ray of one node with its dashboard: its address, and the file in which it names its metrics ports."""
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="bray")  # short: sockets lie below it
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_worker_niceness", "0")
        for name, value in ENVIRON.items():
            patch.setenv(name, value)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": True})
        try:
            yield cluster.address, Path(folder) / "ray" / Path(DISCOVERED).name
        finally:
            cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def prometheus(folder: Path, discovered: Path) -> Iterator[Callable[[str], dict[str, float]]]:
    """The real one, with the shipped configuration; gives the way to ask it: values by the `run` or label asked for."""
    folder.mkdir()
    text = (FOLDER / "prometheus.yml").read_text()
    assert DISCOVERED in text
    (folder / "prometheus.yml").write_text(text.replace(DISCOVERED, str(discovered)).replace("15s", "2s"))
    shutil.copy(FOLDER / "alerts.yml", folder)
    url = f"http://127.0.0.1:{(port := free_port())}"
    words = ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*words, f"--web.listen-address=127.0.0.1:{port}"], cwd=folder, stderr=log)

    def ask(query: str) -> dict[str, float]:
        answer = urllib.request.urlopen(f"{url}/api/v1/query?{urllib.parse.urlencode({'query': query})}", timeout=30)
        found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        return {",".join(series["metric"].values()): float(series["value"][1]) for series in found}

    try:
        wait_for(f"{url}/-/ready")
        yield ask
    finally:
        process.kill()
        process.wait()


def until(what: Callable[[], object], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end:
            return False
        time.sleep(1)
    return True


@promtool
@pytest.mark.cluster
@pytest.mark.skipif(not find_spec("opencensus"), reason="ray[default] is not installed (pip install '.[cluster]')")
def test_prometheus_beside_a_run(tmp_path: Path) -> None:
    output = tmp_path / "pictures"
    with cluster_with_metrics() as (address, discovered):
        assert until(discovered.exists, SLOW)
        with prometheus(tmp_path / "prometheus", discovered) as ask:
            words = command(output, "--address", address, "--set", "ray.workers=2", "--set", "run.max_failed=9")
            with started(words, tmp_path / "log", ENVIRON) as process:
                process.until(lambda: ask("ray_batchsd_workers"))
                process.until(lambda: sum(ask("sum(ray_batchsd_workers)").values()) == 2)
                live = ask('{__name__=~"ray_batchsd_(running|rows_planned|workers|workers_wanted)"}')
                process.ends(0)
            check_every_row_once(output)
            done = markers(output)
            pictures = 'sum by (run) (ray_batchsd_rows_total{status="ok"})'
            began = time.monotonic()
            arrived = until(lambda: ask(pictures) == {"pictures": 48.0}, 60)
            print(live, ask(pictures), f"{time.monotonic() - began:.0f} s after the run's end")
            for name in METRICS:
                print(name, ask(f"sum by (run, status, kind, stage) (ray_{name})"))
            assert arrived
            assert ask("sum(ray_batchsd_shards_total)") == {"": len(done)}
            assert ask("sum(ray_batchsd_bytes_total)") == {"": sum(marker["bytes"] for marker in done)}
            unet = sum(marker["timings"]["unet_seconds"] for marker in done)
            assert ask('sum(ray_batchsd_stage_seconds_total{stage="unet"})')[""] == pytest.approx(unet)
            assert ask("sum(ray_batchsd_evaluations_total)/sum(ray_batchsd_lanes_total)")[""] == pytest.approx(
                sum(m["timings"]["evaluations"] for m in done)
                / sum(m["timings"]["evaluations"] / m["timings"]["occupancy"] for m in done)
            )
            assert ask('ALERTS{alertstate="firing"}') == {}
