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
    from batchsd.drive import Stop
    from batchsd.progress import Snapshot

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
    """The first signal asks for a clean stop, the second ends the process at once."""
    codes = {signal.SIGINT: ("Ctrl-C", 130), signal.SIGTERM: ("SIGTERM", 75), signal.SIGUSR1: ("SIGUSR1", 75)}

    def handle(number: int, frame: Any) -> None:
        name, code = codes[signal.Signals(number)]
        if stop.asked:
            raise SystemExit(code)
        stop.ask(name, code)
        text = f"{name}: stopping after the shards in flight, {stop.grace:g} s at most (again: at once)\n"
        os.write(sys.stderr.fileno(), text.encode())  # print itself may have been interrupted

    before = {number: signal.signal(number, handle) for number in codes}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
