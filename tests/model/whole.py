"""Networks in the exact configs of the published checkpoints, and what both libraries are asked to compute.

`make` and `make_xl` are diffusers' side, `measure` and `measure_xl` ours; each runs in a process of its own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from batchsd.model.checkpoint import Model
from tests.model.ldm import Networks, to_ldm, unet_to_ldm

SD1 = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
SD2 = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
SDXL = {
    "block_out_channels": [320, 640, 1280], "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048,
    "use_linear_projection": True, "transformer_layers_per_block": [1, 2, 10], "sample_size": 128,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
TEXTS = {
    "SD1": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
            "hidden_act": "quick_gelu"},
    "SD2": {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23,
            "hidden_act": "gelu"},
}  # fmt: skip
PADS = {"SD1": 49407, "SD2": 0}
CASES = {"SD1.5": 4, "SD2.1": 4, "SD2-depth": 5, "SD1.5-inpaint": 9}
"""Input channels of the U-Net."""
DRAWN = ("SD1.5", "SD2.1")
"""The cases of which a whole picture is drawn: 256 pixels, two steps, guidance 5."""
CAT, NOTHING = [49406, 320, 1125, 539, 320, 2368, 49407], [49406, 49407]
"""CLIP's numbers of "a photo of a cat" and of the empty text, before padding."""
SEED, STEPS, GUIDANCE, SIDE = 7, 2, 5.0, 256


def whole(case: str, in_channels: int | None = None) -> Networks:
    """SD1.5, SD2.1, ... with random weights; `in_channels` instead of the case's."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    family = case[:3]
    shape: dict[str, Any] = {**(SD1 if family == "SD1" else SD2), "in_channels": in_channels or CASES[case]}
    if case == "SD2.1":
        shape |= {"upcast_attention": True, "sample_size": 96}
    unet = UNet2DConditionModel(**shape).eval()
    if case == "SD2.1":  # velocity is told from noise by this tensor's deviation, which is 0 where nothing was learnt
        bias = unet.up_blocks[3].attentions[2].transformer_blocks[0].norm1.bias
        torch.nn.init.normal_(bias, std=0.2)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).eval()  # fmt: skip
    text = CLIPTextModel(CLIPTextConfig(**TEXTS[family], eos_token_id=49407)).eval()
    return Networks(family, unet, vae, [text])


def asked(channels: int, width: int) -> dict[str, Tensor]:
    """Inputs of a 256-pixel picture."""
    draw = torch.Generator().manual_seed(1)
    return {
        "latents": torch.randn(1, channels, 32, 32, generator=draw),
        "context": torch.randn(1, 77, width, generator=draw),
        "picture": torch.rand(1, 3, 256, 256, generator=draw) * 2 - 1,
    }


@torch.no_grad()
def outputs(made: Networks, case: str) -> dict[str, Tensor]:
    """What diffusers and transformers say."""
    given = asked(CASES[case], made.unet.config.cross_attention_dim)
    ids = torch.tensor([words + [PADS[made.family]] * (77 - len(words)) for words in (CAT, NOTHING)])
    states = made.texts[0](ids).last_hidden_state
    found = {
        "unet": made.unet(given["latents"], torch.tensor([801]), given["context"]).sample,
        "decode": made.vae.decode(given["latents"][:, :4]).sample,
        "encode": made.vae.encode(given["picture"]).latent_dist.mean,
        "text": states[:1],
    }
    return found | ({"drawn": drawn(made, states, case)} if case in DRAWN else {})


def drawn(made: Networks, states_2TD: Tensor, case: str) -> Tensor:
    """diffusers' whole picture, 0 to 1: 1 3 H W. It is given the text's states, so its tokenizer is not asked."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    kind = {"prediction_type": "v_prediction"} if case == "SD2.1" else {}
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False,
        set_alpha_to_one=False, **kind,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=made.vae, text_encoder=made.texts[0], tokenizer=None, unet=made.unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    found = pipe(
        prompt_embeds=states_2TD[:1], negative_prompt_embeds=states_2TD[1:], guidance_scale=GUIDANCE,
        num_inference_steps=STEPS, height=SIDE, width=SIDE, output_type="pt",
        generator=torch.Generator().manual_seed(SEED),
    )  # fmt: skip
    return found.images


