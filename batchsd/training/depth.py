"""A text model learns to follow depth: one more input channel, at first of weight zero, as Stability made SD2-depth.

    network input = [noisy latents | the depth channel of `tasks.depth`]

Text encoder and autoencoder stay as they are; the U-Net alone goes on learning, every sample with its depth.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from batchsd import images
from batchsd.diffusion.schedule import NoiseSchedule
from batchsd.model.checkpoint import Model, load
from batchsd.model.config import read_json
from batchsd.tasks.depth import depth_channel
from batchsd.training.autoencoder import encoded
from batchsd.training.config import DepthConfig
from batchsd.training.data import Pictures, content_of
from batchsd.training.denoiser import Latents, noise_prediction_loss, widened
from batchsd.training.depth_estimator import estimator
from batchsd.training.export import export_depth
from batchsd.training.loop import train
from batchsd.types import UsageError

Log = Callable[[str], None]

NEARNESS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "nearness": lambda depth_HW: depth_HW,
    "distance": lambda depth_HW: 1 / np.maximum(depth_HW, 1e-6),
}
"""What a depth column holds -> a map in which greater is nearer, as depth estimators give it."""


def tune(config: DepthConfig, pictures: Pictures, log: Log) -> None:
    """Makes the depth model and writes it; goes on where it stopped. Raises `UsageError`."""
    base = load(config.base, dtype="float32", device="cpu")
    if base.extra_channels:
        raise UsageError(f"{config.base}: not a text model, it has {base.extra_channels} more input channels")
    scale = base.vae.config.scaling_factor
    latents = Latents(*(scale * part for part in encoded(config.work / "latents.pt", base.vae, pictures)))
    nearness = NEARNESS[config.depth.holds]
    depths_N1HW = load_depths(config.pictures, tuple(latents.means_NCHW.shape[-2:]), nearness)
    log(f"latents and depth maps of {len(depths_N1HW)} pictures")
    average = _train(config, base, latents, depths_N1HW, list(pictures.captions), log)
    side = pictures.images_N3HW.shape[-2:]
    maps_N1HW = load_depths(config.pictures, tuple(side), nearness, torch.float16)
    network = estimator(config.estimator, pictures, maps_N1HW, config.work / "estimator.state", log)
    export_depth(config.output, config.base, (widened(base.unet, 1).config, average), network)


def _train(
    config: DepthConfig, base: Model, latents: Latents, depths_N1HW: Tensor, captions: list[str], log: Log
) -> dict[str, Tensor]:
    how = config.depth
    scheduler = read_json(config.base / "scheduler" / "scheduler_config.json")

    def with_depth(noisy_BCHW: Tensor, index: Tensor) -> Tensor:
        return torch.cat([noisy_BCHW, depths_N1HW[index]], dim=1)

    unet = widened(base.unet, 1).requires_grad_(True)
    loss = noise_prediction_loss(
        unet, base.text, latents, captions, NoiseSchedule.from_config(scheduler), how.batch_size,
        how.caption_dropout, with_depth,
    )  # fmt: skip
    return train(unet, loss, how, config.work / "depth.state", log)


def load_depths(
    path: Path,
    size_hw: tuple[int, ...],
    nearness: Callable[[np.ndarray], np.ndarray],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The file's depth maps as the network sees them: N 1 h w in [-1, 1]. Raises `UsageError`."""
    file = pq.ParquetFile(path)
    if "depth" not in file.schema_arrow.names:
        raise UsageError(f"{path}: no column depth; a depth model learns from image, caption and depth")
    found = []
    for batch in file.iter_batches(batch_size=500, columns=["depth"]):
        for row in batch.to_pylist():
            map_HW = nearness(images.field(content_of(row["depth"])))
            found.append(depth_channel(map_HW, (size_hw[0], size_hw[1])).to(dtype))
    return torch.stack(found)
