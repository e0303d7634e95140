"""`python -m batchsd.training CONFIG`: trains a small Stable Diffusion from a Parquet of (image, caption)."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from batchsd.training import stages
from batchsd.training.config import load_config
from batchsd.training.data import load_pictures
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

    pictures = load_pictures(config.pictures)
    log(f"{len(pictures)} pictures from {config.pictures}")
    text = stages.text_encoder(config, pictures, log)
    vae = stages.autoencoder(config, pictures, log)
    unet, average = stages.denoiser(config, pictures, vae, text, log)
    stages.write(config, vae, text, unet, average)
    log(f"wrote {config.output}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
