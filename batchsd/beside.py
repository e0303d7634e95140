"""Work beside the network: the autoencoder decodes finished rows while the next steps of the others run.

    start(work) -> Future

On a GPU a thread of its own gives the work to a stream of its own, which first waits for what was on its way when
the work was handed over. A CPU has no second device: there the work is done at once, in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Start = Callable[[Callable[[], T]], "Future[T]"]


def in_place(work: Callable[[], T]) -> Future[T]:
    """Does the work before it returns."""
    future: Future[T] = Future()
    try:
        future.set_result(work())
    except Exception as error:
        future.set_exception(error)
    return future


@contextmanager
def beside(device: torch.device) -> Iterator[Start[Any]]:
    """Work in a thread, one piece after the other; on a GPU in a stream. What it returns must not be on its way still.

    The tensors that it takes over live until it has returned, so their memory is free again only when it is done.
    """
    gpu = device.type == "cuda"
    stream = torch.cuda.Stream(device) if gpu else None
    with ThreadPoolExecutor(1, "decode") as thread:

        def start(work: Callable[[], T]) -> Future[T]:
            handed_over = torch.cuda.current_stream(device).record_event() if gpu else None

            def go() -> T:
                with torch.cuda.stream(stream) if stream else nullcontext():
                    if stream and handed_over:
                        stream.wait_event(handed_over)
                    return work()

            return thread.submit(go)

        yield start


@contextmanager
def at_once() -> Iterator[Start[Any]]:
    yield in_place
