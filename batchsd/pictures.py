"""Latents become pictures, and pictures become files, while other rows walk on.

    latents of one size -> a VAE batch -> uint8 pictures -> encoder threads -> Records

Bounded in bytes: where more pictures than `MOST_BYTES` are on their way, the network waits for the oldest.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import RLock
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from batchsd.beside import Start
from batchsd.figures import figures
from batchsd.lanes import Row
from batchsd.meter import Meter
from batchsd.network import give_back, out_of_memory, row_error
from batchsd.scores import Verdict
from batchsd.types import Record, Request, RowError, Shard

MOST_BYTES = 256 * 2**20  # of pictures from the moment their latents go to the VAE until they are files

Drawn = tuple[np.ndarray, bool] | RowError
"""A picture (H, W, 3) and whether its latents were finite; or why there is none."""

Judged = tuple[np.ndarray, Verdict] | RowError
"""A picture (H, W, 3), and what the job's scores and filters say of it; or why there is none."""

NOT_FINITE = "the network gave numbers that are not finite; try another seed, or model.dtype float32"


class Stages(Protocol):
    """What is done to latents and pictures; see `engine.Engine`."""

    meter: Meter
    decode_batch: int
    alone: RLock
    encode: Callable[[np.ndarray], tuple[bytes, str]]

    def decode(self, latents_BCHW: Tensor) -> tuple[np.ndarray, np.ndarray]: ...

    def judged(self, requests: Sequence[Request], pictures: Sequence[np.ndarray]) -> Sequence[Verdict]: ...


@dataclass(eq=False)
class Batch:
    """Rows whose latents are with the VAE, and the bytes that their pictures take."""

    rows: list[Row]
    latents: list[Tensor]
    drawn: Future[list[Judged]]
    bytes: int


