"""Whole-size checkpoints against diffusers, one library in memory at a time (pytest -m heavy tests/model).

Random weights in the exact configs of SD1.5, SD2.1, SD2-depth and SD-inpainting, about 3.4 GB each in float32, and
SDXL's U-Net, 10 GB. Each is made by diffusers in a process of its own, which writes folder, LDM file and outputs;
another process loads each form with batchsd, and tells its error, seconds and peak memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CASES = {"SD1.5": 4, "SD2.1": 4, "SD2-depth": 5, "SD1.5-inpaint": 9}

THEIRS = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from tests.model.ldm import to_ldm
from tests.model.whole import outputs, whole
case, channels, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
made = whole(case, channels)
for name, part in (("unet", made.unet), ("vae", made.vae), ("text_encoder", made.texts[0])):
    part.save_pretrained(folder / "folder" / name)
torch.save(outputs(made, channels), folder / "expected.pt")
save_file(to_ldm(made), folder / "ldm.safetensors")
"""
OURS = """
import json, sys, time, torch
from pathlib import Path
from transformers import CLIPTextModel, CLIPTokenizer
from batchsd.model.checkpoint import load
from tests.model.whole import forget_peak, ours, resident
channels, folder, form = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
forget_peak()
before, began = resident("VmRSS"), time.perf_counter()
model = load(folder / form)
seconds = time.perf_counter() - began
for part in (model.unet, model.vae, model.text.model):
    for value in part.parameters():
        value.sum()  # mapped weights count once they were looked at
after = resident("VmHWM")
expected = torch.load(folder / "expected.pt", weights_only=True)
errors = {k: float((v - expected[k]).abs().max() / expected[k].abs().max()) for k, v in ours(model, channels).items()}
parts = [model.unet, model.vae, model.text.model]
weights = sum(p.nbytes for part in parts for p in part.parameters())
print(json.dumps({"errors": errors, "seconds": seconds, "peak": (after - before) / weights}))
"""


def run(code: str, *arguments: object) -> str:
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.heavy
@pytest.mark.parametrize("case", CASES)
def test_whole_size_equals_diffusers(tmp_path: Path, case: str) -> None:
    run(THEIRS, case, CASES[case], tmp_path)
    for form in ("folder", "ldm.safetensors"):
        found = json.loads(run(OURS, CASES[case], tmp_path, form).splitlines()[-1])
        print(case, form, found)
        assert max(found["errors"].values()) < 1e-4
        assert found["peak"] < 1.15  # times the weights


THEIRS_XL = """
import sys, torch
from diffusers import UNet2DConditionModel
from tests.model.whole import SDXL, asked_xl
torch.manual_seed(0)
unet = UNet2DConditionModel(**SDXL).eval()
latents, timestep, context, added = asked_xl()
with torch.no_grad():
    expected = unet(latents, timestep, context, added_cond_kwargs=added).sample
torch.save(expected, sys.argv[1] + "/expected.pt")
unet.save_pretrained(sys.argv[1] + "/unet")
"""
OURS_XL = """
import sys, torch
from pathlib import Path
from batchsd.model.config import read_json, unet_config
from batchsd.model.folder import NETWORK, network_state
from batchsd.model.unet import UNet
from batchsd.model.weights import fill, on_meta
from tests.model.whole import asked_xl
folder = Path(sys.argv[1])
unet = on_meta(UNet, unet_config(read_json(folder / "unet/config.json")))
fill(unet, network_state(folder / "unet", NETWORK), "unet")
expected = torch.load(folder / "expected.pt", weights_only=True)
with torch.no_grad():
    latents, timestep, context, added = asked_xl()
    found = unet(latents, timestep, context, added=added)
print(float((found - expected).abs().max() / expected.abs().max()))
"""


@pytest.mark.heavy
def test_sdxl_unet_of_whole_size_equals_diffusers(tmp_path: Path) -> None:
    run(THEIRS_XL, tmp_path)
    error = float(run(OURS_XL, tmp_path).splitlines()[-1])
    print("SDXL U-Net", error)
    assert error < 1e-4
