"""What the doctor says, of machines that are made up and of this one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from batchsd.cli import commands
from batchsd.doctor import (
    NodeFacts,
    cluster,
    device_finding,
    findings,
    installation,
    memory_finding,
    node_facts,
    output_finding,
    worst,
)
from batchsd.job import load
from batchsd.recipe import versions
from batchsd.types import InfrastructureError

GPU = ("H100", 80 * 2**30)


def facts(cuda: str = "", gpus: tuple[tuple[str, int], ...] = (), devices: int = 0) -> NodeFacts:
    return NodeFacts("box", versions(), cuda, gpus, devices)


@pytest.mark.parametrize(
    "machine, state, word",
    [
        (facts(), "ok", "no GPU"),
        (facts(devices=2), "bad", "CPU build"),
        (facts("12.8", devices=1), "bad", "sees none"),
        (facts("12.8", (GPU,), 1), "ok", "H100 80 GiB"),
    ],
)
def test_torchs_build_is_held_against_the_devices(machine: NodeFacts, state: str, word: str) -> None:
    found = device_finding(machine)
    assert found.state == state and word in found.text
    assert worst([found]) == (2 if state == "bad" else 0)


def test_this_installation_is_sound() -> None:
    found = list(findings([lambda: installation(node_facts())]))
    assert worst(found) == 0 and "torch" in found[0].text


@pytest.mark.parametrize("mode, state, word", [("open", "note", "RAY_AUTH_MODE"), ("token", "ok", "asks for a token")])
def test_nodes_are_held_against_this_one(mode: str, state: str, word: str) -> None:
    old = NodeFacts("other", versions() | {"ray": "1.0"}, "", (), 1, mode)
    found = list(cluster(lambda call: {"10.0.0.1": replace(call(), mode="token"), "10.0.0.2": old}, "10.0.0.1:6379"))
    bad = [finding.text for finding in found if finding.state == "bad"]
    assert len(bad) == 2 and all(text.startswith("node 10.0.0.2: ") for text in bad)
    assert "CPU build" in bad[0] and "ray is 1.0 there" in bad[1]
    assert found[-1].state == state and word in found[-1].text


def test_an_error_is_a_finding_with_its_code() -> None:
    def unreachable():
        raise InfrastructureError("s3://b: no answer")
        yield

    (found,) = findings([unreachable])
    assert (found.state, found.text, worst([found])) == ("bad", "s3://b: no answer", 3)


def test_an_output_is_written_and_left_as_it_was(tmp_path: Path) -> None:
    assert output_finding(str(tmp_path / "out")).state == "ok"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    (found,) = findings([lambda: iter([output_finding(str(tmp_path / "file" / "out"))])])
    assert found.state == "bad" and str(tmp_path / "file") in found.text


def test_a_job_is_looked_at_whole(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    pq.write_table(pa.table({"prompt": ["a"] * 3}), tmp_path / "prompts.parquet")
    text = f'[input]\nmanifest = "prompts.parquet"\n[model]\npath = "{checkpoint}"\n[output]\nuri = "out"\n'
    (tmp_path / "job.toml").write_text(text)
    said = CliRunner().invoke(commands, ["doctor", str(tmp_path / "job.toml"), "--address", "local"])
    assert said.exit_code == 0, said.output
    assert "manifest: 3 rows" in said.output and "can be written" in said.output and "M parameters" in said.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.toml", "prompts.parquet"]
    told = CliRunner().invoke(commands, ["doctor", str(tmp_path / "job.toml"), "--set", "input.manifest=/no/where"])
    assert told.exit_code == 2 and "BAD" in told.output

    tight = NodeFacts("box", versions(), "12.8", (("toy", 1000),), 1)
    assert memory_finding(load(tmp_path / "job.toml", (), {}), "float16", tight).state == "bad"


def test_a_cluster_from_outside_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    said = CliRunner().invoke(commands, ["doctor", "--address", "203.0.113.7:6379"])  # for documentation: nobody's
    assert said.exit_code == 2 and "none of its nodes" in said.output and "torch" in said.output
