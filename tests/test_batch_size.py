from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from batchsd import batch_size
from batchsd.batch_size import CPU_LANES, MOST_LANES, best_lanes, measured_lanes, one_call, room
from batchsd.model.checkpoint import load
from tests.conftest import write_checkpoint
from tests.tasks.xl import write_xl


def test_room_is_what_one_more_lane_costs() -> None:
    assert room(free=100, peak_of_one=30, peak_of_two=40) == 8
    assert room(free=5, peak_of_one=30, peak_of_two=40) == 1


@pytest.mark.parametrize(
    ("a_call", "a_lane", "most", "found"),
    [
        (1.0, 0.1, 128, 128),  # 128 lanes: 9.3 a second, 64: 8.6
        (1.0, 0.5, 128, 32),  # 32: 1.88, 64: 1.94 is only 3 % more
        (0.0, 1.0, 128, 1),  # no gain at all
        (1.0, 0.1, 9, 8),
        (1.0, 0.0, 1000, MOST_LANES),
    ],
)
def test_lanes_stop_where_they_no_longer_pay(a_call: float, a_lane: float, most: int, found: int) -> None:
    assert best_lanes(most, lambda lanes: a_call + a_lane * lanes) == found


def test_a_call_that_does_not_fit_is_the_limit() -> None:
    def seconds(lanes: int) -> float:
        if lanes > 4:
            raise torch.OutOfMemoryError("no room")
        return 1.0

    assert best_lanes(64, seconds) == 4


def test_a_cpu_has_its_number(checkpoint: Path) -> None:
    assert measured_lanes(load(checkpoint, device="cpu"), (4, 8, 8)) == CPU_LANES


@pytest.mark.parametrize("kind", ["text", "inpaint", "distilled", "SDXL"])
def test_what_is_measured_is_a_call_of_that_kind_of_model(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    """With all that the network must be told: SDXL's sizes and pooled text, a distilled one's guidance."""
    more = {"inpaint": {"in_channels": 9}, "distilled": {"time_cond_proj_dim": 32}}
    folder = checkpoint
    if kind == "SDXL":
        folder = write_xl(tmp_path / "model")
    elif kind in more:
        folder = write_checkpoint(tmp_path / "model", **more[kind])
    model = load(folder, device="cpu")
    called = []
    model.unet.register_forward_hook(lambda unet, given, out: called.append(out.shape))
    one_call(model, (4, 8, 8))(2)
    assert called == [(2, 4, 8, 8)]


def test_where_not_a_lane_fits_the_rows_are_to_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(batch_size, "one_call", lambda model, size: full)
    monkeypatch.setattr(batch_size, "give_back", lambda device: None)
    model: Any = SimpleNamespace(device=torch.device("cuda"))
    assert measured_lanes(model, (4, 8, 8)) == 1
