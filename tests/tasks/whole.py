"""Whole pictures of conditioned rows at SD1.5's exact size, random weights: what each library draws, a process each.

256 pixels, two steps of DDIM, guidance 5. `make` is diffusers' side, `measure` ours.
"""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tests.model.whole import CAT, GUIDANCE, NOTHING, PADS, SEED, SIDE, STEPS, forget_peak, resident, weights_of, whole

CHECKPOINTS: dict[int, dict[str, dict[str, float]]] = {
    4: {"image": {"strength": 0.5}, "inpaint": {"strength": 1.0}},
    9: {"inpaint": {"strength": 1.0}},
    8: {"edit": {"image_guidance_scale": 1.5}},
}
"""Input channels -> the tasks that are drawn with them, and what their rows say."""
PIPELINES = {
    "image": "StableDiffusionImg2ImgPipeline",
    "inpaint": "StableDiffusionInpaintPipeline",
    "edit": "StableDiffusionInstructPix2PixPipeline",
}


def picture() -> Image.Image:
    """Soft random colours."""
    small = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def mask() -> Image.Image:
    """White on the right."""
    return Image.fromarray(np.repeat(np.where(np.arange(SIDE) < SIDE // 2, 0, 255)[None], SIDE, 0).astype(np.uint8))


@torch.no_grad()
def make(channels: str, folder: str) -> None:
    """The checkpoint, and diffusers' pictures, 0 to 1: 1 3 H W."""
    made = whole("SD1.5", int(channels))
    for name, part in (("unet", made.unet), ("vae", made.vae), ("text_encoder", made.texts[0])):
        part.save_pretrained(Path(folder) / "folder" / name)
    ids = torch.tensor([words + [PADS["SD1"]] * (77 - len(words)) for words in (CAT, NOTHING)])
    states_2TD = made.texts[0](ids).last_hidden_state
    tasks = CHECKPOINTS[int(channels)].items()
    torch.save({task: theirs(made, states_2TD, task, said) for task, said in tasks}, Path(folder) / "expected.pt")


def theirs(made: Any, states_2TD: Tensor, task: str, said: dict[str, float]) -> Tensor:
    import diffusers

    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False,
        set_alpha_to_one=False,
    )  # fmt: skip
    pipe = getattr(diffusers, PIPELINES[task])(
        vae=made.vae, text_encoder=made.texts[0], tokenizer=None, unet=made.unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    more = {"mask_image": mask(), "height": SIDE, "width": SIDE} if task == "inpaint" else {}
    return pipe(
        image=picture(), prompt_embeds=states_2TD[:1], negative_prompt_embeds=states_2TD[1:],
        guidance_scale=GUIDANCE, num_inference_steps=STEPS, output_type="pt",
        generator=torch.Generator().manual_seed(SEED), **said, **more,
    ).images  # fmt: skip


def measure(channels: str, folder: str) -> None:
    """Our pictures: prints, for each task, the error, the picture's deviation, seconds, and peak memory in GB."""
    from batchsd.model.checkpoint import load

    model = load(Path(folder) / "folder")
    expected = torch.load(Path(folder) / "expected.pt", weights_only=True)
    found = {}
    for task, said in CHECKPOINTS[int(channels)].items():
        forget_peak()
        began = time.perf_counter()
        drawn = ours(model, task, said)
        found[task] = {
            "error": float((drawn - expected[task]).abs().max()),
            "deviation": float(expected[task].std()),
            "seconds": round(time.perf_counter() - began, 1),
            "peak GB": round(resident("VmHWM") / 1e9, 2),
            "weights GB": round(sum(p.nbytes for p in weights_of(model)) / 1e9, 2),
        }
    print(json.dumps(found))


def ours(model: Any, task: str, said: dict[str, float]) -> Tensor:
    import pyarrow as pa

    from batchsd.defaults import register_tasks
    from batchsd.diffusion.builtin import BUILTIN
    from batchsd.engine import Engine, Settings
    from batchsd.types import Request, Shard

    inputs = {"init_image": png(picture()), "mask": png(mask()), **said}
    row = Request(
        key="r", index=0, repeat_index=0, prompt="a photo of a cat", negative_prompt=None, seed=SEED, steps=STEPS,
        guidance_scale=GUIDANCE, height=SIDE, width=SIDE, scheduler="ddim", task=task, inputs=inputs,
        columns=pa.table({"id": ["r"]}),
    )  # fmt: skip
    engine = Engine(
        model, schedulers=BUILTIN, tasks=register_tasks(), encode=lambda pixels: (pixels.tobytes(), "raw"),
        settings=Settings(lanes=3),
    )  # fmt: skip
    ((_, record),) = list(engine.generate([(Shard(1, 0, 1, 0, 0, 1), iter([row]))]))
    assert record.image is not None, record.error
    pixels = torch.frombuffer(bytearray(record.image), dtype=torch.uint8).view(1, SIDE, SIDE, 3)
    return pixels.permute(0, 3, 1, 2) / 255


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
