from __future__ import annotations

import threading

import pytest
import torch

from batchsd.beside import at_once, beside


@pytest.mark.parametrize("where", [at_once(), beside(torch.device("cpu"))], ids=["in place", "beside"])
def test_work_is_done_in_order_and_its_errors_come_out(where) -> None:
    done = []
    with where as start:
        futures = [start(lambda i=i: done.append(i) or i * 10) for i in range(5)]
        broken = start(lambda: 1 / 0)
        assert [future.result() for future in futures] == [0, 10, 20, 30, 40] and done == [0, 1, 2, 3, 4]
        with pytest.raises(ZeroDivisionError):
            broken.result()


def test_beside_does_not_wait() -> None:
    gate = threading.Event()
    with beside(torch.device("cpu")) as start:
        future = start(lambda: gate.wait(30))
        assert not future.done()
        gate.set()
        assert future.result()
