"""Calls that do not fit, calls that raise, contexts of different length: with a network that a test can see through."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from batchsd.meter import Meter
from batchsd.model.checkpoint import load
from batchsd.network import Group, Lane, Network, device_is_dead, joined, out_of_memory
from batchsd.types import UsageError

GROUP = Group((4, 2, 2))
X = torch.arange(6.0)[:, None, None, None].expand(6, 4, 2, 2)
LANES = [Lane(row, torch.full((3, 2), float(row))) for row in range(6)]


class Fake:
    """Doubles its input. Takes at most `room` lanes; raises on the lanes whose value is in `poison`."""

    def __init__(self, room: int = 99, poison: dict[float, Exception] | None = None) -> None:
        self.room, self.poison = room, poison or {}
        self.calls: list[int] = []

    def __call__(self, x: Tensor, timesteps: Tensor, context: Tensor, mask: Tensor | None, added: Any) -> Tensor:
        self.calls.append(len(x))
        if len(x) > self.room:
            raise torch.OutOfMemoryError("no room")
        for value in x[:, 0, 0, 0].tolist():
            if value in self.poison:
                raise self.poison[value]
        assert torch.equal(x[:, 0, 0, 0], context[:, 0, 0]) and torch.equal(timesteps, x[:, 0, 0, 0])
        return 2 * x


def network(fake: Fake, lanes: int, fixed: bool = False) -> Network:
    model: Any = SimpleNamespace(unet=fake, dtype=torch.float32, device=torch.device("cpu"))
    return Network(model, lambda group: lanes, fixed, Meter())


def evaluate(net: Network) -> tuple[Tensor, dict[int, Any]]:
    return net(GROUP, X, torch.arange(6.0), LANES)


@pytest.mark.parametrize(("lanes", "calls"), [(6, [6]), (4, [4, 2]), (1, [1] * 6)])
def test_more_lanes_than_a_call_holds(lanes: int, calls: list[int]) -> None:
    fake = Fake()
    out, failed = evaluate(network(fake, lanes))
    assert torch.equal(out, 2 * X) and not failed and fake.calls == calls


def test_a_fixed_call_is_filled_up() -> None:
    fake = Fake()
    net = network(fake, 4, fixed=True)
    out, _ = evaluate(net)
    assert torch.equal(out, 2 * X) and fake.calls == [4, 4]
    assert (net.meter.useful, net.meter.slots) == (6 * 4, 8 * 4)


def test_too_little_memory_halves_and_goes_on() -> None:
    fake = Fake(room=2)
    net = network(fake, 6)
    out, failed = evaluate(net)
    assert torch.equal(out, 2 * X) and not failed
    assert fake.calls == [6, 3, 1, 1, 1, 1, 1, 1] and net.capacity(GROUP) == 1
    assert net.meter.evaluations == 6, "calls that failed do not count"


def test_a_row_that_does_not_fit_alone_is_oom_and_the_others_are_drawn() -> None:
    out, failed = evaluate(network(Fake(poison={3.0: RuntimeError("CUDA out of memory. Tried ...")}), 6))
    assert {row: error.status for row, error in failed.items()} == {3: "oom"}
    assert torch.equal(out[[0, 1, 2, 4, 5]], 2 * X[[0, 1, 2, 4, 5]])


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
        torch.AcceleratorError("CUDA error: out of memory"),
        MemoryError(),
    ],
)
def test_memory_that_is_short_is_no_dead_device(error: Exception) -> None:
    assert out_of_memory(error) and not device_is_dead(error)


def test_a_lane_that_does_not_fit_is_tried_with_the_device_to_itself() -> None:
    """What else is on the device (a decoder's batch) is gone while `alone` is held."""
    fake = Fake(poison={3.0: torch.OutOfMemoryError("no room")})

    poison = fake.poison

    class Alone:
        def __enter__(self) -> None:
            fake.poison = {}

        def __exit__(self, *error: object) -> None:
            fake.poison = poison

    net = network(fake, 6)
    net.alone = Alone()
    out, failed = evaluate(net)
    assert torch.equal(out, 2 * X) and not failed and fake.poison is poison


def test_a_fixed_batch_of_one_that_does_not_fit_is_its_rows_failure() -> None:
    out, failed = evaluate(network(Fake(poison={3.0: torch.OutOfMemoryError("no room")}), 1, fixed=True))
    assert {row: error.status for row, error in failed.items()} == {3: "oom"}


def test_only_the_row_at_fault_fails() -> None:
    fake = Fake(poison={4.0: ValueError("bad row")})
    net = network(fake, 6)
    out, failed = evaluate(net)
    assert {row: (error.status, str(error)) for row, error in failed.items()} == {
        4: ("error", "the network: ValueError: bad row")
    }
    assert torch.equal(out[[0, 1, 2, 3, 5]], 2 * X[[0, 1, 2, 3, 5]]) and fake.calls[:3] == [6, 3, 3]
    assert net.capacity(GROUP) == 6, "the next call is whole again"


def test_a_dead_device_ends_the_worker() -> None:
    dead = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    assert device_is_dead(dead) and not out_of_memory(dead)
    with pytest.raises(torch.AcceleratorError):
        evaluate(network(Fake(poison={0.0: dead}), 6))


def test_a_fixed_batch_that_does_not_fit_says_what_to_set() -> None:
    with pytest.raises(UsageError, match=r"run.batch_size: 6 lanes of 2x2 latents .* set it to 3"):
        evaluate(network(Fake(room=2), 6, fixed=True))


def test_equal_lengths_have_no_mask() -> None:
    states, mask = joined([torch.ones(3, 2), torch.zeros(3, 2)], (3,))
    assert states.shape == (2, 3, 2) and mask is None


@pytest.mark.parametrize("fixed", [False, True])
def test_contexts_of_different_length_share_a_call(checkpoint: Path, fixed: bool) -> None:
    """Each lane's output is what it is without the others, whose contexts are longer or shorter."""
    model = load(checkpoint)
    torch.manual_seed(0)
    x = torch.randn(3, 4, 8, 8)
    lanes = [Lane(row, torch.randn(length, 32)) for row, length in enumerate((7, 21, 14))]
    group = Group((4, 8, 8), (7, 14, 21) if fixed else ())
    with torch.no_grad():
        out, failed = Network(model, lambda group: 4, fixed, Meter())(group, x, torch.tensor([9.0, 500.0, 80.0]), lanes)
        assert not failed
        for row, lane in enumerate(lanes):
            timestep = torch.tensor([[9.0, 500.0, 80.0][row]])
            want = model.unet(x[row : row + 1], timestep, lane.context_TD[None])[0]
            assert torch.allclose(out[row], want, atol=1e-5)
            shorter = model.unet(x[row : row + 1], timestep, lane.context_TD[None, :-1])[0]
            assert not torch.allclose(out[row], shorter, atol=1e-5), "a token more or less must matter here"
