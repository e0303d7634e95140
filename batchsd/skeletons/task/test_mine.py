"""The contract of tasks, and the weights of this one."""

import torch
from mine import register_tasks

from batchsd.testing import TinyModel, check_task, example_request

ROW = example_request(task="mine", inputs={"also": "a blue cube"})


def test_contract():
    check_task(register_tasks()["mine"], ROW)


def test_half_and_half():
    told = register_tasks()["mine"](ROW, TinyModel(), torch.Generator().manual_seed(0))
    assert [branch.prompt for branch in told.branches[1:]] == [ROW.prompt, "a blue cube"]
    negative, one, other = told.weights(1.0)
    assert one == other and negative + one + other == 1
