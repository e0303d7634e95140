"""A job that mixes everything: 6 samplers, 5 to 50 steps, guidance on and off, three sizes; 256 rows in two shards.

    python tests/bench/bench_mixed.py [--rows 256] [--lanes 16 ...] [--model DIR] [--deterministic] [--empty]

Prints how full the batches were, network calls beside the lower bound, and pictures a CPU second; then those of
diffusers, whose pipeline takes one sampler, step count, guidance and size a call: rows that share all four are drawn
together, as many as the lanes hold. The pictures are compared. `--empty` leaves the networks out and counts only.
The occupancy is that of `batchsd.meter`; the bound is the sum of evaluations over the lanes, first for a batch that
could hold all sizes at once, then for one that cannot.
"""

from __future__ import annotations

import argparse
import io
import random
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from batchsd.diffusion.builtin import BUILTIN
from batchsd.encode import encoder
from batchsd.engine import Engine, Settings
from batchsd.model.checkpoint import Model, load
from batchsd.tasks.text import TextTask
from batchsd.training.captions import held_out_captions
from batchsd.types import Request, Shard

TINY = Path(__file__).parents[2] / "batchsd" / "assets" / "tiny-scenes"
SAMPLERS = ("ddim", "euler", "euler_a", "dpmpp_2m", "heun", "pndm")
NOTHING = pa.table({"id": [None]})


def mixed_rows(count: int, native: int, seed: int = 0, most: int = 50) -> list[Request]:
    """Rows in random order, of 5 to `most` steps. Sizes: native, wide, and half; `native` is a side in pixels."""
    rng = random.Random(seed)
    prompts = [caption for caption, _ in held_out_captions(64)]
    sizes = ((native, native), (native // 2, native), (native // 2, native // 2))
    rows = []
    for i in range(count):
        height, width = rng.choice(sizes)
        guidance, steps = rng.choice((1.0, 3.0, 7.5)), rng.randint(min(5, most), most)
        sampler, prompt = rng.choice(SAMPLERS), rng.choice(prompts)
        rows.append(
            Request(str(i), i, 0, prompt, None, i, steps, guidance, height, width, sampler, "text", {}, NOTHING)
        )
    return rows


def shards_of(rows: Sequence[Request], each: int) -> Iterator[tuple[Shard, Iterator[Request]]]:
    for i in range(0, len(rows), each):
        part = rows[i : i + each]
        yield Shard(1, i // each, -(-len(rows) // each), 0, i, len(part)), iter(part)


def without_networks(model: Model) -> Model:
    """Every output zeros of the right shape: what is left is the engine's own work."""

    def unet(x: torch.Tensor, *rest: object) -> torch.Tensor:
        return x[:, : model.latent_channels] * 0

    def decode(z: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(z), 3, *(side * model.scale_factor for side in z.shape[2:]))

    model.unet.forward = unet  # type: ignore[method-assign, assignment]
    model.vae.decode = decode  # type: ignore[method-assign]
    return model


def bounds(engine: Engine, rows: Sequence[Request], lanes: int) -> tuple[int, int]:
    """The least network calls: sizes in one batch, and each size for itself."""
    needed: dict[tuple[int | None, int | None], int] = {}
    for row in rows:
        calls = len(engine.program(row.scheduler, row.steps)) * (2 if row.guidance_scale > 1 else 1)
        needed[row.height, row.width] = needed.get((row.height, row.width), 0) + calls
    return -(-sum(needed.values()) // lanes), sum(-(-each // lanes) for each in needed.values())


def theirs(model_path: Path, rows: Sequence[Request], most: int) -> dict[str, np.ndarray]:
    """The rows by diffusers, at most so many together; pictures by the row's key."""
    import diffusers

    def settings(row: Request) -> tuple[Any, ...]:
        return row.scheduler, row.steps, row.guidance_scale, row.height, row.width

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(model_path, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    config = pipe.scheduler.config
    found: dict[str, np.ndarray] = {}
    for (sampler, steps, guidance, height, width), group in groupby(sorted(rows, key=settings), settings):
        kind = getattr(diffusers, BUILTIN[sampler].diffusers or "DPMSolverMultistepScheduler")  # of "dpmpp_2m"
        same = list(group)
        for part in (same[i : i + most] for i in range(0, len(same), most)):
            pipe.scheduler = kind.from_config(config)
            seeds = [torch.Generator().manual_seed(row.seed) for row in part]
            texts = [row.prompt for row in part]
            drawn = pipe(texts, height, width, steps, guidance_scale=guidance, generator=seeds).images
            found |= {row.key: np.asarray(picture) for row, picture in zip(part, drawn, strict=True)}
    return found


def decoded(image: bytes | None) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image or b"")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rows-per-shard", type=int, default=128)
    parser.add_argument("--lanes", type=int, nargs="+", default=[16])
    parser.add_argument("--model", type=Path, default=TINY)
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--empty", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = load(given.model)
    predicts_eps = model.scheduler_config.get("prediction_type", "epsilon") == "epsilon"
    if given.empty:
        without_networks(model)
    rows, peer = mixed_rows(given.rows, model.native_size), 0.0
    reference: dict[str, np.ndarray] = {}
    if not given.empty:
        began = time.process_time()
        reference = theirs(given.model, rows, max(given.lanes) // 2)
        peer = time.process_time() - began
        print(f"diffusers: {len(rows) / peer:.2f} pictures a CPU second")
    for lanes in given.lanes:
        engine = Engine(
            model, schedulers=BUILTIN, tasks={"text": TextTask()}, encode=encoder({"format": "png"}),
            settings=Settings(lanes=lanes, deterministic=given.deterministic),
        )  # fmt: skip
        began = time.process_time()
        records = [record for _, record in engine.generate(shards_of(rows, given.rows_per_shard))]
        seconds = time.process_time() - began
        print(f"{lanes} lanes: {len(records) / seconds:.2f} pictures a CPU second, {how(engine, rows, lanes)}")
        if reference:
            # PNDM mixes outputs of several noise levels: ours eps, as in its paper, diffusers' whatever the model says.
            shared = [r for r in records if r.request.scheduler != "pndm" or predicts_eps]
            apart = max(int(np.abs(decoded(r.image).astype(int) - reference[r.request.key]).max()) for r in shared)
            print(f"    {peer / seconds:.2f} times diffusers; {len(shared)} rows within {apart}/255 of it")


def how(engine: Engine, rows: Sequence[Request], lanes: int) -> str:
    meter, (one, each) = engine.meter, bounds(engine, rows, lanes)
    stages = ", ".join(f"{name} {value:.1f} s" for name, value in meter.seconds.items())
    return (
        f"occupancy {meter.occupancy:.1%}, {meter.network_calls} network calls (at least {one}; {each} with a batch a "
        f"size; {stages})"
    )


if __name__ == "__main__":
    main()