def make(case: str, folder: str) -> None:
    """diffusers' side: the outputs, and the checkpoint in both layouts."""
    made, to = whole(case), Path(folder)
    torch.save(outputs(made, case), to / "expected.pt")
    for name, part in (("unet", made.unet), ("vae", made.vae), ("text_encoder", made.texts[0])):
        part.save_pretrained(to / "folder" / name)
    velocity = '{"_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "beta_schedule": "scaled_linear", '
    velocity += '"beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1, "set_alpha_to_one": false}'
    if case == "SD2.1":
        (to / "folder" / "scheduler").mkdir()
        (to / "folder" / "scheduler" / "scheduler_config.json").write_text(velocity)
    from safetensors.torch import save_file

    save_file(to_ldm(made), to / "ldm.safetensors")


def measure(case: str, folder: str, form: str) -> None:
    """Our side: prints the errors against the outputs, seconds to load, and the peak of memory over the weights."""
    from batchsd.model.checkpoint import load

    forget_peak()
    before, began = resident("VmRSS"), time.perf_counter()
    model = load(Path(folder) / form)
    seconds = time.perf_counter() - began
    for parameter in weights_of(model):
        parameter.sum()  # mapped weights count once they were looked at
    peak = (resident("VmHWM") - before) / sum(p.nbytes for p in weights_of(model))
    expected = torch.load(Path(folder) / "expected.pt", weights_only=True)
    found = ours(model, case)
    whole_range = {name: 1.0 if name == "drawn" else float(v.abs().max()) for name, v in expected.items()}
    errors = {name: float((found[name] - v).abs().max()) / whole_range[name] for name, v in expected.items()}
    spread = float(expected["drawn"].std()) if "drawn" in expected else None
    facts = {"errors": errors, "seconds": seconds, "peak": peak, "picture's deviation": spread}
    print(json.dumps(facts | {"reason": model.reasons[0], "prediction": model.reasons[1]}))


def weights_of(model: Model) -> list[Tensor]:
    return [p for part in (model.unet, model.vae, model.text.model) for p in part.parameters()]


@torch.no_grad()
def ours(model: Model, case: str) -> dict[str, Tensor]:
    given: dict[str, Any] = asked(CASES[case], model.unet.config.context_dim)
    found = {
        "unet": model.unet(given["latents"], torch.tensor([801]), given["context"]),
        "decode": model.vae.decode(given["latents"][:, :4]),
        "encode": model.vae.encode(given["picture"]).mean_BCHW,
        "text": model.encode_text(["a photo of a cat"]),
    }
    return found | ({"drawn": drawn_by_engine(model)} if case in DRAWN else {})


def drawn_by_engine(model: Model, task: str = "text", inputs: Mapping[str, Any] | None = None) -> Tensor:
    """Our whole picture, 0 to 1: 1 3 H W, by the engine, from the words on."""
    import pyarrow as pa

    from batchsd.defaults import register_tasks
    from batchsd.diffusion.builtin import BUILTIN
    from batchsd.engine import Engine, Settings
    from batchsd.types import Request, Shard

    asked_for = Request(
        key="r", index=0, repeat_index=0, prompt="a photo of a cat", negative_prompt=None, seed=SEED, steps=STEPS,
        guidance_scale=GUIDANCE, height=SIDE, width=SIDE, scheduler="ddim", task=task, inputs=inputs or {},
        columns=pa.table({"id": ["r"]}),
    )  # fmt: skip
    engine = Engine(
        model, schedulers=BUILTIN, tasks=register_tasks(), encode=lambda pixels: (pixels.tobytes(), "raw"),
        settings=Settings(lanes=2),
    )  # fmt: skip
    ((_, record),) = list(engine.generate([(Shard(1, 0, 1, 0, 0, 1), iter([asked_for]))]))
    assert record.image is not None, record.error
    pixels = torch.frombuffer(bytearray(record.image), dtype=torch.uint8).view(1, SIDE, SIDE, 3)
    return pixels.permute(0, 3, 1, 2) / 255


