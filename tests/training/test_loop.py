"""The training loop on a problem with a known answer, and stopped in the middle."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from batchsd.training.loop import Loss, Optimisation, step_generator, train


def line_fit(module: nn.Linear) -> Loss:
    """Points of y = 3 x - 1 with noise."""

    def loss(generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        x = torch.randn(16, 1, generator=generator)
        y = 3 * x - 1 + 0.1 * torch.randn(16, 1, generator=generator)
        value = (module(x) - y).square().mean()
        return value, {"loss": value.item()}

    return loss


def fresh() -> nn.Linear:
    torch.manual_seed(5)
    return nn.Linear(1, 1)


def test_finds_the_line(tmp_path: Path) -> None:
    module = fresh()
    how = Optimisation(steps=400, batch_size=16, learning_rate=0.05, warmup=10, weight_decay=0, ema=0.95)
    average = train(module, line_fit(module), how, tmp_path / "state", lambda line: None)
    assert average["weight"].item() == pytest.approx(3, abs=0.05)
    assert average["bias"].item() == pytest.approx(-1, abs=0.05)


class Cut(Exception):
    pass


def test_a_run_that_was_cut_off_ends_as_one_that_was_not(tmp_path: Path) -> None:
    how = Optimisation(steps=30, batch_size=16, learning_rate=0.05, warmup=5)
    whole = fresh()
    expected = train(whole, line_fit(whole), how, tmp_path / "whole", lambda line: None)

    lines: list[str] = []

    def cut_after_12(line: str) -> None:
        lines.append(line)
        if len(lines) == 12:
            raise Cut  # while step 12 is logged: step 11's state is on disk

    first = fresh()
    with pytest.raises(Cut):
        train(first, line_fit(first), how, tmp_path / "cut", cut_after_12, every_s=0)
    second = nn.Linear(1, 1)  # whatever it starts from, the state wins
    found = train(second, line_fit(second), how, tmp_path / "cut", lines.append, every_s=0)
    assert lines[12].startswith("step 12/30")
    for name in expected:
        assert torch.equal(found[name], expected[name])


def test_learning_rate() -> None:
    how = Optimisation(steps=1100, batch_size=1, learning_rate=2.0, warmup=100)
    assert how.rate(0) == pytest.approx(0.02)
    assert how.rate(100) == pytest.approx(2.0)
    assert how.rate(600) == pytest.approx(1.0)
    assert how.rate(1099) == pytest.approx(math.pi**2 / 2 * 1e-6, rel=0.01)


def test_steps_draw_apart() -> None:
    draws = {torch.randn(1, generator=step_generator(seed, step)).item() for seed in (0, 1) for step in range(50)}
    assert len(draws) == 100
