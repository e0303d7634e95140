"""Requests -> Records: pull rows, condition, denoise in lanes, decode, encode.

    pull -> (task, text states) -> Lanes of the row's size -> latents -> VAE -> picture -> file bytes

Rows are pulled as lanes become free, from one shard into the next; each picture is handed out when its encoding,
which runs in threads beside the network, is done. The engine never asks which task or sampler it serves.
Shapes: B rows, C H W latent size, T tokens, D context width.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchsd.diffusion.builtin import resolve
from batchsd.diffusion.program import Program
from batchsd.diffusion.schedule import NoiseSchedule
from batchsd.diffusion.scheduler import Scheduler
from batchsd.lanes import Lanes, Row
from batchsd.model.checkpoint import Model
from batchsd.types import Conditioning, Record, Request, RowError, Shard, Task, UsageError

Item = tuple[Shard, Iterator[Request]] | None
"""A shard with its rows; None where none is at hand just now."""

_OPEN_SHARDS = 2  # a third would hold finished pictures back for too long
_TEXTS_KEPT = 512  # 77 x 1024 numbers each: at most 160 MB in float32
_TEXT_BATCH = 32
_NAP_S = 0.005  # between looks for the next shard, when there is nothing to draw
_ENCODINGS = 64  # pictures waiting for an encoder thread, before the network waits for them


@dataclass(frozen=True)
class Settings:
    """How the engine works, resolved: lanes a network call, pictures a VAE call, encoder threads."""

    lanes: int = 16
    decode_batch: int = 8
    encode_threads: int = 2
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, ...] = ()
    scheduler_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Meter:
    """Seconds and counts since the engine was made."""

    text_s: float = 0.0
    unet_s: float = 0.0
    vae_s: float = 0.0
    network_calls: int = 0
    evaluations: int = 0
    pictures: int = 0


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
    ) -> None:
        self.model = model
        self.schedulers = schedulers
        self.tasks = tasks
        self.encode = encode
        self.settings = settings
        self.schedule = NoiseSchedule.from_config(model.scheduler_config)
        self.meter = Meter()
        self._texts: OrderedDict[str, Tensor] = OrderedDict()

    def generate(self, shards: Iterable[Item]) -> Iterator[tuple[Shard, Record]]:
        """Every row of every shard as a finished record, in the order in which they finish.

        At most two shards are open at a time. The iterable may yield None for "nothing at hand just now": rows
        already pulled then go on without waiting.
        """
        with ThreadPoolExecutor(self.settings.encode_threads, "encode") as pool:
            yield from _Flow(self, shards, pool).run()

    def condition(self, shard: Shard, request: Request) -> Row:
        """The row ready for the lanes, but for its text states. Raises `RowError`, whatever goes wrong."""
        if request.error is not None:
            raise request.error
        generator = torch.Generator().manual_seed(request.seed)
        try:
            conditioning = self.tasks[request.task](request, self.model, generator)
            self._check_channels(request, conditioning)
            program = self.program(request.scheduler, request.steps, conditioning.begin)
            if self.settings.guidance_interval:
                conditioning = within(conditioning, self.settings.guidance_interval)
        except RowError:
            raise
        except UsageError as error:
            raise RowError("bad_input", str(error)) from None
        except Exception as error:  # a plugin's slip is this row's failure, not the job's
            raise RowError("error", f"task {request.task!r}: {type(error).__name__}: {error}") from error
        return Row(shard, request, conditioning, program, generator)

    def program(self, name: str, steps: int, begin: int = 0) -> Program:
        """The table of a named scheduler; the job's options reach the schedulers that have them."""
        scheduler = resolve(name, self.model.scheduler_config, self.schedulers)
        known = scheduler.options
        options = {k: v for k, v in self.settings.scheduler_options.items() if k in known}
        return scheduler.program(self.schedule, steps, begin, **options)

    def _check_channels(self, request: Request, conditioning: Conditioning) -> None:
        for branch in conditioning.branches:
            extra = 0 if branch.channels_CHW is None else branch.channels_CHW.shape[0]
            if extra != self.model.extra_channels:
                raise RowError(
                    "bad_input",
                    f"task {request.task!r} gives the network {extra} extra channels, "
                    f"this checkpoint takes {self.model.extra_channels}",
                )

    def add_contexts(self, rows: Iterable[Row]) -> None:
        """Gives rows their text states; equal texts are encoded once."""
        rows = list(rows)
        wanted = dict.fromkeys(branch.prompt or "" for row in rows for branch in row.conditioning.branches)
        new = [text for text in wanted if text not in self._texts]
        began = time.perf_counter()
        for i in range(0, len(new), _TEXT_BATCH):
            part = new[i : i + _TEXT_BATCH]
            self._texts.update(zip(part, self.model.encode_text(part), strict=True))
        self.meter.text_s += time.perf_counter() - began
        for row in rows:
            row.contexts = [self._texts[branch.prompt or ""] for branch in row.conditioning.branches]
        for text in wanted:
            self._texts.move_to_end(text)
        while len(self._texts) > _TEXTS_KEPT:
            self._texts.popitem(last=False)

    def decode(self, latents_BCHW: Tensor) -> np.ndarray:
        """Scaled latents -> uint8 pictures (B, H, W, 3), rounded as diffusers rounds."""
        began = time.perf_counter()
        pictures_B3HW = self.model.decode(latents_BCHW)
        pixels = (pictures_B3HW.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).cpu().numpy()
        self.meter.vae_s += time.perf_counter() - began
        return pixels


