"""Every task of ours meets the contract that a plugin's must."""

from __future__ import annotations

import pytest

from batchsd.defaults import register_tasks
from batchsd.testing.tasks import TinyModel, check_task, example_request

from .test_parity import mask, picture, png

IMAGE, MASK = png(picture(96, 64)), png(mask(96, 64))
ROWS = [
    ("text", 0, {}),
    ("image", 0, {"init_image": IMAGE, "strength": 0.5}),
    ("inpaint", 0, {"init_image": IMAGE, "mask": MASK}),
    ("inpaint", 5, {"init_image": IMAGE, "mask": MASK, "strength": 0.5, "paste_back": True}),
    ("depth", 1, {"depth": MASK}),
    ("depth", 1, {"depth": MASK, "init_image": IMAGE, "resize": "pad"}),
    ("edit", 4, {"init_image": IMAGE, "image_guidance_scale": 2.0}),
]


@pytest.mark.parametrize(("task", "channels", "inputs"), ROWS)
def test_contract(task: str, channels: int, inputs: dict[str, object]) -> None:
    check_task(register_tasks()[task], example_request(task=task, inputs=inputs), TinyModel(extra_channels=channels))
