"""The U-Net as lanes see it: any number of evaluations in, as many network calls as the device has room for.

    lanes -> calls of at most `capacity` lanes -> outputs a lane

A call that does not fit into memory is halved, for good; one that raises is halved until the lane at fault stands
alone, and only its row fails. A lane for which there is no memory even so is tried once more with the device to
itself: what the VAE decodes meanwhile is not its fault. Nothing of a row moves here, so a call can be tried again.
Shapes: R rows, L lanes, C H W latent size, T tokens, D context width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from batchsd.backends import BACKENDS, Backend, whole
from batchsd.diffusion.walk import sent
from batchsd.meter import Meter
from batchsd.model.checkpoint import Model
from batchsd.types import RowError, UsageError

_DEVICE_ERRORS = (torch.AcceleratorError,) if hasattr(torch, "AcceleratorError") else ()  # torch < 2.8: RuntimeError


@dataclass(frozen=True)
class Group:
    """Rows that can share a batch: one latent size (C, H, W).

    `lengths` are the context lengths that occur in it, where that must not depend on the company; else empty.
    """

    size: tuple[int, ...]
    lengths: tuple[int, ...] = ()

    @property
    def area(self) -> int:
        return self.size[-2] * self.size[-1]


@dataclass(frozen=True, eq=False)
class Lane:
    """One evaluation: the row's place in the batch, and what the network is told: text states, input channels
    beside the latents, and added conditions by diffusers' names.
    """

    row: int
    context_TD: Tensor
    channels_CHW: Tensor | None = None
    added: Mapping[str, Tensor] = field(default_factory=dict)


Evaluate = Callable[[Group, Tensor, Tensor, Sequence[Lane]], tuple[Tensor, dict[int, RowError]]]
"""(group, scaled latents R C H W, timesteps R, lanes) -> outputs L C H W in float32, and the rows that failed."""


class Network:
    """Evaluates lanes. `lanes_for` gives the lanes a call that a group begins with.

    `fixed`: every call of a group has the same shape, filled up with zeros, so that a lane's numbers do not depend
    on how many others there are.
    """

    def __init__(
        self,
        model: Model,
        lanes_for: Callable[[Group], int],
        fixed: bool,
        meter: Meter,
        backend: Backend = BACKENDS["eager"],
        alone: AbstractContextManager[object] | None = None,
    ) -> None:
        self.model = model
        self.unet = backend.prepare(model.unet)
        self.batch = whole if fixed else backend.batch
        self.lanes_for = lanes_for
        self.fixed = fixed
        self.meter = meter
        self.alone = alone or nullcontext()  # the device without other work
        self._capacity: dict[Group, int] = {}

    def capacity(self, group: Group) -> int:
        """Lanes a call, as far as is known by now."""
        if group not in self._capacity:
            self._capacity[group] = self.lanes_for(group)
        return self._capacity[group]

    def __call__(
        self, group: Group, x_RCHW: Tensor, timestep_R: Tensor, lanes: Sequence[Lane]
    ) -> tuple[Tensor, dict[int, RowError]]:
        """See `Evaluate`. A failed row's outputs are zeros. Raises where the device is dead."""
        out_LCHW = x_RCHW.new_zeros(len(lanes), *x_RCHW.shape[1:])
        failed: dict[int, RowError] = {}
        todo = [range(len(lanes))]
        while todo:
            part, most = todo.pop(), self.capacity(group)
            if len(part) > most:
                todo += [part[most:], part[:most]]
                continue
            own = [lanes[i] for i in part]
            try:
                out_LCHW[part.start : part.stop] = self._call(group, x_RCHW, timestep_R, own)
                continue
            except Exception as error:
                if device_is_dead(error):
                    raise
                short, found = out_of_memory(error), row_error(error)
            # Here, not above: until the error is gone, it holds the call's tensors.
            if short:
                self._shrink(group, len(part))
            if len(part) > 1:
                half = len(part) // 2
                todo += [part[half:], part[:half]]
            elif not (short and self._fits_alone(out_LCHW[part.start], group, x_RCHW, timestep_R, own)):
                failed[own[0].row] = found
        return out_LCHW, failed

    def _fits_alone(self, out_CHW: Tensor, group: Group, x_RCHW: Tensor, timestep_R: Tensor, lane: list[Lane]) -> bool:
        """Whether the lane could be evaluated while nothing else is at work; then its output is in `out_CHW`."""
        with self.alone:
            give_back(x_RCHW.device)
            try:
                out_CHW.copy_(self._call(group, x_RCHW, timestep_R, lane)[0])
            except Exception as error:
                if device_is_dead(error):
                    raise
                return False
        return True

    def _call(self, group: Group, x_RCHW: Tensor, timestep_R: Tensor, lanes: Sequence[Lane]) -> Tensor:
        slots = self.capacity(group)
        batch = self.batch(len(lanes), slots)
        rows_L = sent(torch.tensor([lane.row for lane in lanes]), x_RCHW.device)
        x_LCHW = x_RCHW[rows_L]
        extras = [lane.channels_CHW for lane in lanes if lane.channels_CHW is not None]
        if extras:
            x_LCHW = torch.cat([x_LCHW, torch.stack(extras).to(x_LCHW)], dim=1)
        lengths = group.lengths or tuple({len(lane.context_TD) for lane in lanes})
        context_LTD, mask_LT = joined([lane.context_TD for lane in lanes], lengths)
        added = {
            name: filled(torch.stack([lane.added[name] for lane in lanes]), batch)
            for name in lanes[0].added
        }
        out_LCHW = self.unet(
            filled(x_LCHW, batch).to(self.model.dtype, memory_format=torch.channels_last),
            filled(timestep_R[rows_L], batch),
            filled(context_LTD, batch),
            None if mask_LT is None else filled(mask_LT, batch, True),
            added,
        )
        self.meter.called(group, group.area, len(lanes), slots)
        return out_LCHW[: len(lanes)].float()

    def _shrink(self, group: Group, lanes: int) -> None:
        """Fewer lanes from now on, after a call of that many that did not fit."""
        if self.fixed and self.capacity(group) > 1:
            raise UsageError(
                f"run.batch_size: {self.capacity(group)} lanes of {group.size[-2]}x{group.size[-1]} latents do not "
                f"fit on {self.model.device}, and run.deterministic allows no smaller batch on the way; set it to "
                f"{max(1, self.capacity(group) // 2)} (a new run: the bytes depend on it)"
            )
        give_back(self.model.device)
        self._capacity[group] = max(1, lanes // 2)


def joined(contexts: Sequence[Tensor], lengths: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Contexts (T, D) as (L, T, D) of the greatest length, and which tokens are there (L, T).

    None where all have one length: attention without a mask is faster, and its rounding is the plain one.
    """
    if len(lengths) == 1:
        return torch.stack(list(contexts)), None
    most = max(lengths)
    joined_LTD = torch.stack([filled(each, most) for each in contexts])
    tokens_L1 = sent(torch.tensor([[len(each)] for each in contexts]), joined_LTD.device)
    return joined_LTD, torch.arange(most, device=joined_LTD.device) < tokens_L1


def filled(x_L: Tensor, batch: int, value: float = 0) -> Tensor:
    """The first dimension brought to `batch`."""
    missing = batch - len(x_L)
    return torch.cat([x_L, x_L.new_full((missing, *x_L.shape[1:]), value)]) if missing > 0 else x_L


def repeatable() -> None:
    """Tells torch, for this whole process, to use no kernel whose result differs from one call to the next."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time
    torch.backends.cudnn.benchmark = False


# What torch, cuBLAS (as a "CUDA error", though nothing is broken) and cuDNN say.
_NO_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed", "allocation_failed")


def out_of_memory(error: BaseException) -> bool:
    """Whether a device, or this machine, had too little memory for a tensor."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY)


def give_back(device: torch.device) -> None:
    """Hands back memory that torch keeps for later: what is left of it in small pieces may be enough in one."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def device_is_dead(error: BaseException) -> bool:
    """Whether nothing more can come from this device: then the worker must end, whatever row it had."""
    from_device = isinstance(error, _DEVICE_ERRORS) or (type(error) is RuntimeError and "CUDA error" in str(error))
    return from_device and not out_of_memory(error)


def row_error(error: Exception, where: str = "the network") -> RowError:
    """What a row says that made the network raise all alone."""
    if out_of_memory(error):
        return RowError("oom", "too large for the device's memory, even alone; ask for a smaller height and width")
    return RowError("error", f"{where}: {type(error).__name__}: {error}")