class Pictures:
    """`take` latents, `decode` what is due, `finished` gives records in about the order in which they came."""

    def __init__(self, engine: Stages, encoders: ThreadPoolExecutor, decoder: Start[list[Judged]], scale: int) -> None:
        self.engine = engine
        self.encoders = encoders
        self.decoder = decoder
        self.scale = scale  # pixels a latent, along a side
        self.latents: dict[tuple[int, ...], list[tuple[Row, Tensor]]] = {}
        self.batches: deque[Batch] = deque()
        self.done: deque[tuple[Shard, int, Future[Record] | Record]] = deque()  # with the picture's bytes
        self.bytes = 0

    def __bool__(self) -> bool:
        return bool(self.latents or self.batches or self.done)

    def take(self, row: Row, latents_CHW: Tensor) -> None:
        self.latents.setdefault(row.size, []).append((row, latents_CHW))

    def fail(self, shard: Shard, request: Request, error: RowError) -> None:
        self.done.append((shard, 0, Record(request, error.status, str(error))))

    def rows(self) -> Counter[Shard]:
        """Rows of each shard that are here."""
        here = Counter(row.shard for pairs in self.latents.values() for row, _ in pairs)
        here.update(row.shard for batch in self.batches for row in batch.rows)
        here.update(shard for shard, _, _ in self.done)
        return here

    def decode(self, all_of_them: bool) -> None:
        """Hands full batches of latents to the VAE, or whatever is there."""
        for size, pairs in list(self.latents.items()):
            while pairs and (all_of_them or len(pairs) >= self.engine.decode_batch):
                self._hand_over(pairs)
            if not pairs:
                del self.latents[size]

    def _hand_over(self, pairs: list[tuple[Row, Tensor]]) -> None:
        batch = pairs[: self.engine.decode_batch]
        del pairs[: len(batch)]
        size = sum(3 * row.size[1] * row.size[2] * self.scale**2 for row, _ in batch)
        self.bytes += size
        rows, latents = [row for row, _ in batch], [latents for _, latents in batch]
        self.batches.append(Batch(rows, latents, self.decoder(lambda: self._judged(rows, self._drawn(latents))), size))

    def _judged(self, rows: Sequence[Row], drawn: Sequence[Drawn]) -> list[Judged]:
        """The finished pictures, and what the job's plugins say of them; beside the network too."""
        found: list[Judged] = []
        good: list[tuple[int, np.ndarray]] = []
        for i, (row, result) in enumerate(zip(rows, drawn, strict=True)):
            if isinstance(result, RowError):
                found.append(result)
                continue
            picture, finite = result
            found.append(RowError("nan", NOT_FINITE))  # a finite one's place, until it is judged
            if finite:
                kept = row.conditioning.kept
                good.append((i, picture if kept is None else kept.into(picture)))
        verdicts = self.engine.judged([rows[i].request for i, _ in good], [picture for _, picture in good])
        for (i, picture), verdict in zip(good, verdicts, strict=True):
            found[i] = (picture, verdict)
        return found

    def _drawn(self, latents: list[Tensor]) -> list[Drawn]:
        """The VAE's work, beside the network; what does not fit is halved."""
        try:
            pictures, finite = self.engine.decode(torch.stack(latents))
            return list(zip(pictures, map(bool, finite), strict=True))
        except Exception as error:
            if not out_of_memory(error):
                raise
            if len(latents) == 1:
                return [row_error(error)]
        give_back(latents[0].device)
        half = len(latents) // 2
        self.engine.decode_batch = min(self.engine.decode_batch, half)
        return self._drawn(latents[:half]) + self._drawn(latents[half:])

    def finished(self, wait: bool) -> Iterator[tuple[Shard, Record]]:
        """Records that are ready; the oldest is waited for with `wait`, or where too many bytes are on their way."""
        while True:
            while self.batches and self.batches[0].drawn.done():
                self._encode(self.batches.popleft())
            for _ in range(len(self.done)):
                shard, size, result = self.done.popleft()
                if isinstance(result, Future):
                    if not (result.done() or wait or self.bytes > MOST_BYTES):
                        self.done.append((shard, size, result))
                        continue
                    with self.engine.meter.stage("wait"):
                        result = result.result()
                    self.engine.meter.pictures += 1
                self.bytes -= size
                yield shard, result
            if not (self.batches and (wait or self.bytes > MOST_BYTES)):
                return
            self._encode(self.batches.popleft())

    def _encode(self, batch: Batch) -> None:
        """Gives decoded pictures to the encoder threads."""
        with self.engine.meter.stage("wait"):
            drawn = batch.drawn.result()
        for row, latents, result in zip(batch.rows, batch.latents, drawn, strict=True):
            size = batch.bytes // len(batch.rows)
            if isinstance(result, RowError) and result.status == "oom":
                with self.engine.alone:  # the network stands still here, and no other batch is decoded
                    (result,) = self._judged([row], self._drawn([latents]))
            if isinstance(result, RowError):
                self.bytes -= size
                self.fail(row.shard, row.request, result)
                continue
            picture, verdict = result
            self.done.append((row.shard, size, self.encoders.submit(self._made, row, picture, verdict)))

    def _made(self, row: Row, picture_HW3: np.ndarray, verdict: Verdict) -> Record:
        """Runs in an encoder thread."""
        return replace(self._record(row.request, picture_HW3, verdict), made=row.conditioning.made)

    def _record(self, request: Request, picture_HW3: np.ndarray, verdict: Verdict) -> Record:
        height, width = picture_HW3.shape[:2]
        known: dict[str, Any] = {"height": height, "width": width}
        known |= {"figures": figures(picture_HW3), "scores": verdict.scores}
        if picture_HW3.min() == picture_HW3.max():
            return Record(request, "flat", "every pixel of the picture has one value", **known)
        if not verdict.keeps_picture:
            return Record(request, verdict.status, verdict.reason, **known)
        try:
            content, extension = self.engine.encode(picture_HW3)
        except Exception as error:
            return Record(request, "error", f"encoding: {type(error).__name__}: {error}")
        return Record(request, verdict.status, verdict.reason, content, extension, **known)
