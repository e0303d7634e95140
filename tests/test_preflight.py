"""What nodes see, compared. The oracle: worlds made different on purpose, one thing at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchsd.job import load
from batchsd.preflight import Sight, check_nodes, look
from batchsd.prepare import prepare
from batchsd.recipe import Recipe, versions
from batchsd.types import UsageError


@pytest.fixture
def recipe(tmp_path: Path, checkpoint: Path) -> Recipe:
    pq.write_table(pa.table({"prompt": ["a"] * 3}), tmp_path / "prompts.parquet")
    (tmp_path / "job.toml").write_text(
        f'[input]\nmanifest = "prompts.parquet"\n[model]\npath = "{checkpoint}"\n[output]\nuri = "out"\n'
    )
    return prepare(load(tmp_path / "job.toml", (), {}), 1, False)[0].recipe


def nodes(*others: Callable[[str], Sight]) -> Callable[[Callable[[], Sight]], Mapping[str, Sight]]:
    """Node 0 is as the driver; each other looks by itself, given the nonce's name."""

    def everywhere(call: Callable[[], Sight]) -> Mapping[str, Sight]:
        name = call.args[1]  # type: ignore[attr-defined]
        return {"10.0.0.0": call()} | {f"10.0.0.{i + 1}": other(name) for i, other in enumerate(others)}

    return everywhere


def with_model(recipe: Recipe, path: str) -> Recipe:
    model = recipe.job.model.model_copy(update={"path": path})
    return replace(recipe, job=recipe.job.model_copy(update={"model": model}))


def test_equal_worlds_pass_and_leave_nothing(recipe: Recipe) -> None:
    assert list(check_nodes(recipe, nodes(lambda name: look(recipe, name)))) == ["10.0.0.0", "10.0.0.1"]
    assert [path for path in Path(recipe.uri).rglob("*") if path.is_file()] == []


def test_an_output_on_the_nodes_own_disk_is_found(recipe: Recipe, tmp_path: Path) -> None:
    elsewhere = replace(recipe, uri=str(tmp_path / "another disk"))
    with pytest.raises(UsageError) as caught:
        check_nodes(recipe, nodes(lambda name: look(elsewhere, name)))
    (line,) = str(caught.value).splitlines()[1:]
    assert line.strip().startswith("node 10.0.0.1: ") and "output.uri" in line and recipe.uri in line
    assert [path for path in Path(recipe.uri).rglob("*") if path.is_file()] == []


def test_another_or_no_checkpoint_is_found(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "model" / "unet").mkdir(parents=True)
    (tmp_path / "model" / "unet" / "config.json").write_text("{}")
    none, other = with_model(recipe, "/none/x"), with_model(recipe, str(tmp_path / "model"))
    with pytest.raises(UsageError) as caught:
        check_nodes(recipe, nodes(lambda name: look(none, name), lambda name: look(other, name)))
    absent, differs = str(caught.value).splitlines()[1:]
    assert "node 10.0.0.1" in absent and "no file or folder /none/x" in absent
    assert "node 10.0.0.2" in differs and "another checkpoint there" in differs


def test_a_manifest_that_is_not_there_is_found(recipe: Recipe, tmp_path: Path) -> None:
    def after_it_went(name: str) -> Sight:
        (tmp_path / "prompts.parquet").unlink()
        return look(recipe, name)

    with pytest.raises(UsageError, match="prompts.parquet: not there"):
        check_nodes(recipe, nodes(after_it_went))


def test_other_versions_are_named(recipe: Recipe) -> None:
    def older(name: str) -> Sight:
        return replace(look(recipe, name), versions=versions() | {"torch": "2.0.0"})

    with pytest.raises(UsageError, match=r"node 10\.0\.0\.1: torch is 2\.0\.0 there, "):
        check_nodes(recipe, nodes(older))
