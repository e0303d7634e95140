"""Pictures a second: batchsd's engine against diffusers' pipeline, turn by turn in one process.

    python tests/bench/bench_text.py [--rows 32] [--steps 20] [--rounds 5] [--model DIR]

Both draw the same prompts with the same sampler and guidance, in float32 on this machine's default device; the
pictures are compared. diffusers is run as a careful user would: batches of 8 and 16 (guidance doubles what the
network sees), prompts encoded in the batch. Ours is the engine with its lanes, encoding included. CPU seconds of the
process are measured, since wall time on a shared machine says little. A round is one turn of each, and a ratio is that
of two turns of one round: the median of the rounds counts, and the least and the greatest are told beside it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import torch

from batchsd.diffusion.builtin import BUILTIN
from batchsd.encode import encoder
from batchsd.engine import Engine, Settings
from batchsd.model.checkpoint import load
from batchsd.tasks.text import TextTask
from batchsd.training.captions import held_out_captions
from batchsd.types import Request, Shard

PEER = "diffusers, batch 16"  # the fastest of them
TINY = Path(__file__).parents[2] / "batchsd" / "assets" / "tiny-scenes"


def ours(model_path: Path, prompts: list[str], steps: int, lanes: int) -> Callable[[], list[np.ndarray]]:
    import io

    from PIL import Image

    engine = Engine(
        load(model_path), schedulers=BUILTIN, tasks={"text": TextTask()}, encode=encoder({"format": "png"}),
        settings=Settings(lanes=lanes),
    )  # fmt: skip
    nothing = pa.table({"id": [None]})

    def requests() -> Iterator[Request]:
        for i, prompt in enumerate(prompts):
            yield Request(str(i), i, 0, prompt, None, i, steps, 5.0, None, None, "dpmpp_2m", "text", {}, nothing)

    def draw() -> list[np.ndarray]:
        engine._texts.clear()  # a second round must not profit from the first
        records = [record for _, record in engine.generate(iter([(Shard(1, 0, 1, 0, 0, len(prompts)), requests())]))]
        records.sort(key=lambda record: record.request.index)
        return [np.asarray(Image.open(io.BytesIO(record.image or b""))) for record in records]

    return draw


def theirs(model_path: Path, prompts: list[str], steps: int, batch: int) -> Callable[[], list[np.ndarray]]:
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(model_path, torch_dtype=torch.float32)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)

    def draw() -> list[np.ndarray]:
        found = []
        for i in range(0, len(prompts), batch):
            part = prompts[i : i + batch]
            seeds = [torch.Generator().manual_seed(i + j) for j in range(len(part))]
            found += pipe(part, num_inference_steps=steps, guidance_scale=5.0, generator=seeds).images
        return [np.asarray(picture) for picture in found]

    return draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", type=Path, default=TINY)
    given = parser.parse_args()
    torch.set_num_threads(1)
    prompts = [caption for caption, _ in held_out_captions(given.rows)]
    runs = {
        "diffusers, batch 1": theirs(given.model, prompts, given.steps, 1),
        "diffusers, batch 8": theirs(given.model, prompts, given.steps, 8),
        "diffusers, batch 16": theirs(given.model, prompts, given.steps, 16),
        "batchsd, 16 lanes": ours(given.model, prompts, given.steps, 16),
        "batchsd, 32 lanes": ours(given.model, prompts, given.steps, 32),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    drawn: dict[str, list[np.ndarray]] = {}
    for _ in range(given.rounds):
        for name, draw in runs.items():
            began = time.process_time()
            drawn[name] = draw()
            seconds[name].append(time.process_time() - began)
    reference = drawn["diffusers, batch 1"]
    for name, own in seconds.items():
        pairs = zip(drawn[name], reference, strict=True)
        difference = max(int(np.abs(a.astype(int) - b.astype(int)).max()) for a, b in pairs)
        ratios = sorted(peer / turn for peer, turn in zip(seconds[PEER], own, strict=True))
        print(
            f"{name:20} {given.rows / median(own):6.2f} pictures a CPU second  {median(ratios):5.2f}x "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f})  within {difference}/255"
        )


if __name__ == "__main__":
    main()
