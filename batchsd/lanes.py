"""Rows of one latent size that walk together: one network call a step for all of them.

    network outputs a lane -> weighted sum a row -> guidance rescale -> the row's own table line -> blend

A lane is one evaluation of the network in the batch; a row holds as many as its conditioning has branches. Each
row has its own program, position and generator, so samplers, step counts and guidance mix freely.
Shapes: R rows, L lanes, B branches of a row, C H W latent size, T tokens, D context width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from batchsd.diffusion.guidance import rescaled, weighted_sum
from batchsd.diffusion.program import HISTORY, NOISES, Lines, Program, along, gather, update
from batchsd.model.checkpoint import Model
from batchsd.types import Blend, Conditioning, Request, Shard


@dataclass(eq=False)
class Row:
    """A row on its way: what it asks, what the network is told, and where it stands."""

    shard: Shard
    request: Request
    conditioning: Conditioning
    program: Program
    generator: torch.Generator
    contexts: list[Tensor] = field(default_factory=list)
    position: int = 0

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(self.conditioning.noise_CHW.shape)

    @property
    def lanes(self) -> int:
        return len(self.conditioning.branches)

    def start(self) -> Tensor:
        """The latents that the walk starts from, float32 on the CPU."""
        noise, clean, program = self.conditioning.noise_CHW, self.conditioning.clean_CHW, self.program
        if clean is None:
            return program.init_noise * noise
        return program.init_alpha * clean + program.init_sigma * noise


class Lanes:
    """The batch of one latent size. `admit` rows while there is room, `step`, take what is finished."""

    def __init__(self, model: Model, size: Sequence[int], capacity: int, guidance_rescale: float = 0.0) -> None:
        self.model = model
        self.capacity = capacity
        self.guidance_rescale = guidance_rescale
        self.rows: list[Row] = []
        self.x_RCHW = torch.zeros(0, *size, device=model.device)
        self.before_RCHW = self.x_RCHW
        self.history_RhCHW = torch.zeros(0, HISTORY, *size, device=model.device)

    def has_room_for(self, row: Row) -> bool:
        """Whether the row's lanes are free. A row wider than the whole batch walks alone."""
        return not self.rows or sum(r.lanes for r in self.rows) + row.lanes <= self.capacity

    def admit(self, rows: Sequence[Row]) -> None:
        """Puts rows into the batch, their contexts encoded."""
        starts = torch.stack([row.start() for row in rows]).to(self.x_RCHW)
        self.rows += rows
        self.x_RCHW = torch.cat([self.x_RCHW, starts])
        self.before_RCHW = torch.cat([self.before_RCHW, torch.zeros_like(starts)])
        fresh = self.history_RhCHW.new_zeros(len(rows), *self.history_RhCHW.shape[1:])
        self.history_RhCHW = torch.cat([self.history_RhCHW, fresh])

    @torch.no_grad()
    def step(self) -> list[tuple[Row, Tensor]]:
        """One network call for every row here; the rows that are finished leave, with their latents."""
        lines = gather([r.program for r in self.rows], [r.position for r in self.rows], self.model.device)
        guided_RCHW = self._guided(lines)
        self.x_RCHW, self.before_RCHW, self.history_RhCHW = update(
            lines, self.x_RCHW, self.before_RCHW, self.history_RhCHW, guided_RCHW, self._noise()
        )
        for i, row in enumerate(self.rows):
            if row.conditioning.blend is not None:
                self.x_RCHW[i] = blended(self.x_RCHW[i], row.conditioning.blend, lines, i)
            row.position += 1
        return self._leave()

    def drop(self) -> list[Row]:
        """Empties the batch and gives its rows back, as after a failure that belongs to no single row."""
        rows, self.rows = self.rows, []
        self._keep([])
        return rows

    def _guided(self, lines: Lines) -> Tensor:
        """The network's outputs, weighted and summed a row: (R, C, H, W) in float32."""
        places: list[list[int]] = []
        weights_RB: list[list[float]] = []
        row_of_lane: list[int] = []
        contexts: list[Tensor] = []
        extras: list[Tensor] = []
        for i, row in enumerate(self.rows):
            weights = list(row.conditioning.weights(float(row.program.call_sigma[row.position])))
            used = [b for b, weight in enumerate(weights) if weight != 0]
            first = len(row_of_lane)
            places.append([first + used.index(b) if b in used else first for b in range(len(weights))])
            weights_RB.append(weights)
            row_of_lane += [i] * len(used)
            contexts += [row.contexts[b] for b in used]
            channels = [row.conditioning.branches[b].channels_CHW for b in used]
            extras += [each for each in channels if each is not None]
        x_LCHW = (along(lines.in_scale, self.x_RCHW) * self.x_RCHW)[row_of_lane]
        if extras:
            x_LCHW = torch.cat([x_LCHW, torch.stack(extras).to(x_LCHW)], dim=1)
        out_LCHW = self.model.unet(
            x_LCHW.to(self.model.dtype, memory_format=torch.channels_last),
            lines.timestep[row_of_lane],
            torch.stack(contexts),
        ).float()
        device = self.model.device
        lanes_RB, factors_RB = _rectangle(places, weights_RB)
        guided_RCHW = weighted_sum(out_LCHW, lanes_RB.to(device), factors_RB.to(device))
        if self.guidance_rescale > 0:
            full = out_LCHW[[lanes[-1] for lanes in places]]  # the last branch is the one with every condition
            strength_R = torch.full((len(self.rows),), self.guidance_rescale, device=device)
            guided_RCHW = rescaled(guided_RCHW, full, strength_R)
        return guided_RCHW

    def _noise(self) -> Tensor | None:
        """What this call's lines draw, each row from its own generator: (R, 2, C, H, W), None where no row draws."""
        draws = [int(row.program.draws[row.position]) for row in self.rows]
        if not any(draws):
            return None
        noise = torch.zeros(len(self.rows), NOISES, *self.x_RCHW.shape[1:])
        for i, row in enumerate(self.rows):
            for j in range(draws[i]):
                noise[i, j] = torch.randn((1, *row.size), generator=row.generator)[0]
        return noise.to(self.model.device)

    def _leave(self) -> list[tuple[Row, Tensor]]:
        stay = [i for i, row in enumerate(self.rows) if row.position < len(row.program)]
        if len(stay) == len(self.rows):
            return []
        done = [(row, self.x_RCHW[i].clone()) for i, row in enumerate(self.rows) if i not in set(stay)]
        self.rows = [self.rows[i] for i in stay]
        self._keep(stay)
        return done

    def _keep(self, stay: list[int]) -> None:
        index = torch.tensor(stay, dtype=torch.long, device=self.model.device)
        self.x_RCHW = self.x_RCHW[index]
        self.before_RCHW = self.before_RCHW[index]
        self.history_RhCHW = self.history_RhCHW[index]


def _rectangle(places: list[list[int]], weights: list[list[float]]) -> tuple[Tensor, Tensor]:
    """Lists of uneven length as (R, B) tensors; what is added has weight 0 on one of the row's own lanes."""
    most = max(len(each) for each in places)
    lanes = [each + each[:1] * (most - len(each)) for each in places]
    return torch.tensor(lanes), torch.tensor([each + [0.0] * (most - len(each)) for each in weights])


def blended(x_CHW: Tensor, blend: Blend, lines: Lines, row: int) -> Tensor:
    """The kept part at the level that the call reached, the drawn part as it is."""
    mask, clean, noise = (value.to(x_CHW) for value in (blend.mask_1HW, blend.clean_CHW, blend.noise_CHW))
    return mask * x_CHW + (1 - mask) * (lines.alpha[row] * clean + lines.sigma[row] * noise)
