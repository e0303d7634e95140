"""Sizes, crops and the guidance, as networks are told them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from batchsd.tasks.text import prompted
from batchsd.tasks.told import guidance_told, sizes_told
from batchsd.testing.tasks import TINY, example_request
from batchsd.types import RowError

XL = replace(TINY, takes_sizes=True)
SHAPE = (4, 8, 12)  # 64 x 96 pixels


def test_what_a_row_leaves_out_is_the_pictures_own() -> None:
    row = example_request(inputs={"crops_coords_top_left": [5, 7], "original_size": None})
    assert sizes_told(row, XL, SHAPE)["time_ids"].tolist() == [64, 96, 5, 7, 64, 96]


def test_networks_that_take_no_sizes_do_not_look_at_the_columns() -> None:
    assert sizes_told(example_request(inputs={"original_size": "large"}), TINY, SHAPE) == {}


@pytest.mark.parametrize("value", [7, [1], [1, 2, 3], ["a", 2], [1, None], [True, 2], [float("nan"), 1], "1024x768"])
def test_other_values_are_bad_input(value: object) -> None:
    with pytest.raises(RowError, match="target_size: .* is no list of two numbers") as error:
        sizes_told(example_request(inputs={"target_size": value}), XL, SHAPE)
    assert error.value.status == "bad_input"


@pytest.mark.parametrize("guidance", [1.0, 8.5])
@pytest.mark.parametrize("dim", [256, 33])
def test_guidance_equals_diffusers(guidance: float, dim: int) -> None:
    from diffusers import LatentConsistencyModelPipeline

    pipe = LatentConsistencyModelPipeline.__new__(LatentConsistencyModelPipeline)
    expected = pipe.get_guidance_scale_embedding(torch.tensor([guidance - 1]), embedding_dim=dim)[0]
    assert torch.allclose(guidance_told(guidance, dim)["timestep_cond"], expected, atol=1e-3)  # angles reach 7500


def test_a_network_that_is_told_its_guidance_needs_one_branch() -> None:
    branches, weights = prompted(example_request(), replace(TINY, guidance_dim=8), SHAPE)
    assert [branch.prompt for branch in branches] == ["a large red sphere"] and tuple(weights(1.0)) == (1.0,)
    assert branches[0].added["timestep_cond"].shape == (8,)
