"""What the README says is what the code does."""

from __future__ import annotations

import inspect
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from batchsd import hookspecs, plugins
from batchsd.cli import commands
from batchsd.diffusion.builtin import BUILTIN
from batchsd.job import check_names, load
from batchsd.recipe import names_of

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_hooks_have_the_documented_signatures() -> None:
    documented = {line for block in blocks("python") for line in block.splitlines() if re.match(r"\w+\(.*\) -> ", line)}
    hooks = {name: f for name, f in vars(hookspecs).items() if hasattr(f, "batchsd_spec")}
    signatures = set()
    for name, function in hooks.items():
        parameters = inspect.signature(function).parameters.values()
        given = ", ".join(f"{p.name}: {p.annotation}" for p in parameters)
        signatures.add(f"{name}({given}) -> {inspect.signature(function).return_annotation}")
    assert documented == signatures


def test_every_sampler_has_its_line() -> None:
    rows = set(re.findall(r"^\| `(\w+)` \| (.*) \| (\w*) \| (\d) \|$", README, re.MULTILINE))
    assert rows == {(s.name, ", ".join(s.aliases), s.diffusers, str(s.calls)) for s in BUILTIN.values()}


def test_every_command_has_its_line() -> None:
    known = dict(leaves(commands))
    documented = {}
    for line in re.findall(r"^\| `batchsd (.*?)` \|", README, re.MULTILINE):
        words = line.split()
        name = words[0] if words[0] in known else " ".join(words[:2])
        documented[name] = set(re.findall(r"--[\w-]+", line))
    options = {name: [o for p in c.params if isinstance(p, click.Option) for o in p.opts] for name, c in known.items()}
    assert documented == {name: {o for o in texts if o.startswith("--")} for name, texts in options.items()}


def leaves(group: click.Group, above: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command by its words: `run`, `infra k8s`."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, f"{above}{name} ")
        else:
            yield above + name, command


@pytest.mark.parametrize("text", blocks("toml"))
def test_example_jobs_load(text: str, tmp_path: Path) -> None:
    assert tomllib.loads(text)
    (tmp_path / "job.toml").write_text(text)
    job = load(tmp_path / "job.toml", (), {})
    named = [name.replace("-", "_") for name in job.plugins]  # the packages of plugins/, not installed, as modules
    check_names(job, "sampler.scheduler", names_of(plugins.build(named, tmp_path)).schedulers)


def test_the_example_plugin_works(tmp_path: Path) -> None:
    texts = [block for block in blocks("python") if "@hookimpl" in block]
    for i, text in enumerate(texts):
        (tmp_path / f"mine{i}.py").write_text(text)
    registry = plugins.build([f"./mine{i}.py" for i in range(len(texts))], tmp_path)
    assert set(registry.scores) == {"redness"} and set(registry.filters) == {"size"}
    assert registry.schedulers["my_euler"].program(
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, 5
    )


def test_files_that_are_named_exist() -> None:
    for name in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`((?:batchsd|tests|jobs|infra|plugins)/[\w./-]+)`", README):
        assert (ROOT / name).exists(), name


def test_no_number_is_missing() -> None:
    assert not re.search(r"@[A-Z]+@", README)
