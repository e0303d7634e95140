"""Rows tried without weights. The oracle: the loaded model's own facts, and what the engine says of the same rows."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

import batchsd
from batchsd import plugins
from batchsd.images import looked_at, rgb
from batchsd.model.checkpoint import load
from batchsd.rehearsal import Hollow, hollow, kind_of, rehearsal
from batchsd.types import ModelFacts, Request, RowError

ASSETS = Path(batchsd.__file__).parent / "assets"
TASKS = plugins.build((), Path()).tasks


@pytest.mark.parametrize("name", ["tiny-scenes", "tiny-scenes-depth"])
def test_headers_say_what_the_model_says(name: str) -> None:
    model, found = load(ASSETS / name, "float32", "cpu"), hollow(ASSETS / name)
    facts: ModelFacts = found  # it is one, to mypy too
    assert facts is found
    for field in fields(Hollow):
        expected = model.depth is not None if field.name == "depth" else getattr(model, field.name)
        assert getattr(found, field.name) == expected, field.name


def picture(width: int, height: int, orientation: int = 1) -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (width, height), "red").save(file, "JPEG", exif=exif)
    return file.getvalue()


def row(task: str, **inputs: Any) -> Request:
    seen = {name: looked_at(name, value, 1) if isinstance(value, bytes) else value for name, value in inputs.items()}
    return Request("r", 0, 0, "a cube", None, 1, 20, 5.0, None, None, "euler", task, seen, pa.table({}))


GOOD = picture(64, 64)
ROWS: dict[str, tuple[Request, str | None]] = {
    "text": (row("text"), None),
    "image": (row("image", init_image=GOOD, strength=0.5), None),
    "no image": (row("image", strength=0.5), "init_image: null"),
    "strength": (row("image", init_image=GOOD, strength=7.0), "strength: '7.0'"),
    "resize": (row("image", init_image=GOOD, resize="squash"), "resize: 'squash'"),
    "tiny": (row("image", init_image=picture(9, 9)), "must be 16 to 4096"),
    "another checkpoint's": (row("depth", init_image=GOOD), "task 'depth' is for checkpoints"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_task_refuses_as_it_will(name: str) -> None:
    request, expected = ROWS[name]
    said = rehearsal(hollow(ASSETS / "tiny-scenes"), TASKS)(request)
    assert said is None if expected is None else expected in (said or "")


def test_a_depth_row_needs_a_map_only_where_nothing_estimates() -> None:
    facts = hollow(ASSETS / "tiny-scenes-depth")
    request = row("depth", init_image=GOOD)
    assert rehearsal(facts, TASKS)(request) is None
    without = Hollow(**{f.name: getattr(facts, f.name) for f in fields(Hollow)} | {"depth": False})
    assert "no depth estimator" in (rehearsal(without, TASKS)(request) or "")


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_blank_lies_as_the_picture_will(orientation: int) -> None:
    content = picture(48, 32, orientation)
    assert rgb(looked_at("init_image", content, 1)).size == rgb(content).size


def test_rows_of_one_kind_are_tried_once_and_slips_are_left_to_the_run() -> None:
    calls: list[Request] = []

    def judged(raises: Callable[[], Exception]) -> str | None:
        class Task:
            columns = ("size",)

            def __call__(self, request: Request, model: ModelFacts, generator: Any) -> Any:
                calls.append(request)
                raise raises()

        judge = rehearsal(hollow(ASSETS / "tiny-scenes"), {"mine": Task()})
        found = {judge(row("mine", size=1)), judge(row("mine", size=1))}
        assert len(found) == 1
        return found.pop()

    assert judged(lambda: RowError("bad_input", "no")) == "no"
    assert judged(lambda: KeyError("a column that does not travel")) is None
    assert len(calls) == 2
    assert kind_of(row("mine", size=1)) != kind_of(row("mine", size=2))
