"""How full the batches are: whole jobs with networks that answer at once, counted."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench.bench_mixed import bounds, mixed_rows, shards_of, without_networks

from batchsd.diffusion.builtin import BUILTIN
from batchsd.engine import Engine, Settings
from batchsd.model.checkpoint import load
from batchsd.tasks.text import TextTask
from batchsd.types import Request, Shard


def empty_engine(folder: Path, lanes: int = 16, **settings: object) -> Engine:
    return Engine(
        without_networks(load(folder)), schedulers=BUILTIN, tasks={"text": TextTask()},
        encode=lambda picture: (b"", "raw"), settings=Settings(lanes=lanes, **settings),
    )  # fmt: skip


def generate(engine: Engine, rows: Sequence[Request], each: int) -> Counter[str]:
    return Counter(record.request.key for _, record in engine.generate(shards_of(rows, each)))


@pytest.mark.parametrize("each", [64, 16])
def test_a_mixed_job_keeps_its_lanes_busy(checkpoint: Path, each: int) -> None:
    engine = empty_engine(checkpoint)
    rows = mixed_rows(128, 32)
    assert generate(engine, rows, each) == {row.key: 1 for row in rows}
    _, least = bounds(engine, rows, 16)
    if each == 64:
        assert engine.meter.occupancy >= 0.95
        assert least <= engine.meter.network_calls <= 1.15 * least
    else:  # two such shards hold too few rows of a size for 16 lanes
        assert engine.meter.occupancy >= 0.6


def test_a_sparse_size_neither_blocks_nor_starves(checkpoint: Path) -> None:
    """One row in 16 has another size, in more shards than may be open."""
    rows = [replace(row, height=32, width=32, steps=4) for row in mixed_rows(128, 32)]
    rows[::16] = [replace(row, height=16, width=16) for row in rows[::16]]
    engine = empty_engine(checkpoint)
    finished = [record.request for _, record in engine.generate(shards_of(rows, 32))]
    assert len(finished) == 128
    first = next(i for i, request in enumerate(finished) if request.height == 16)
    assert 10 < first < 96, "others go first, but it is drawn before the third shard is through"
    _, least = bounds(engine, rows, 16)
    assert engine.meter.network_calls <= 1.6 * least


def test_lanes_of_guidance_that_is_off_are_lent_to_others(checkpoint: Path) -> None:
    """Guidance for about a third of the calls: the lanes that it leaves free serve other rows, and none is too many."""
    rows = [replace(row, height=32, width=32, steps=20, guidance_scale=5.0) for row in mixed_rows(64, 32)]
    engine = empty_engine(checkpoint, guidance_interval=(1.0, 4.0))
    sizes, unet = [], engine.network.unet

    def counted(x: torch.Tensor, *rest: object) -> torch.Tensor:
        sizes.append(len(x))
        return unet(x, *rest)

    engine.network.unet = counted
    assert generate(engine, rows, 64) == {row.key: 1 for row in rows}
    assert max(sizes) <= 16 and sum(sizes) == engine.meter.evaluations
    always = sum(2 * len(engine.program(row.scheduler, row.steps)) for row in rows)
    assert len(sizes) < 0.85 * always / 16, "fewer than there could be with lanes kept for guidance that is off"


def test_rows_are_not_pulled_without_end(checkpoint: Path) -> None:
    pulled = 0

    def counted(rows: Iterator[Request]) -> Iterator[Request]:
        nonlocal pulled
        for row in rows:
            pulled += 1
            yield row

    rows = [replace(row, height=32, width=32, steps=3) for row in mixed_rows(200, 32)]
    shard = Shard(1, 0, 1, 0, 0, len(rows))
    done = most = 0
    for _ in empty_engine(checkpoint, lanes=4).generate(iter([(shard, counted(iter(rows)))])):
        most = max(most, pulled - done)
        done += 1
    assert done == 200 and most <= 64, most


def test_too_little_memory_for_a_decoding_batch(checkpoint: Path) -> None:
    engine = empty_engine(checkpoint)
    decode, sizes = engine.model.vae.decode, []

    def short(z: torch.Tensor) -> torch.Tensor:
        sizes.append(len(z))
        if len(z) > 2:
            raise torch.OutOfMemoryError("no room")
        return decode(z)

    engine.model.vae.decode = short  # type: ignore[method-assign]
    rows = [replace(row, height=32, width=32, steps=2) for row in mixed_rows(12, 32)]
    assert generate(engine, rows, 12) == {row.key: 1 for row in rows}
    assert sum(size for size in sizes if size <= 2) == 12 and engine.decode_batch <= 2


@pytest.mark.parametrize("overlap", [False, True])
def test_a_picture_that_does_not_fit_is_tried_with_the_device_to_itself(checkpoint: Path, overlap: bool) -> None:
    """It fits on the second try; one that never fits is its row's failure, and the others are pictures."""
    engine = empty_engine(checkpoint)
    engine.overlap = overlap
    decode, tried = engine.model.vae.decode, []

    def short(z: torch.Tensor) -> torch.Tensor:
        size = z.shape[3] * engine.model.scale_factor
        tried.append(size)
        if len(z) > 1 or size == 16 or tried.count(size) < 3:
            raise torch.OutOfMemoryError("no room")
        return decode(z) + torch.linspace(0, 0.5, z.shape[3] * engine.model.scale_factor)  # else it were flat

    engine.model.vae.decode = short  # type: ignore[method-assign]
    sides = (32, 32, 16)
    rows = [replace(row, height=side, width=side, steps=2) for side, row in zip(sides, mixed_rows(3, 32), strict=True)]
    records = {record.request.key: record.status for _, record in engine.generate(shards_of(rows, 3))}
    assert records == {rows[0].key: "ok", rows[1].key: "ok", rows[2].key: "oom"}


