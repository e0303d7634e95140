"""`python -m batchsd.training CONFIG`: trains a small Stable Diffusion on (image, caption), or a depth model of one."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from batchsd.training import depth, stages
from batchsd.training.config import DepthConfig, Scenes, load_config
from batchsd.training.data import load_pictures
from batchsd.training.dataset import write_dataset
from batchsd.types import BatchsdError


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m batchsd.training CONFIG.toml", file=sys.stderr)
        return 2
    try:
        run(Path(arguments[0]))
    except BatchsdError as error:
        print(f"batchsd.training: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def run(path: Path) -> None:
    config = load_config(path)
    if config.threads:
        torch.set_num_threads(config.threads)
    began = time.monotonic()

    def log(line: str) -> None:
        print(f"{(time.monotonic() - began) / 60:6.1f} min  {line}", flush=True)

    if config.scenes is not None and not config.pictures.exists():
        draw_scenes(config.scenes, config.pictures)
        log(f"drew {config.scenes.count} scenes")
    pictures = load_pictures(config.pictures)
    log(f"{len(pictures)} pictures from {config.pictures}")
    if isinstance(config, DepthConfig):
        depth.tune(config, pictures, log)
    else:
        stages.from_nothing(config, pictures, log)
    log(f"wrote {config.output}")


def draw_scenes(scenes: Scenes, path: Path) -> None:
    """Draws beside the place and moves it there whole: a run that was stopped leaves no half of it."""
    part = path.with_suffix(".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_dataset(part, scenes.count, scenes.seed, scenes.size)
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
