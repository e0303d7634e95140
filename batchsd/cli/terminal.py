"""What a person sees and presses while a command runs: lines on stderr, the progress line, signals."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from batchsd.progress import Snapshot
    from batchsd.stop import Stop

LOG_EVERY = 10.0  # seconds, where there is no terminal


def say(text: str) -> None:
    click.echo(text, err=True)


class Display:
    """Progress on stderr: one living line on a terminal, else a log line every `LOG_EVERY` seconds."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            BarColumn(24), TextColumn("{task.description}"), console=self._console, transient=True
        )
        self._task = self._bar.add_task("starting the workers", total=None)
        self._said = time.monotonic()

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def show(self, at: Snapshot) -> None:
        from batchsd.progress import line

        if self._console.is_terminal:
            if at.rate:
                self._bar.update(self._task, total=at.planned, completed=at.done, description=line(at))
        elif time.monotonic() - self._said >= LOG_EVERY:
            self._said = time.monotonic()
            say(f"{time.strftime('%H:%M:%S')} {line(at)}")

    def log(self, text: str) -> None:
        if self._console.is_terminal:
            self._console.print(text, markup=False)
        else:
            say(f"{time.strftime('%H:%M:%S')} {text}")


@contextmanager
def signals(stop: Stop) -> Iterator[None]:
    """The first signal asks for a clean stop; the second, or the end of the grace, stops wherever the process is.

    A timer sees to `run.deadline` and the grace: between two rows on a slow machine nobody else may look for hours.
    """
    from batchsd.stop import AtOnce

    codes = {signal.SIGINT: ("Ctrl-C", 130), signal.SIGTERM: ("SIGTERM", 75), signal.SIGUSR1: ("SIGUSR1", 75)}
    asked_twice = False

    def handle(number: int, frame: Any) -> None:
        nonlocal asked_twice
        name, code = codes[signal.Signals(number)]
        if asked_twice:
            os._exit(code)
        if stop.asked:
            asked_twice = True
            raise AtOnce
        stop.ask(name, code)
        begin_to_end()

    def begin_to_end() -> None:
        signal.setitimer(signal.ITIMER_REAL, stop.grace + 1)
        text = f"{stop.reason}: stopping after the shards in flight, {stop.grace:g} s at most (again: at once)\n"
        os.write(sys.stderr.fileno(), text.encode())  # print itself may have been interrupted

    def alarm(number: int, frame: Any) -> None:
        if stop.overdue:
            raise AtOnce
        if stop.asked:
            begin_to_end()

    before = {number: signal.signal(number, handle) for number in codes}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, alarm)
    if stop.deadline is not None:
        signal.setitimer(signal.ITIMER_REAL, max(0.01, stop.deadline - time.time() + 0.01))
    try:
        yield
    except AtOnce:
        raise stop.error() from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, old in before.items():
            signal.signal(number, old)


def end(reason: str) -> None:
    """End this process from a thread, whatever its other threads hang in."""
    say(f"batchsd: {reason}")
    sys.stderr.flush()
    os._exit(3)
