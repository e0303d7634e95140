from __future__ import annotations

import random

import pytest
from fakes import draw, read_rows, shards_of

from batchsd.order import RowOrder
from batchsd.types import Record


@pytest.mark.parametrize("in_memory", [1, 2**20], ids=["on disk", "in memory"])
def test_any_order_in_row_order_out(in_memory: int) -> None:
    records = [draw(request) for request in read_rows(shards_of(1, 200)[0])]
    records[7] = Record(records[7].request, "nan", "no picture")
    shuffled = random.Random(0).sample(records, len(records))
    order = RowOrder(in_memory)
    assert [record for given in shuffled for record in order.put(given)] == records


def test_memory_of_early_pictures_is_given_back() -> None:
    first, *later = [draw(request) for request in read_rows(shards_of(1, 50)[0])]
    order = RowOrder(in_memory=1)
    for record in later:
        assert list(order.put(record)) == []
    assert order._pictures.tell() > 0
    list(order.put(first))
    assert order._pictures.seek(0, 2) == 0


def test_a_row_that_comes_twice_is_refused() -> None:
    first, second = [draw(request) for request in read_rows(shards_of(1, 2)[0])]
    order = RowOrder()
    list(order.put(second))
    with pytest.raises(ValueError, match="row 1 of the shard came twice"):
        list(order.put(second))
    list(order.put(first))
    with pytest.raises(ValueError, match="row 0 of the shard came twice"):
        list(order.put(first))
