"""Guidance mixes what a row's branches predict, by the weights that its task gives (`Conditioning.weights`):

    guided = sum_i w_i output_i          classifier-free (Ho and Salimans, 2022): w = (1 - g, g)

`rescaled` then takes back the contrast that a large g adds (Lin et al., 2023, section 3.4).
"""

from __future__ import annotations

import torch


def weighted_sum(outputs: torch.Tensor, lanes: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Guided outputs [R, ...] from lanes' outputs [L, ...].

    lanes int64 [R, B] says where each row's branches were evaluated, weights [R, B]; a row with fewer
    branches repeats one of its own lanes at weight 0, so that no row meets another's nan (0 * nan is nan).
    """
    factors = weights.to(outputs).reshape(*weights.shape, *[1] * (outputs.ndim - 1))
    guided = factors[:, 0] * outputs[lanes[:, 0]]
    for i in range(1, lanes.shape[1]):  # term by term: the order of a sum must not depend on the number of rows
        guided = guided + factors[:, i] * outputs[lanes[:, i]]
    return guided


def rescaled(guided: torch.Tensor, positive: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """Mix `guided` [R, ...] with itself at the standard deviation of the `positive` branch, by strength [R].

    Deviations run over C, H, W of the raw predictions; strength 0 changes nothing.
    """
    dims = tuple(range(1, guided.ndim))
    ratio = positive.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
    phi = strength.to(guided).reshape(-1, *[1] * (guided.ndim - 1))
    return torch.where(phi > 0, guided * (phi * ratio + (1 - phi)), guided)
