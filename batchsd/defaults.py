"""What batchsd itself brings, through the same hooks as any other plugin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from batchsd import hookimpl
from batchsd.types import Sink, Task

if TYPE_CHECKING:
    from batchsd.diffusion.scheduler import Scheduler


@hookimpl
def register_schedulers() -> Mapping[str, Scheduler]:
    from batchsd.diffusion.builtin import BUILTIN

    return BUILTIN


@hookimpl
def register_tasks() -> Mapping[str, Task]:
    from batchsd.tasks.depth import DepthTask
    from batchsd.tasks.edit import EditTask
    from batchsd.tasks.image import ImageTask
    from batchsd.tasks.inpaint import InpaintTask
    from batchsd.tasks.text import TextTask

    return {
        "text": TextTask(),
        "image": ImageTask(),
        "depth": DepthTask(),
        "inpaint": InpaintTask(),
        "edit": EditTask(),
    }


@hookimpl
def register_sinks() -> Mapping[str, Sink]:
    from batchsd.sinks.aside import Aside
    from batchsd.sinks.folder import FolderSink
    from batchsd.sinks.parquet import ParquetSink
    from batchsd.sinks.webdataset import TarSink

    return {"parquet": ParquetSink(), "webdataset": Aside(TarSink()), "folder": Aside(FolderSink())}
