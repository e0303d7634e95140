"""The contract of samplers: a table that equals the function, and Gaussian data brought back in mean and deviation."""

from mine import register_schedulers

from batchsd.testing import check_scheduler


def test_contract():
    check_scheduler(register_schedulers()["mine"])


def test_one_call_a_step():
    program = register_schedulers()["mine"].program({"beta_schedule": "scaled_linear"}, steps=10)
    assert len(program) == 10
