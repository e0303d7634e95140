"""An autoencoder of its own, in place of the checkpoint's: a folder, or a file in diffusers' or LDM's names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from batchsd.model.config import read_json
from batchsd.model.folder import NETWORK, network_state
from batchsd.model.ldm_names import vae_state
from batchsd.model.shapes import vae_dict
from batchsd.model.single_file import under
from batchsd.model.weights import modern_names, read_state
from batchsd.types import UsageError


def read_vae(path: Path, beside: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of model.vae. A file says nothing of scaling: that is taken from the config `beside` it.

    Raises `UsageError` where there is no autoencoder.
    """
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        return read_json(folder / "config.json"), modern_names(network_state(folder, NETWORK))
    if not path.exists():
        raise UsageError(f"model.vae: no file or folder {path}")
    state = read_state(path)
    for prefix in ("first_stage_model.", "vae.", ""):
        inside = under(state, prefix)
        if "encoder.conv_in.weight" in inside:
            break
    else:
        raise UsageError(f"model.vae: {path}: no autoencoder in it ('encoder.conv_in.weight' is missing)")
    if any(re.match(r"encoder\.down\.\d", name) for name in inside):
        inside = vae_state(inside)
    networks = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    state = modern_names({name: value for name, value in inside.items() if name.startswith(networks)})
    kept = {key: beside[key] for key in ("scaling_factor", "force_upcast") if key in beside}
    return {**kept, **vae_dict(state)}, state
