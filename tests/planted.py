"""A plugin whose task goes wrong in the way that the row's `plant` column asks for; else it is the text task."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from batchsd import hookimpl
from batchsd.tasks.text import TextTask
from batchsd.types import Conditioning, Kept, ModelFacts, Request


class Planted:
    columns = ("plant", *TextTask().columns)

    def __call__(self, request: Request, model: ModelFacts, generator: torch.Generator) -> Conditioning:
        plain = TextTask()(request, model, generator)
        plant: Any = request.inputs["plant"]
        if plant == "raises":
            raise KeyError("no such thing")
        if plant == "oom":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if plant == "nan":
            return replace(plain, noise_CHW=plain.noise_CHW * float("nan"))
        if plant == "flat":
            _, height, width = (side * model.scale_factor for side in plain.noise_CHW.shape)
            nothing = np.zeros((height, width), dtype=bool)
            return replace(plain, kept=Kept(nothing, np.full((height, width, 3), 9, np.uint8)))
        if plant == "kills":
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)
        if plant == "hangs":
            time.sleep(3600)
        return plain


@hookimpl
def register_tasks() -> dict[str, Planted]:
    return {"planted": Planted()}
