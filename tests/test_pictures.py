"""Pictures on their way: bounded in bytes, in a thread or in place, with the same result."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import RLock
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bench.bench_mixed import mixed_rows, shards_of

from batchsd import pictures
from batchsd.beside import at_once, beside
from batchsd.diffusion.builtin import BUILTIN
from batchsd.engine import Engine, Settings
from batchsd.meter import Meter
from batchsd.model.checkpoint import load
from batchsd.scores import Verdict
from batchsd.tasks.text import TextTask
from batchsd.types import Request

A_PICTURE = 32 * 32 * 3


def rows(count: int) -> list[Request]:
    return [replace(row, height=32, width=32, steps=2) for row in mixed_rows(count, 32)]


@pytest.mark.parametrize("where", ["in place", "beside"])
@pytest.mark.parametrize(("bound", "most"), [(6, 6 + 2), (1000, 40)])
def test_slow_encoders_hold_the_network_back(
    where: str, bound: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows arrive at once and take a while to encode: never more bytes are on their way than the bound and a batch."""

    def slow(picture: np.ndarray) -> tuple[bytes, str]:
        time.sleep(0.05)
        return b"x", "raw"

    def decode(z: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        return np.arange(len(z) * A_PICTURE, dtype=np.uint8).reshape(-1, 32, 32, 3), np.ones(len(z), bool)

    monkeypatch.setattr(pictures, "MOST_BYTES", bound * A_PICTURE)
    def judged(requests: list, drawn: list) -> list[Verdict]:
        return [Verdict()] * len(drawn)

    engine: Any = SimpleNamespace(
        meter=Meter(), alone=RLock(), decode_batch=2, encode=slow, decode=decode, judged=judged
    )
    given: Any = SimpleNamespace(kept=None, made={})
    seen, done = [], []
    decoding = beside(torch.device("cpu")) if where == "beside" else at_once()
    with ThreadPoolExecutor(2) as encoders, decoding as decoder:
        ours = pictures.Pictures(engine, encoders, decoder, 8)
        for request in rows(40):
            row: Any = SimpleNamespace(size=(4, 4, 4), shard=None, request=request, conditioning=given)
            ours.take(row, torch.zeros(4, 4, 4))
            ours.decode(False)
            seen.append(ours.bytes / A_PICTURE)
            done += ours.finished(wait=False)
        done += ours.finished(wait=True)
    assert {record.status for _, record in done} == {"ok"} and len(done) == 40 and ours.bytes == 0 and not ours
    assert max(seen) <= most
    assert bound < 1000 or max(seen) > 2 * (6 + 2), "without the bound there are more, else this shows nothing"


def test_decoding_beside_the_network_changes_no_picture(checkpoint: Path) -> None:
    found = []
    for overlap in (False, True):
        engine = Engine(
            load(checkpoint), schedulers=BUILTIN, tasks={"text": TextTask()},
            encode=lambda picture: (picture.tobytes(), "raw"), settings=Settings(lanes=4, deterministic=True),
        )  # fmt: skip
        engine.overlap = overlap
        records = [record for _, record in engine.generate(shards_of(rows(8), 4))]
        found.append({record.request.key: record.image for record in records})
    assert found[0] == found[1] and len(found[0]) == 8 and None not in found[0].values()
