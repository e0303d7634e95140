"""Guidance against diffusers' formulas and hand-made sums."""

from __future__ import annotations

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from batchsd.diffusion.guidance import rescaled, weighted_sum


def test_two_branches_are_classifier_free_guidance():
    negative, positive = torch.randn(2, 4, 5, 5)
    w = torch.tensor([[1 - 7.5, 7.5]])
    guided = weighted_sum(torch.stack([negative, positive]), torch.tensor([[0, 1]]), w)
    torch.testing.assert_close(guided[0], negative + 7.5 * (positive - negative))


def test_rows_of_unequal_branches_share_lanes_and_no_nan_passes_between_them():
    outputs = torch.randn(6, 4, 2, 2)
    outputs[5] = torch.nan
    lanes = torch.tensor([[0, 1, 2], [3, 4, 3], [5, 5, 5]])
    weights = torch.tensor([[0.5, -1.0, 1.5], [-2.0, 3.0, 0.0], [1.0, 0.0, 0.0]])
    guided = weighted_sum(outputs, lanes, weights)
    torch.testing.assert_close(guided[0], 0.5 * outputs[0] - outputs[1] + 1.5 * outputs[2])
    torch.testing.assert_close(guided[1], -2 * outputs[3] + 3 * outputs[4])
    assert guided[2].isnan().all()


def test_rescale_equals_diffusers_row_by_row():
    guided, positive = torch.randn(2, 3, 4, 6, 6) * torch.tensor([3.0, 1.0]).reshape(2, 1, 1, 1, 1)
    strength = torch.tensor([0.0, 0.7, 1.0])
    ours = rescaled(guided, positive, strength)
    for r, phi in enumerate(strength.tolist()):
        theirs = rescale_noise_cfg(guided[r : r + 1], positive[r : r + 1], phi)
        torch.testing.assert_close(ours[r : r + 1], theirs)
    assert torch.equal(ours[0], guided[0])


def test_rescale_of_strength_0_leaves_a_constant_prediction_alone():
    flat = torch.ones(1, 4, 2, 2)
    assert torch.equal(rescaled(flat, flat, torch.zeros(1)), flat)
