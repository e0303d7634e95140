"""How much of what captions ask does a checkpoint draw? `python -m batchsd.training.evaluate MODEL JUDGE`.

Draws the held-out captions (`captions.held_out_captions`) with the engine, lets the judge read the pictures, and
prints the rates; beside them those under shuffled captions (what comes by chance), and the judge's own on true
renders sent through the checkpoint's autoencoder (the most that could be reached).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from batchsd.diffusion.builtin import BUILTIN
from batchsd.engine import Engine, Settings
from batchsd.model.checkpoint import Model, load
from batchsd.tasks.text import TextTask
from batchsd.training.captions import asked, held_out_captions
from batchsd.training.judge import Images, Judge, Rates, evaluate, score
from batchsd.training.scenes import render
from batchsd.types import BatchsdError, Request, Shard, Task


def draw(
    model: Model,
    captions: Sequence[str],
    scheduler: str,
    steps: int,
    guidance: float,
    task: Task = TextTask(),  # noqa: B008 (frozen)
    inputs: Sequence[Mapping[str, Any]] | None = None,
) -> Images:
    """Pictures of the captions, uint8 N H W 3; the seed of each is its number, `inputs` what its task wants."""
    nothing = pa.table({"id": [None]})

    def requests() -> Iterator[Request]:
        for i, caption in enumerate(captions):
            given = inputs[i] if inputs else {}
            yield Request(
                str(i), i, 0, caption, None, i, steps, guidance, None, None, scheduler, "task", given, nothing
            )

    def raw(picture: np.ndarray) -> tuple[bytes, str]:
        return picture.tobytes(), "raw"

    engine = Engine(
        model, schedulers=BUILTIN, tasks={"task": task}, encode=raw, settings=Settings(lanes=32)
    )
    found: dict[int, np.ndarray] = {}
    for _, record in engine.generate(iter([(Shard(1, 0, 1, 0, 0, len(captions)), requests())])):
        assert record.image is not None and record.height and record.width, record.error
        pixels = np.frombuffer(record.image, np.uint8)
        found[record.request.index] = pixels.reshape(record.height, record.width, 3)
    return np.stack([found[i] for i in range(len(captions))])


def ceiling(model: Model, judge: Judge, n: int) -> Rates:
    """The rates of true renders after one pass through the autoencoder."""
    scenes = [scene for _, scene in held_out_captions(n)]
    pictures = round_trip(model, np.stack([render(scene).image for scene in scenes]))
    return score(judge.read(pictures), [asked(scene) for scene in scenes])


@torch.no_grad()
def round_trip(model: Model, pictures_NHW3: Images) -> Images:
    """Pictures through the autoencoder: the most that anything drawn with it could be like them."""
    pixels = torch.from_numpy(pictures_NHW3).permute(0, 3, 1, 2).to(model.vae.dtype) / 127.5 - 1
    back = model.decode(model.vae.encode(pixels).mean_BCHW * model.vae.config.scaling_factor)
    return (back.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()


def table(groups: dict[str, Rates]) -> str:
    """Groups as lines, attributes as columns, in percent."""
    names = list(dict.fromkeys(name for rates in groups.values() for name in rates))
    head = f"{'':16}" + "".join(f"{name:>10}" for name in names)
    lines = [
        f"{group:16}" + "".join(f"{rates[n] * 100:10.1f}" if n in rates else f"{'-':>10}" for n in names)
        for group, rates in groups.items()
    ]
    return "\n".join([head, *lines])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m batchsd.training.evaluate", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("judge", type=Path, help="made by python -m batchsd.training.judge train")
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--scheduler", default="dpmpp_2m")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.0)
    given = parser.parse_args(arguments)
    try:
        model, judge = load(given.model), Judge.load(given.judge)
    except BatchsdError as error:
        print(f"batchsd: {error}", file=sys.stderr)
        return error.exit_code
    rates = evaluate(
        lambda captions: draw(model, captions, given.scheduler, given.steps, given.guidance), judge, given.count
    )
    print(table({**rates, "autoencoder": ceiling(model, judge, given.count)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
