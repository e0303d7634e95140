"""Pictures on their way: bounded in bytes, in a thread or in place, with the same result."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bench.bench_mixed import mixed_rows, shards_of, without_networks

from batchsd import pictures
from batchsd.diffusion.builtin import BUILTIN
from batchsd.engine import Engine, Settings
from batchsd.model.checkpoint import load
from batchsd.tasks.text import TextTask
from batchsd.types import Request

A_PICTURE = 32 * 32 * 3


def rows(count: int) -> list[Request]:
    return [replace(row, height=32, width=32, steps=2) for row in mixed_rows(count, 32)]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes on their way, after each batch that was handed over."""
    found: list[int] = []
    hand_over = pictures.Pictures._hand_over

    def watched(self: pictures.Pictures, *rest: object) -> None:
        hand_over(self, *rest)  # type: ignore[arg-type]
        found.append(self.bytes)

    monkeypatch.setattr(pictures.Pictures, "_hand_over", watched)
    yield found


@pytest.mark.parametrize("overlap", [False, True])
def test_slow_encoders_hold_the_network_back(
    checkpoint: Path, seen: list[int], overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(picture: np.ndarray) -> tuple[bytes, str]:
        time.sleep(0.01)
        return b"x", "raw"

    def most(bound: int) -> float:
        monkeypatch.setattr(pictures, "MOST_BYTES", bound * A_PICTURE)
        engine = Engine(
            without_networks(load(checkpoint)), schedulers=BUILTIN, tasks={"text": TextTask()}, encode=slow,
            settings=Settings(lanes=8, decode_batch=2),
        )  # fmt: skip
        engine.overlap = overlap
        engine.model.vae.decode = colourful(engine.model.vae.decode)  # type: ignore[method-assign]
        seen.clear()
        assert sum(1 for _, record in engine.generate(shards_of(rows(48), 48)) if record.status == "ok") == 48
        return max(seen) / A_PICTURE

    # A step may finish 8 rows, whose batches go out before anybody looks at the bound.
    assert most(6) <= 6 + 8
    assert most(1000) > 6 + 8, "without the bound there are more, else this shows nothing"


def colourful(decode):  # type: ignore[no-untyped-def]
    """A picture of one colour would be `flat`."""

    def decoded(z):  # type: ignore[no-untyped-def]
        made = decode(z)
        made[:, :, 0] = 1
        return made

    return decoded


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
