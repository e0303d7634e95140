"""Conditioned rows of whole size against diffusers' pipelines, one library in memory at a time.

`pytest -m heavy tests/tasks -s`: random weights in SD1.5's exact configs of 4, 9 and 8 input channels, 4.3 GB each.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tasks.whole import CHECKPOINTS


def run(function: str, *arguments: object) -> dict[str, Any]:
    """What that function of `whole` printed last, as JSON, called in a process of its own."""
    code = f"import sys\nfrom tests.tasks.whole import {function}\n{function}(*sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {}


@pytest.mark.heavy
@pytest.mark.parametrize("channels", CHECKPOINTS)
def test_conditioned_pictures_of_whole_size_equal_diffusers(tmp_path: Path, channels: int) -> None:
    try:
        run("make", channels, tmp_path)
        found = run("measure", channels, tmp_path)
    finally:
        shutil.rmtree(tmp_path)  # 4.3 GB, which pytest would keep for three more runs
    print("", channels, *found.items(), sep="\n")
    for facts in found.values():
        assert facts["error"] <= 1 / 255 + 1e-6
        assert facts["deviation"] > 0.01, "flat pictures are all equal"
        assert facts["peak GB"] < facts["weights GB"] + 2.5
