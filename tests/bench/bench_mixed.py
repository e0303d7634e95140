"""A job that mixes everything: 6 samplers, 5 to 50 steps, guidance on and off, three sizes; 256 rows in two shards.

    python tests/bench/bench_mixed.py [--rows 256] [--lanes 16 ...] [--model DIR] [--deterministic] [--empty]

Prints how full the batches were, network calls beside the lower bound, and pictures a CPU second. `--empty` leaves
the networks out and counts only. The occupancy is that of `batchsd.meter`; the bound is the sum of evaluations over
the lanes, first for a batch that could hold all sizes at once, then for one that cannot.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import torch

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
    if given.empty:
        without_networks(model)
    rows = mixed_rows(given.rows, model.native_size)
    for lanes in given.lanes:
        engine = Engine(
            model, schedulers=BUILTIN, tasks={"text": TextTask()}, encode=encoder({"format": "png"}),
            settings=Settings(lanes=lanes, deterministic=given.deterministic),
        )  # fmt: skip
        began = time.process_time()
        done = sum(1 for _ in engine.generate(shards_of(rows, given.rows_per_shard)))
        seconds = time.process_time() - began
        meter, (one, each) = engine.meter, bounds(engine, rows, lanes)
        stages = ", ".join(f"{name} {value:.1f} s" for name, value in meter.seconds.items())
        print(
            f"{lanes} lanes: occupancy {meter.occupancy:.1%}, {meter.network_calls} network calls "
            f"(at least {one}; {each} with a batch a size), {done / seconds:.2f} pictures a CPU second ({stages})"
        )


if __name__ == "__main__":
    main()
