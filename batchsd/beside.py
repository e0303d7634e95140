"""Work beside the main line on the same device: on a GPU a stream of its own, elsewhere nothing special.

A copy to the host waits for all work of its stream. Pictures that are decoded on the network's stream would
therefore hold up the next step; on their own they wait for themselves only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor


class Beside:
    """One side line of a device."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def after(self, x: Tensor) -> Callable[[], AbstractContextManager[None]]:
        """Called where `x` was made; gives the context, for another thread, in which `x` may be read."""
        stream = self._stream
        if stream is None:
            return nullcontext
        made = torch.cuda.Event()
        made.record(torch.cuda.current_stream(x.device))

        @contextmanager
        def context() -> Iterator[None]:
            with torch.cuda.stream(stream):
                stream.wait_event(made)
                x.record_stream(stream)  # its memory is not given away while it is read here
                yield

        return context
