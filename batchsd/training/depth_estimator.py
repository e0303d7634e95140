"""A small DPT that sees how near each part of a picture is, so that a depth model's rows need no map of their own.

    squared difference between its map and the true one, brought to [0, 1], of pictures with some noise on them

transformers' DPTForDepthEstimation, as SD2-depth's folder has it in `depth_estimator/`, only smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from batchsd.training.config import EstimatorStage
from batchsd.training.data import Pictures
from batchsd.training.loop import Loss, train

_NOISE = 0.1  # of [-1, 1]: drawn pictures are never as clean as rendered ones


def estimator(
    how: EstimatorStage, pictures: Pictures, nearness_N1HW: Tensor, state: Path, log: Callable[[str], None]
) -> Any:
    """The trained network; goes on where it stopped. Maps are in [-1, 1] at the pictures' size."""
    network = new_estimator(how, pictures.images_N3HW.shape[-1])
    average = train(network, map_loss(network, pictures, nearness_N1HW, how.batch_size), how, state, log)
    network.load_state_dict(average)
    return network.eval()


def new_estimator(how: EstimatorStage, size: int) -> Any:
    """A DPT of random weights for square pictures of `size` pixels."""
    from transformers import DPTConfig, DPTForDepthEstimation

    torch.manual_seed(how.seed)
    config = DPTConfig(
        hidden_size=how.width, intermediate_size=4 * how.width, num_hidden_layers=4, num_attention_heads=how.heads,
        image_size=size, patch_size=how.patch, backbone_out_indices=[0, 1, 2, 3], reassemble_factors=[4, 2, 1, 0.5],
        neck_hidden_sizes=[how.width // 2, how.width // 2, how.width, how.width], fusion_hidden_size=how.fusion,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    network: Any = DPTForDepthEstimation(config)
    with torch.no_grad():
        network.head.head[-2].bias.fill_(0.5)  # a rectifier follows it, and lets nothing through below 0
    return network


def map_loss(network: Any, pictures: Pictures, nearness_N1HW: Tensor, batch_size: int) -> Loss:
    """The loss of random batches, for `loop.train`."""

    def loss(generator: torch.Generator) -> tuple[Tensor, Mapping[str, float]]:
        index = torch.randint(len(pictures), (batch_size,), generator=generator)
        x_B3HW = pictures.floats(index)
        much_B111 = _NOISE * torch.rand(batch_size, 1, 1, 1, generator=generator)
        seen_BHW = network(x_B3HW + much_B111 * torch.randn(x_B3HW.shape, generator=generator)).predicted_depth
        true_B1HW = (nearness_N1HW[index].float() + 1) / 2
        true_BHW = F.interpolate(true_B1HW, seen_BHW.shape[1:], mode="bilinear", align_corners=False)[:, 0]
        value = F.mse_loss(seen_BHW, true_BHW)
        return value, {"loss": value.item()}

    return loss
