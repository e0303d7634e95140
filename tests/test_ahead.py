"""Work begun before it is asked for: in order, in bounds, and never stuck."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import batchsd.ahead
from batchsd.ahead import MOST_ITEMS, ahead


@pytest.fixture
def pool():
    with ThreadPoolExecutor(4) as pool:
        yield pool


def test_results_come_in_order_whatever_finishes_first(pool):
    def work(n: int) -> int:
        time.sleep(0.002 * (n % 3))
        return n * n

    assert list(ahead(work, range(200), pool, lambda found: 1)) == [n * n for n in range(200)]


def test_waits_pass_while_others_work(pool):
    """What comes after the first is begun before it is asked for."""
    begun = threading.Semaphore(0)

    def work(n: int) -> int:
        begun.release()
        return n

    results = ahead(work, range(10), pool, lambda found: 0)
    assert next(results) == 0
    for _ in range(10):
        assert begun.acquire(timeout=10)
    results.close()


def test_no_more_bytes_wait_than_may(pool, monkeypatch):
    monkeypatch.setattr(batchsd.ahead, "MOST_BYTES", 100)
    held, most, lock = 0, 0, threading.Lock()

    def work(n: int) -> int:
        nonlocal held, most
        with lock:
            held += 60
            most = max(most, held)
        return n

    for n, found in enumerate(ahead(work, range(100), pool, lambda found: 60)):
        assert n == found
        time.sleep(0.0005)
        with lock:
            held -= 60
    assert most <= 100 + 60 * (4 + 1), "the bound, one more of each thread, and the one that is looked at"
    assert most >= 120, "some are ahead"


def test_items_are_taken_as_there_is_room(pool):
    taken = []
    results = ahead(lambda n: n, (taken.append(n) or n for n in range(1000)), pool, lambda found: 0)
    next(results)
    assert len(taken) == MOST_ITEMS
    results.close()


def test_an_error_is_raised_in_its_place_and_ends_the_rest(pool):
    def work(n: int) -> int:
        if n == 3:
            raise OSError("the third")
        return n

    results = ahead(work, range(10), pool, lambda found: 0)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the third"):
        next(results)


def test_one_that_is_given_up_leaves_no_thread_waiting(monkeypatch):
    monkeypatch.setattr(batchsd.ahead, "MOST_BYTES", 1)
    pool = ThreadPoolExecutor(4)
    results = ahead(lambda n: n, range(1000), pool, lambda found: 5)
    assert next(results) == 0
    results.close()
    pool.shutdown(wait=True)  # hangs where a thread waits for room for ever