def within(conditioning: Conditioning, interval: Sequence[float]) -> Conditioning:
    """Guidance only where low < sigma <= high; elsewhere the last branch, which has every condition, alone.

    From Kynkaanniemi et al., 2024; sigma is k-diffusion's.
    """
    low, high = interval
    alone = (0.0,) * (len(conditioning.branches) - 1) + (1.0,)
    guided = conditioning.weights
    return replace(conditioning, weights=lambda sigma: guided(sigma) if low < sigma <= high else alone)


class _Flow:
    """One run of `Engine.generate`: what is waiting, walking, decoded and being encoded."""

    def __init__(self, engine: Engine, shards: Iterable[Item], pool: ThreadPoolExecutor) -> None:
        self.engine = engine
        self.pool = pool
        self.shards = iter(shards)
        self.current: tuple[Shard, Iterator[Request]] | None = None
        self.exhausted = False  # no more shards will come
        self.unfinished: dict[Shard, int] = {}  # rows pulled and not yet handed out, a shard
        self.waiting: dict[tuple[int, ...], deque[Row]] = {}
        self.lanes: dict[tuple[int, ...], Lanes] = {}
        self.latents: list[tuple[Row, Tensor]] = []
        self.done: deque[tuple[Shard, Future[Record] | Record]] = deque()

    def run(self) -> Iterator[tuple[Shard, Record]]:
        while True:
            self._pull()
            self._admit()
            busy = [lanes for lanes in self.lanes.values() if lanes.rows]
            if busy:
                self._step(max(busy, key=self._fullness))
            if len(self.latents) >= self.engine.settings.decode_batch or (self.latents and self._starved(busy)):
                self._decode()
            yield from self._finished(wait=not busy)
            if not (busy or self.latents or self.done or self._any_waiting()):
                if self.exhausted:
                    return
                time.sleep(_NAP_S)

    # -- pulling

    def _pull(self) -> None:
        """Takes rows until twice the lanes are spoken for, or nothing more is at hand."""
        wanted = 2 * self.engine.settings.lanes
        held = sum(row.lanes for rows in self.waiting.values() for row in rows)
        fresh: list[Row] = []
        while held < wanted and (found := self._next_request()) is not None:
            shard, request = found
            self.unfinished[shard] = self.unfinished.get(shard, 0) + 1
            try:
                row = self.engine.condition(shard, request)
            except RowError as error:
                self.done.append((shard, Record(request, error.status, str(error))))
                continue
            fresh.append(row)
            held += row.lanes
            self.waiting.setdefault(row.size, deque()).append(row)
        if fresh:
            self.engine.add_contexts(fresh)

    def _next_request(self) -> tuple[Shard, Request] | None:
        while True:
            if self.current is None and not self._open_shard():
                return None
            assert self.current is not None
            shard, requests = self.current
            request = next(requests, None)
            if request is not None:
                return shard, request
            self.current = None

    def _open_shard(self) -> bool:
        """Begins the next shard, unless two are open, none is at hand, or all are done."""
        if self.exhausted or sum(1 for left in self.unfinished.values() if left) >= _OPEN_SHARDS:
            return False
        try:
            self.current = next(self.shards)
        except StopIteration:
            self.exhausted = True
        return self.current is not None

    def _any_waiting(self) -> bool:
        return self.current is not None or any(self.waiting.values())

    # -- denoising

    def _admit(self) -> None:
        for size, rows in self.waiting.items():
            if size not in self.lanes:
                settings = self.engine.settings
                self.lanes[size] = Lanes(self.engine.model, size, settings.lanes, settings.guidance_rescale)
            lanes, taken = self.lanes[size], list[Row]()
            free = lanes.capacity - sum(row.lanes for row in lanes.rows)
            while rows and (rows[0].lanes <= free or not (lanes.rows or taken)):
                free -= rows[0].lanes
                taken.append(rows.popleft())
            if taken:
                lanes.admit(taken)

    def _fullness(self, lanes: Lanes) -> float:
        """Which size walks next: a full batch first, so that sizes with few rows gather more meanwhile."""
        return sum(row.lanes for row in lanes.rows) / lanes.capacity

    def _step(self, lanes: Lanes) -> None:
        meter, began = self.engine.meter, time.perf_counter()
        meter.evaluations += sum(row.lanes for row in lanes.rows)
        self.latents += lanes.step()
        meter.network_calls += 1
        meter.unet_s += time.perf_counter() - began

    # -- pictures

    def _starved(self, busy: list[Lanes]) -> bool:
        """Whether finished latents hold the next rows back: then they are decoded though the batch is small."""
        return not busy or not self._any_waiting()

    def _decode(self) -> None:
        """Decodes the finished latents of the first one's size, and hands the pictures to the encoders."""
        size = self.latents[0][1].shape
        batch = [pair for pair in self.latents if pair[1].shape == size][: self.engine.settings.decode_batch]
        chosen = {id(row) for row, _ in batch}
        self.latents = [pair for pair in self.latents if id(pair[0]) not in chosen]
        good = []
        for row, latents in batch:
            if torch.isfinite(latents).all():
                good.append((row, latents))
            else:
                message = "the network gave numbers that are not finite; try another seed, or model.dtype float32"
                self.done.append((row.shard, Record(row.request, "nan", message)))
        if good:
            pixels = self.engine.decode(torch.stack([latents for _, latents in good]))
            for (row, _), picture in zip(good, pixels, strict=True):
                self.done.append((row.shard, self.pool.submit(self._record, row.request, picture)))

    def _record(self, request: Request, picture_HW3: np.ndarray) -> Record:
        """Runs in an encoder thread."""
        height, width = picture_HW3.shape[:2]
        if picture_HW3.min() == picture_HW3.max():
            return Record(request, "flat", "every pixel of the picture has one value", height=height, width=width)
        content, extension = self.engine.encode(picture_HW3)
        return Record(request, "ok", None, content, extension, height, width)

    def _finished(self, wait: bool) -> Iterator[tuple[Shard, Record]]:
        """Records that are ready; the oldest is waited for where nothing else is to be done."""
        for _ in range(len(self.done)):
            shard, result = self.done.popleft()
            if isinstance(result, Future):
                if not (result.done() or wait or len(self.done) >= _ENCODINGS):
                    self.done.append((shard, result))
                    continue
                result = result.result()
                self.engine.meter.pictures += 1
            self.unfinished[shard] -= 1
            if not self.unfinished[shard]:
                del self.unfinished[shard]
            yield shard, result