def test_decoding_does_not_hold_up_denoising(checkpoint: Path) -> None:
    """The first batch of pictures is decoded only after three more network calls: nobody else would make them."""
    engine = empty_engine(checkpoint, lanes=4)
    engine.overlap = True  # as on a GPU
    decode, moved = engine.model.vae.decode, threading.Semaphore(0)
    unet, decoded = engine.model.unet.forward, []

    def network(*given: object) -> torch.Tensor:
        moved.release()
        return unet(*given)

    def late(z: torch.Tensor) -> torch.Tensor:
        if not decoded:
            while moved.acquire(blocking=False):
                pass
            decoded.append([moved.acquire(timeout=60) for _ in range(3)])
        return decode(z)

    engine.model.unet.forward, engine.model.vae.decode = network, late  # type: ignore[method-assign]
    rows = [replace(row, height=32, width=32, steps=6) for row in mixed_rows(40, 32)]
    assert generate(engine, rows, 40) == {row.key: 1 for row in rows}
    assert decoded == [[True, True, True]]


def test_a_branch_that_is_off_for_good_gives_its_lane_away(checkpoint: Path) -> None:
    """Guidance at the beginning alone: two lanes a row there, one for the rest of its walk."""
    same = {"height": 32, "width": 32, "steps": 20, "scheduler": "euler", "guidance_scale": 5.0}
    rows = [replace(row, **same) for row in mixed_rows(24, 32)]
    calls = {}
    for interval in ((), (5.0, 1e9)):
        engine = empty_engine(checkpoint, lanes=8)
        engine.settings = replace(engine.settings, guidance_interval=interval)
        assert generate(engine, rows, 24) == {row.key: 1 for row in rows}
        calls[interval] = engine.meter.network_calls
    assert calls[()] == 24 * 20 * 2 / 8
    guided = sum(float(sigma) > 5 for sigma in engine.program("euler", 20).call_sigma)
    assert 0 < guided < 20
    assert 24 * (20 + guided) / 8 <= calls[5.0, 1e9] <= 0.75 * calls[()]  # 72 at the least; 88 where this was written
