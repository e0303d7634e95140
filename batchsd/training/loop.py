"""One loop for every stage: draw a batch, loss, AdamW, moving average of the weights; stop and go on at will.

Everything random in step k comes from a generator seeded by (seed, k), so a run that was stopped and resumed
sees the same batches and draws as one that was not. Learning rate: linear warm-up, then half a cosine to zero.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

Loss = Callable[[torch.Generator], tuple[Tensor, Mapping[str, float]]]
"""Draws a batch with the generator and gives its loss, and figures worth logging."""


class Optimisation(BaseModel):
    """How long and how fast: `steps` batches, AdamW's rate and weight decay, the moving average's decay."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int
    batch_size: int
    learning_rate: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.01
    ema: float = 0.999
    seed: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        way = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, way)))


def train(
    module: nn.Module,
    loss: Loss,
    how: Optimisation,
    state_file: Path,
    log: Callable[[str], None],
    every_s: float = 60.0,
) -> dict[str, Tensor]:
    """Trains `module` in place and returns the moving average of its weights.

    `state_file` is written every `every_s` seconds and at the end; where it exists, training goes on from it.
    """
    optimiser = torch.optim.AdamW(
        module.parameters(), lr=how.learning_rate, weight_decay=how.weight_decay, betas=(0.9, 0.99)
    )
    average = {name: value.detach().clone() for name, value in module.state_dict().items()}
    step = _resume(state_file, module, optimiser, average)
    began, seen = time.monotonic(), step
    figures: Mapping[str, float] = {}
    module.train()
    while step < how.steps:
        for group in optimiser.param_groups:
            group["lr"] = how.rate(step)
        value, figures = loss(step_generator(how.seed, step))
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        step += 1
        # The average starts short, so that the random initial weights are soon forgotten.
        _average(average, module, min(how.ema, (1 + step) / (10 + step)))
        if time.monotonic() - began > every_s or step == how.steps:
            rate = (step - seen) * how.batch_size / (time.monotonic() - began)
            shown = "  ".join(f"{name} {figure:.4f}" for name, figure in figures.items())
            log(f"step {step}/{how.steps}  {rate:.1f} samples/s  {shown}")
            _save(state_file, module, optimiser, average, step)
            began, seen = time.monotonic(), step
    module.eval()
    return average


def step_generator(seed: int, step: int) -> torch.Generator:
    """The generator of everything random in one step."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**32)


@torch.no_grad()
def _average(average: dict[str, Tensor], module: nn.Module, decay: float) -> None:
    state = module.state_dict()
    floats = [name for name, value in state.items() if value.is_floating_point()]
    torch._foreach_lerp_([average[n] for n in floats], [state[n] for n in floats], 1 - decay)


def _save(
    file: Path, module: nn.Module, optimiser: torch.optim.Optimizer, average: dict[str, Tensor], step: int
) -> None:
    """All that is needed to go on, replaced in one move: a kill while writing leaves the former state."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    torch.save(
        {"module": module.state_dict(), "optimiser": optimiser.state_dict(), "average": average, "step": step},
        part,
    )
    os.replace(part, file)


def _resume(
    file: Path, module: nn.Module, optimiser: torch.optim.Optimizer, average: dict[str, Tensor]
) -> int:
    if not file.exists():
        return 0
    state = torch.load(file, weights_only=True)
    module.load_state_dict(state["module"])
    optimiser.load_state_dict(state["optimiser"])
    average.update(state["average"])
    return int(state["step"])
