"""SD2-depth whole, its DPT-hybrid included: a picture of 256 pixels drawn over a map that is estimated on the way.

`make_depth` is diffusers' side, `measure_depth` ours; each runs in a process of its own.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.model.ldm import dpt_to_midas, to_ldm
from tests.model.test_depth import random_network
from tests.model.whole import CAT, GUIDANCE, NOTHING, PADS, SEED, SIDE, STEPS, drawn_by_engine, resident, whole


def looked_at() -> Image.Image:
    small = np.random.default_rng(0).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


@torch.no_grad()
def make_depth(folder: str) -> None:
    """diffusers' picture and transformers' map, and the checkpoint in both layouts."""
    from diffusers import DDIMScheduler, StableDiffusionDepth2ImgPipeline
    from safetensors.torch import save_file
    from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

    from batchsd.model.midas_names import CONFIG

    made, depth, to = whole("SD2-depth"), random_network(dict(CONFIG)), Path(folder)
    made.unet.register_to_config(sample_size=64)  # else diffusers asks None whether it is below 64
    processor = DPTImageProcessorPil(size=384, resample=2, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False,
        set_alpha_to_one=False,
    )  # fmt: skip
    pipe: Any = StableDiffusionDepth2ImgPipeline(
        vae=made.vae, text_encoder=made.texts[0], tokenizer=None, unet=made.unet, scheduler=scheduler,
        depth_estimator=depth, feature_extractor=processor,
    )  # fmt: skip
    ids = torch.tensor([words + [PADS["SD2"]] * (77 - len(words)) for words in (CAT, NOTHING)])
    states = made.texts[0](ids).last_hidden_state
    found = pipe(
        prompt_embeds=states[:1], negative_prompt_embeds=states[1:], image=looked_at(), strength=1.0,
        guidance_scale=GUIDANCE, num_inference_steps=STEPS, output_type="pt",
        generator=torch.Generator().manual_seed(SEED),
    )  # fmt: skip
    seen = depth(processor(looked_at(), return_tensors="pt").pixel_values).predicted_depth[0]
    torch.save({"drawn": found.images, "depth": seen}, to / "expected.pt")
    parts = {"unet": made.unet, "vae": made.vae, "text_encoder": made.texts[0], "depth_estimator": depth}
    for name, part in parts.items():
        part.save_pretrained(to / "folder" / name)
    midas = dpt_to_midas(depth.state_dict())
    inside = {f"depth_model.model.{name}": value.contiguous() for name, value in midas.items()}
    save_file({**to_ldm(made), **inside}, to / "ldm.safetensors")


def measure_depth(folder: str, form: str) -> None:
    """Prints the errors of the map (relative) and of the picture (of 0 to 1), and how much each varies."""
    from batchsd.model.checkpoint import load

    expected = torch.load(Path(folder) / "expected.pt", weights_only=True)
    model = load(Path(folder) / form)
    map_HW = model.estimate_depth(np.asarray(looked_at()))
    assert map_HW is not None
    seen = torch.from_numpy(map_HW)
    file = io.BytesIO()
    looked_at().save(file, "PNG")
    drawn = drawn_by_engine(model, "depth", {"init_image": file.getvalue(), "strength": 1.0})
    errors = {
        "depth": float((seen - expected["depth"]).abs().max() / expected["depth"].abs().max()),
        "drawn": float((drawn - expected["drawn"]).abs().max()),
    }
    deviations = [float(value.std()) for value in expected.values()]
    print(json.dumps({"errors": errors, "deviations": deviations, "peak": resident("VmHWM")}))
