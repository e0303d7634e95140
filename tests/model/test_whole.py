"""Whole-size checkpoints against diffusers, one library in memory at a time (pytest -m heavy tests/model).

Random weights in the exact configs of SD1.5, SD2.1, SD2-depth and SD1.5-inpainting, about 4.3 GB each in float32,
and SDXL's U-Net, 10.3 GB. Each is made by diffusers in a process of its own, which writes the outputs, the folder and
the LDM file; another process loads each form with batchsd. A table is printed at the end (-s).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.model.whole import CASES, DRAWN

LINE = "{:<14} {:<16} {:>9} {:>9} {:>9} {:>9} {:>9} {:>7} {:>6}"
HEAD = LINE.format("family", "layout", "U-Net", "decode", "encode", "text", "picture", "load s", "peak")


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    """Lines of a table; errors are relative to the largest value, peak memory to the weights."""
    lines: list[str] = []
    yield lines
    print("", HEAD, *lines, sep="\n")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path)  # 9 to 21 GB, which pytest would keep for three more runs


def process(function: str, *arguments: object) -> subprocess.Popen[str]:
    room = "whole_depth" if function.endswith("_depth") else "whole"
    code = f"import sys\nfrom tests.model.{room} import {function}\n{function}(*sys.argv[1:])"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True)


def run(function: str, *arguments: object) -> dict[str, Any]:
    """What that function of `whole` printed last, as JSON, called in a process of its own."""
    done = process(function, *arguments)
    out, errors = done.communicate()
    assert done.returncode == 0, errors[-3000:]
    return json.loads(out.splitlines()[-1]) if out.strip() else {}


def line(case: str, form: str, found: dict[str, Any]) -> str:
    names = ("unet", "decode", "encode", "text", "drawn")
    errors = [f"{found['errors'][name]:.1e}" if name in found["errors"] else "" for name in names]
    return LINE.format(case, form, *errors, f"{found['seconds']:.1f}", f"{found['peak']:.3f}")


@pytest.mark.heavy
@pytest.mark.parametrize("case", CASES)
def test_whole_size_equals_diffusers(folder: Path, table: list[str], case: str) -> None:
    run("make", case, folder)
    for form in ("folder", "ldm.safetensors"):
        found = run("measure", case, folder, form)
        table.append(line(case, form, found))
        print("", case, form, found, sep="\n")
        picture = found["errors"].pop("drawn", 0)
        assert max(found["errors"].values()) < 1e-4
        assert picture <= 1 / 255 + 1e-6
        assert found["peak"] < 1.15  # times the weights
        assert case not in DRAWN or found["picture's deviation"] > 0.01, "flat pictures are all equal"
    if case == "SD1.5":
        print("two processes", two_processes(folder / "folder"))


def two_processes(checkpoint: Path) -> dict[str, float]:
    """Memory of two processes with one checkpoint over twice the weights: pages of the file are there once."""
    both = [process("share", checkpoint) for _ in range(2)]
    for each in both:
        assert each.stdout and each.stdout.readline() == "ready\n"
    told = []
    for each in both:
        assert each.stdin and each.stdout
        each.stdin.write("\n")
        each.stdin.flush()
        told.append(json.loads(each.stdout.readline()))
    for each in both:
        each.communicate("\n")
    twice = sum(each["weights"] for each in told)
    found = {name: sum(each[name] for each in told) / twice for name in ("proportional", "resident")}
    assert found["proportional"] < 0.95 * found["resident"]
    return found


@pytest.mark.heavy
def test_sdxl_unet_of_whole_size_equals_diffusers(folder: Path, table: list[str]) -> None:
    run("make_xl", folder)
    for form in ("folder", "ldm.safetensors"):
        found = run("measure_xl", folder, form)
        table.append(line("SDXL U-Net", form, found))
        print("", "SDXL U-Net", form, found, sep="\n")
        assert found["errors"]["unet"] < 1e-4
        assert found["peak"] < 1.15


@pytest.mark.heavy
def test_sd2_depth_estimates_and_draws_as_diffusers(folder: Path) -> None:
    """With its own DPT-hybrid of whole size; the map feeds a picture of 256 pixels."""
    run("make_depth", folder)
    for form in ("folder", "ldm.safetensors"):
        found = run("measure_depth", folder, form)
        print("", "SD2-depth, whole", form, found, sep="\n")
        assert found["errors"]["depth"] < 1e-4 and found["errors"]["drawn"] <= 1 / 255 + 1e-6
        assert min(found["deviations"]) > 0.01, "flat maps and pictures are all equal"