def asked_xl() -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Latents, timestep, text states, pooled text and sizes for SDXL's U-Net."""
    given = asked(4, 2048)
    pooled = torch.randn(1, 1280, generator=torch.Generator().manual_seed(2))
    sizes = torch.tensor([[256.0, 256, 0, 0, 256, 256]])
    return given["latents"], torch.tensor([801]), given["context"], {"text_embeds": pooled, "time_ids": sizes}


@torch.no_grad()
def make_xl(folder: str) -> None:
    """diffusers' SDXL U-Net: its output, itself as a folder (two shards with an index) and in LDM's names."""
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file

    torch.manual_seed(0)
    unet = UNet2DConditionModel(**SDXL).eval()
    latents, timestep, context, added = asked_xl()
    torch.save(unet(latents, timestep, context, added_cond_kwargs=added).sample, f"{folder}/expected.pt")
    unet.save_pretrained(f"{folder}/unet")
    state = {f"model.diffusion_model.{name}": v for name, v in unet_to_ldm(unet.state_dict()).items()}
    save_file(state, f"{folder}/ldm.safetensors")


@torch.no_grad()
def measure_xl(folder: str, form: str) -> None:
    """Our SDXL U-Net, of either layout; prints what `measure` prints."""
    from batchsd.model.checkpoint import place
    from batchsd.model.config import read_json, unet_config
    from batchsd.model.folder import NETWORK, network_state
    from batchsd.model.ldm_names import unet_state
    from batchsd.model.pages import mapped_ranges
    from batchsd.model.single_file import under
    from batchsd.model.unet import UNet
    from batchsd.model.weights import fill, on_meta, read_state

    forget_peak()
    before, began = resident("VmRSS"), time.perf_counter()
    unet = on_meta(UNet, unet_config(read_json(Path(folder) / "unet" / "config.json")))
    if form == "folder":
        state = network_state(Path(folder) / "unet", NETWORK)
    else:
        state = unet_state(under(read_state(Path(folder) / form), "model.diffusion_model."))
    fill(unet, state, "unet")
    place(unet, torch.device("cpu"), torch.float32, mapped_ranges())
    seconds = time.perf_counter() - began
    latents, timestep, context, added = asked_xl()
    found = unet(latents, timestep, context, added=added)
    # Attention and activations are in this one, because the call is what looks at the weights.
    peak = (resident("VmHWM") - before) / sum(p.nbytes for p in unet.parameters())
    expected = torch.load(Path(folder) / "expected.pt", weights_only=True)
    error = float((found - expected).abs().max() / expected.abs().max())
    print(json.dumps({"errors": {"unet": error}, "seconds": seconds, "peak": peak}))


def share(folder: str) -> None:
    """One of two processes with the same checkpoint: loads, looks at every weight, waits for a line, tells its share.

    The proportional set size counts a page that n processes map as 1/n in each.
    """
    from batchsd.model.checkpoint import load

    model = load(Path(folder))
    for parameter in weights_of(model):
        parameter.sum()
    print("ready", flush=True)
    input()
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    proportional = next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    weights = sum(p.nbytes for p in weights_of(model))
    print(json.dumps({"proportional": proportional, "resident": resident("VmRSS"), "weights": weights}), flush=True)
    input()


def resident(kind: str) -> int:
    """Memory of this process in bytes: VmRSS now, VmHWM the most since `forget_peak`."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[kind].split()[0])


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")
