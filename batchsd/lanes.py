"""Rows of one latent size that walk together: one network call a step for all of them.

    network outputs a lane -> weighted sum a row -> guidance rescale -> the row's own table line -> blend

A lane is one evaluation of the network in the batch; a row holds as many as it has branches of weight other than 0
at its place, and lends the rest to others. Each row has its own program, position and generator, so samplers, step
counts and guidance mix freely.
Shapes: R rows, L lanes, B branches of a row, C H W latent size, T tokens, D context width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from batchsd.diffusion.guidance import rescaled, weighted_sum
from batchsd.diffusion.program import HISTORY, NOISES, Program
from batchsd.diffusion.walk import Lines, along, gather, sent, update
from batchsd.network import Evaluate, Group, Lane
from batchsd.types import Blend, Conditioning, Request, RowError, Shard


@dataclass(eq=False)
class Row:
    """A row on its way: what it asks, what the network is told, and where it stands.

    `weights` are its branches' for each call; `contexts` their text states (T, D), `added` what else the network
    is told of them; `noise` is what its next call draws, once it is drawn.
    """

    shard: Shard
    request: Request
    conditioning: Conditioning
    program: Program
    generator: torch.Generator
    weights: Sequence[Sequence[float]]
    contexts: list[Tensor] = field(default_factory=list)
    added: list[Mapping[str, Tensor]] = field(default_factory=list)
    position: int = 0
    noise: Tensor | None = None

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(self.conditioning.noise_CHW.shape)

    @cached_property
    def evaluations(self) -> np.ndarray:
        """How many branches are evaluated in each of its calls."""
        return np.array([sum(weight != 0 for weight in weights) for weights in self.weights], dtype=int)

    @property
    def lanes(self) -> int:
        """Lanes in its next call."""
        return int(self.evaluations[self.position])

    @property
    def calls_left(self) -> int:
        return len(self.program) - self.position

    @property
    def bytes(self) -> int:
        """What it holds while it waits, but for its text states: rows share them."""
        given = self.conditioning
        tensors = [given.noise_CHW, given.clean_CHW, *(branch.channels_CHW for branch in given.branches)]
        if given.blend is not None:
            tensors += given.blend.tensors
        kept = 0 if given.kept is None else given.kept.mask_HW.nbytes + given.kept.picture_HW3.nbytes
        return kept + sum(each.nbytes for each in tensors if each is not None)

    def onto(self, device: torch.device) -> None:
        """Brings what every call needs to the device, once."""
        if device.type == "cpu":
            return

        def there(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else sent(tensor, device)

        given = self.conditioning
        blend = given.blend and Blend(*(sent(each, device) for each in given.blend.tensors))
        branches = tuple(replace(branch, channels_CHW=there(branch.channels_CHW)) for branch in given.branches)
        self.conditioning = replace(given, branches=branches, blend=blend)
        self.added = [{name: sent(each, device) for name, each in added.items()} for added in self.added]

    def start(self) -> Tensor:
        """The latents that the walk starts from, float32 on the CPU."""
        noise, clean, program = self.conditioning.noise_CHW, self.conditioning.clean_CHW, self.program
        if clean is None:
            return program.init_noise * noise
        return program.init_alpha * clean + program.init_sigma * noise

    def draw(self) -> Tensor | None:
        """The noise of its next call (2, C, H, W), None where it draws none.

        Kept until the call has succeeded: a call that fails and is tried again must not draw anew.
        """
        draws = int(self.program.draws[self.position])
        if draws and self.noise is None:
            self.noise = torch.zeros(NOISES, *self.size)
            for j in range(draws):
                self.noise[j] = torch.randn((1, *self.size), generator=self.generator)[0]
        return self.noise


@dataclass
class Stepped:
    """What a step brought: rows that are finished, with their latents, and rows that failed alone."""

    finished: list[tuple[Row, Tensor]]
    failed: list[tuple[Row, RowError]]


class Lanes:
    """The batch of one group of rows. `admit` rows while there is room, `step`, take what is finished."""

    def __init__(
        self,
        group: Group,
        device: torch.device,
        evaluate: Evaluate,
        capacity: Callable[[Group], int],
        guidance_rescale: float = 0.0,
    ) -> None:
        self.group = group
        self.device = device
        self.evaluate = evaluate
        self._capacity = capacity
        self.guidance_rescale = guidance_rescale
        self.rows: list[Row] = []
        self._phi = torch.tensor([guidance_rescale], device=device)
        self.x_RCHW = torch.zeros(0, *group.size, device=device)
        self.before_RCHW = self.x_RCHW
        self.history_RhCHW = torch.zeros(0, HISTORY, *group.size, device=device)

    @property
    def capacity(self) -> int:
        """Lanes a network call; it falls where the device's memory proved too small."""
        return self._capacity(self.group)

    @property
    def used(self) -> int:
        return sum(row.lanes for row in self.rows)

    def fits(self, row: Row) -> bool:
        """Whether there are lanes for the row in all calls to come: guidance may begin or end on the way.

        A row wider than the whole batch walks alone, in several calls.
        """
        if not self.rows:
            return True
        if self.used + row.lanes > self.capacity:
            return False
        wanted = np.zeros(max(each.calls_left for each in (*self.rows, row)), dtype=int)
        for each in (*self.rows, row):
            wanted[: each.calls_left] += each.evaluations[each.position :]
        return bool(wanted.max() <= self.capacity)

    def admit(self, row: Row) -> None:
        """Puts a row, its contexts encoded, into the batch."""
        row.onto(self.device)
        start = sent(row.start()[None], self.device)
        x = torch.cat([self.x_RCHW, start])
        before = torch.cat([self.before_RCHW, torch.zeros_like(start)])
        fresh = self.history_RhCHW.new_zeros(1, *self.history_RhCHW.shape[1:])
        history = torch.cat([self.history_RhCHW, fresh])
        self.x_RCHW, self.before_RCHW, self.history_RhCHW = x, before, history
        self.rows.append(row)

    @torch.no_grad()
    def step(self) -> Stepped:
        """One network call for every row here; the rows that are finished or failed leave.

        Where it raises, no row has moved: the step can be tried again.
        """
        lines = gather([r.program for r in self.rows], [r.position for r in self.rows], self.device)
        guided_RCHW, failed = self._guided(lines)
        x, before, history = update(
            lines, self.x_RCHW, self.before_RCHW, self.history_RhCHW, guided_RCHW, self._noise()
        )
        for i, row in enumerate(self.rows):
            if row.conditioning.blend is not None:
                x[i] = blended(x[i], row.conditioning.blend, lines, i)
        self.x_RCHW, self.before_RCHW, self.history_RhCHW = x, before, history
        for row in self.rows:
            row.position += 1
            row.noise = None
        return self._leave(failed)

    def _guided(self, lines: Lines) -> tuple[Tensor, dict[int, RowError]]:
        """The network's outputs, weighted and summed a row: (R, C, H, W) in float32; and which rows failed."""
        places: list[list[int]] = []
        weights_RB: list[list[float]] = []
        lanes: list[Lane] = []
        x_RCHW = along(lines.in_scale, self.x_RCHW) * self.x_RCHW
        for i, row in enumerate(self.rows):
            weights = list(row.weights[row.position])
            used = [b for b, weight in enumerate(weights) if weight != 0]
            first = len(lanes)
            places.append([first + used.index(b) if b in used else first for b in range(len(weights))])
            weights_RB.append(weights)
            branches = row.conditioning.branches
            lanes += [Lane(i, row.contexts[b], branches[b].channels_CHW, row.added[b]) for b in used]
        out_LCHW, failed = self.evaluate(self.group, x_RCHW, lines.timestep, lanes)
        lanes_RB, factors_RB = _rectangle(places, weights_RB)
        guided_RCHW = weighted_sum(out_LCHW, sent(lanes_RB, self.device), sent(factors_RB, self.device))
        if self.guidance_rescale > 0:
            # The last branch is the one with every condition. A row at a time: how a sum over a row is split
            # must not depend on how many rows there are.
            parts = zip(guided_RCHW.split(1), places, strict=True)
            guided_RCHW = torch.cat([rescaled(own, out_LCHW[at[-1]][None], self._phi) for own, at in parts])
        return guided_RCHW, failed

    def _noise(self) -> Tensor | None:
        """What this call's lines draw, each row from its own generator: (R, 2, C, H, W), None where no row draws."""
        drawn = [row.draw() for row in self.rows]
        if all(each is None for each in drawn):
            return None
        nothing = torch.zeros(NOISES, *self.x_RCHW.shape[1:])
        return sent(torch.stack([nothing if each is None else each for each in drawn]), self.device)

    def _leave(self, failed: dict[int, RowError]) -> Stepped:
        done = {i for i, row in enumerate(self.rows) if not row.calls_left} - failed.keys()
        if not done and not failed:
            return Stepped([], [])
        stepped = Stepped(
            [(self.rows[i], self.x_RCHW[i].clone()) for i in sorted(done)],
            [(self.rows[i], error) for i, error in failed.items()],
        )
        stay = [i for i in range(len(self.rows)) if i not in done and i not in failed]
        self.rows = [self.rows[i] for i in stay]
        index = sent(torch.tensor(stay, dtype=torch.long), self.device)
        self.x_RCHW = self.x_RCHW[index]
        self.before_RCHW = self.before_RCHW[index]
        self.history_RhCHW = self.history_RhCHW[index]
        return stepped


def _rectangle(places: list[list[int]], weights: list[list[float]]) -> tuple[Tensor, Tensor]:
    """Lists of uneven length as (R, B) tensors; what is added has weight 0 on one of the row's own lanes."""
    most = max(len(each) for each in places)
    lanes = [each + each[:1] * (most - len(each)) for each in places]
    return torch.tensor(lanes), torch.tensor([each + [0.0] * (most - len(each)) for each in weights])


def blended(x_CHW: Tensor, blend: Blend, lines: Lines, row: int) -> Tensor:
    """The kept part at the level that the call reached, the drawn part as it is."""
    mask, clean, noise = (value.to(x_CHW) for value in blend.tensors)
    return mask * x_CHW + (1 - mask) * (lines.alpha[row] * clean + lines.sigma[row] * noise)
