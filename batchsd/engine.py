"""Requests -> Records, with one model: what a row needs before it walks, and what is made of it after.

    (task, text states) -> Lanes of the row's size -> latents -> VAE -> picture -> file bytes

In which order rows go is `flow`'s, what becomes of their latents `pictures`'. The engine never asks which task or
sampler it serves.
Shapes: B rows, C H W latent size, T tokens, D context width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from threading import RLock
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from batchsd.backends import BACKENDS
from batchsd.batch_size import measured_lanes
from batchsd.beside import at_once, beside
from batchsd.diffusion.builtin import resolve
from batchsd.diffusion.program import Program, still
from batchsd.diffusion.schedule import NoiseSchedule
from batchsd.diffusion.scheduler import Scheduler
from batchsd.flow import Flow
from batchsd.intake import Item
from batchsd.lanes import Lanes, Row
from batchsd.meter import Meter
from batchsd.model.checkpoint import Model
from batchsd.network import Group, Network, device_is_dead, give_back, out_of_memory, row_error
from batchsd.pictures import Pictures
from batchsd.scores import Verdict, Verdicts
from batchsd.types import Conditioning, Record, Request, RowError, Shard, Task, UsageError

_TEXTS_KEPT = 256 * 2**20  # bytes of text states: 1,000 texts of SD 1.5, or 12 of 20,000 letters in chunks
_TEXT_BATCH = 32


class Prompts(Protocol):
    """A way to read prompts: texts -> states (T, D) and pooled (P,) each; a text that is None becomes zeros."""

    def __call__(self, texts: Sequence[str | None]) -> Sequence[tuple[Tensor, Tensor | None]]: ...

    def tokens_cut(self, text: str) -> int: ...


@dataclass(frozen=True)
class Settings:
    """How the engine works: lanes a network call (0: measured, a latent size), pictures a VAE call, encoder threads.

    `deterministic`: a row's bytes do not depend on its company. Every network call of a group then has one shape
    (`lanes` must be given), filled up; texts and pictures go one by one, the one shape that needs no filling.
    """

    lanes: int = 0
    decode_batch: int = 8
    encode_threads: int = 2
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, ...] = ()
    scheduler_options: Mapping[str, Any] = field(default_factory=dict)
    deterministic: bool = False
    backend: str = "eager"


class Engine:
    """Draws rows with one model. `encode` turns a uint8 H W 3 array into (file bytes, extension)."""

    def __init__(
        self,
        model: Model,
        *,
        schedulers: Mapping[str, Scheduler],
        tasks: Mapping[str, Task],
        encode: Callable[[np.ndarray], tuple[bytes, str]],
        settings: Settings = Settings(),  # noqa: B008 (frozen)
        prompts: Prompts | None = None,
        judge: Verdicts | None = None,
    ) -> None:
        self.model = model
        self.prompts = prompts  # instead of the model's own reading of a prompt: weights, chunks
        self.judge = judge  # the job's scores and filters
        self.schedulers = schedulers
        self.tasks = tasks
        self.encode = encode
        self.settings = settings
        self.schedule = NoiseSchedule.from_config(model.scheduler_config)
        self.meter = Meter()
        backend = BACKENDS[settings.backend]
        self.alone = RLock()  # held by whoever decodes, and by what is tried again with the device to itself
        self.network = Network(model, self._lanes_for, settings.deterministic, self.meter, backend, self.alone)
        self.decode_batch = 1 if settings.deterministic else settings.decode_batch  # less where memory is short
        self.overlap = model.device.type == "cuda"  # a CPU decodes in place: it has nothing to overlap with
        self._texts: OrderedDict[str | None, tuple[Tensor, Tensor | None]] = OrderedDict()  # states, pooled

    def generate(self, shards: Iterable[Item]) -> Iterator[tuple[Shard, Record]]:
        """Every row of every shard as a finished record, in the order in which they finish.

        At most two shards are open at a time. The iterable may yield None for "nothing at hand just now": rows
        already pulled then go on without waiting.
        """
        decoding = beside(self.device) if self.overlap else at_once()
        with ThreadPoolExecutor(self.settings.encode_threads, "encode") as encoders, decoding as decoder:
            pictures = Pictures(self, encoders, decoder, self.model.scale_factor)
            yield from Flow(self, shards, pictures).run()

    def condition(self, shard: Shard, request: Request) -> Row:
        """The row ready for the lanes, but for its text states. Raises `RowError`, whatever goes wrong."""
        if request.error is not None:
            raise request.error
        try:
            return self._conditioned(shard, request)
        except RowError as error:
            if error.status != "oom":
                raise
        with self.alone:  # what others decode meanwhile is not its fault
            give_back(self.device)
            return self._conditioned(shard, request)

    def _conditioned(self, shard: Shard, request: Request) -> Row:
        generator = torch.Generator().manual_seed(request.seed)
        try:
            conditioning = self.tasks[request.task](request, self.model, generator)
            self._check_channels(request, conditioning)
            if conditioning.begin >= request.steps:
                program = still()
            else:
                program = self.program(request.scheduler, request.steps, conditioning.begin)
            if self.settings.guidance_interval:
                conditioning = within(conditioning, self.settings.guidance_interval)
            weights = weights_by_call(conditioning, program)
        except RowError:
            raise
        except UsageError as error:
            raise RowError("bad_input", str(error)) from None
        except Exception as error:  # a plugin's slip is this row's failure, not the job's
            if out_of_memory(error):
                raise row_error(error) from error
            raise RowError("error", f"task {request.task!r}: {type(error).__name__}: {error}") from error
        return Row(shard, request, conditioning, program, generator, weights)

    def program(self, name: str, steps: int, begin: int = 0) -> Program:
        """The table of a named scheduler; the job's options reach the schedulers that have them."""
        scheduler = resolve(name, self.model.scheduler_config, self.schedulers)
        known = scheduler.options
        options = {k: v for k, v in self.settings.scheduler_options.items() if k in known}
        return scheduler.program(self.schedule, steps, begin, **options)

    def _check_channels(self, request: Request, conditioning: Conditioning) -> None:
        height, width = conditioning.noise_CHW.shape[1:]
        for branch in conditioning.branches:
            extra = 0 if branch.channels_CHW is None else branch.channels_CHW.shape[0]
            if extra != self.model.extra_channels:
                raise RowError(
                    "bad_input",
                    f"task {request.task!r} gives the network {extra} extra channels, "
                    f"this checkpoint takes {self.model.extra_channels}",
                )
            if branch.channels_CHW is not None and branch.channels_CHW.shape[1:] != (height, width):
                raise ValueError(f"channels of {tuple(branch.channels_CHW.shape)} for {height}x{width} latents")

    def group(self, row: Row) -> Group:
        """The rows with which it may share a batch. Its contexts must be there."""
        lengths = {len(context) for context in row.contexts}
        return Group(row.size, tuple(sorted(lengths)) if self.settings.deterministic else ())

    @property
    def device(self) -> torch.device:
        return self.model.device

    def capacity(self, group: Group) -> int:
        """Lanes a network call, as far as is known by now."""
        return self.network.capacity(group)

    def new_lanes(self, group: Group) -> Lanes:
        return Lanes(group, self.device, self.network, self.capacity, self.settings.guidance_rescale)

    def _lanes_for(self, group: Group) -> int:
        return self.settings.lanes or measured_lanes(self.model, group.size)

    def tokens_cut(self, request: Request) -> int | None:
        """Tokens of the row's prompt that the network does not see; None where the prompt was refused."""
        if request.error is not None and request.error.status == "bad_input":
            return None
        return (self.prompts or self.model.text).tokens_cut(request.prompt)

    def add_contexts(self, rows: Iterable[Row]) -> Mapping[Row, RowError]:
        """Gives rows their text states, and what else the network is told; equal texts are encoded once.

        Gives back the rows that have none, because a text of theirs cannot be encoded.
        """
        rows = list(rows)
        wanted = dict.fromkeys(branch.prompt for row in rows for branch in row.conditioning.branches)
        new = [text for text in wanted if text not in self._texts]
        refused: dict[str | None, RowError] = {}
        most = 1 if self.settings.deterministic else _TEXT_BATCH
        with self.meter.stage("text"):
            for i in range(0, len(new), most):
                refused |= self._encode(new[i : i + most])
        failed: dict[Row, RowError] = {}
        for row in rows:
            branches = row.conditioning.branches
            if at_fault := [branch.prompt for branch in branches if branch.prompt in refused]:
                failed[row] = refused[at_fault[0]]
                continue
            row.contexts = [self._texts[branch.prompt][0] for branch in branches]
            row.added = [{**self._told(row, branch.prompt), **branch.added} for branch in branches]
        for text in wanted:
            if text in self._texts:
                self._texts.move_to_end(text)
        held = sum(states_TD.nbytes for states_TD, _ in self._texts.values())
        while held > _TEXTS_KEPT:
            held -= self._texts.popitem(last=False)[1][0].nbytes
        return failed

    def _encode(self, texts: Sequence[str | None], again: bool = False) -> dict[str | None, RowError]:
        """Adds them to the texts that are kept; what does not fit is halved. Gives those that cannot be encoded."""
        try:
            self._texts.update(zip(texts, self._encoded(texts), strict=True))
            return {}
        except Exception as error:
            if device_is_dead(error):
                raise
            found = row_error(error, "the text encoder")
        if again and len(texts) == 1:
            return {texts[0]: found}
        half = len(texts) // 2
        failed: dict[str | None, RowError] = {}
        with self.alone:
            give_back(self.device)
            for part in filter(None, (texts[:half], texts[half:])):
                failed |= self._encode(part, again=True)
        return failed

    def _told(self, row: Row, prompt: str | None) -> dict[str, Tensor]:
        """What SDXL is told beside the text states: the pooled text and the picture's size."""
        pooled_P = self._texts[prompt][1]
        if not self.model.takes_sizes or pooled_P is None:
            return {}
        height, width = (side * self.model.scale_factor for side in row.size[1:])
        return {"text_embeds": pooled_P, "time_ids": self.model.time_ids(height, width)}

    def _encoded(self, texts: Sequence[str | None]) -> list[tuple[Tensor, Tensor | None]]:
        """States (T, D) and pooled (P,) of each text."""
        if self.prompts is not None:
            return list(self.prompts(texts))
        states_BTD, pooled_BP = self.model.encode_prompts(texts)
        pooled = [None] * len(texts) if pooled_BP is None else list(pooled_BP)
        return list(zip(states_BTD, pooled, strict=True))

    def decode(self, latents_BCHW: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Scaled latents -> uint8 pictures (B, H, W, 3), rounded as diffusers rounds; and which were finite (B,)."""
        with self.alone, self.meter.stage("vae"):
            pictures_B3HW = self.model.decode(latents_BCHW)
            pixels = (pictures_B3HW.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).cpu().numpy()
            return pixels, torch.isfinite(latents_BCHW).flatten(1).all(1).cpu().numpy()

    def judged(self, requests: Sequence[Request], pictures: Sequence[np.ndarray]) -> Sequence[Verdict]:
        """What the job's scores and filters say of finished pictures, all of one size."""
        if self.judge is None or not pictures:
            return [Verdict()] * len(pictures)
        with self.meter.stage("scores"):
            return self.judge(requests, pictures)


def within(conditioning: Conditioning, interval: Sequence[float]) -> Conditioning:
    """Guidance only where low < sigma <= high; elsewhere the last branch, which has every condition, alone.

    From Kynkaanniemi et al., 2024; sigma is k-diffusion's.
    """
    low, high = interval
    alone = (0.0,) * (len(conditioning.branches) - 1) + (1.0,)
    guided = conditioning.weights
    return replace(conditioning, weights=lambda sigma: guided(sigma) if low < sigma <= high else alone)


def weights_by_call(conditioning: Conditioning, program: Program) -> list[tuple[float, ...]]:
    """The branches' weights at each call of the walk. Raises ValueError where they are no such thing."""
    found = [tuple(map(float, conditioning.weights(float(sigma)))) for sigma in program.call_sigma]
    count = len(conditioning.branches)
    if any(len(weights) != count or not any(weights) for weights in found):
        raise ValueError(f"needs {count} weights at every sigma, not all of them 0")
    return found
