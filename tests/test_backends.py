"""Backends: the same numbers, in few shapes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import get_args

import pytest
import torch

from batchsd.backends import BACKENDS, as_many, halves, whole
from batchsd.diffusion.builtin import BUILTIN
from batchsd.engine import Engine, Settings
from batchsd.model.checkpoint import load
from batchsd.settings import Model
from batchsd.tasks.text import TextTask


def test_a_job_may_name_all_of_them_and_no_other() -> None:
    assert set(get_args(Model.model_fields["backend"].annotation)) == BACKENDS.keys()


def test_sizes_of_calls() -> None:
    assert {halves(used, 16) for used in range(1, 17)} == {1, 2, 4, 8, 16}
    assert all(used <= halves(used, 12) <= max(2 * used - 1, 1) for used in range(1, 13)), "never half empty"
    assert [as_many(3, 16), whole(3, 16)] == [3, 16]


@pytest.mark.heavy  # half a CPU minute of compilation
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_a_compiled_network_gives_the_same_numbers(checkpoint: Path) -> None:
    """One shape only: each costs a compilation."""
    model = load(checkpoint)
    engine = Engine(
        model, schedulers=BUILTIN, tasks={"text": TextTask()}, encode=lambda picture: (b"", "raw"),
        settings=Settings(backend="compile"),
    )  # fmt: skip
    torch.manual_seed(0)
    x, t, context = torch.randn(2, 4, 4, 4), torch.tensor([999.0, 3.0]), torch.randn(2, 77, 32)
    with torch.no_grad():
        ours, theirs = engine.network.unet(x, t, context, None, {}), model.unet(x, t, context)
    assert engine.network.unet is not model.unet and engine.network.batch is halves
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
