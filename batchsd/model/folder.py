"""A folder in diffusers' layout taken apart: one file, shards with an index, a variant (fp16), or old pickles.

What a folder lacks and a family fixes is filled in, and said: the tokenizer where the vocabulary is CLIP's own,
the scheduler.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from batchsd.model.config import read_json
from batchsd.model.families import BY_CONTEXT, SD1, SDXL, TASKS, scheduler_config
from batchsd.model.parts import DepthParts, Parts, TextParts
from batchsd.model.tokenizer import CLIP_VOCABULARY, clip_tokenizer, load_tokenizer
from batchsd.model.weights import modern_names, read_state
from batchsd.types import UsageError

NETWORK, TEXT = "diffusion_pytorch_model", "model"


def read_folder(path: Path, vae: bool = True) -> Parts:
    """The parts of a folder with unet/, vae/, text_encoder/ (and text_encoder_2/), ...; `vae` False: without it.

    Raises `UsageError` naming what is missing or broken.
    """
    if not (path / "unet").is_dir():
        raise UsageError(f"model.path: {path} is not a folder in diffusers layout (model_index.json, unet/, vae/, ...)")
    index = path / "model_index.json"
    facts = read_json(index) if index.exists() else {}
    if facts.get("requires_aesthetics_score"):
        raise UsageError(f"{path}: this is the SDXL refiner, which is not supported; take the SDXL base")
    unet_config = read_json(path / "unet" / "config.json")
    unet = network_state(path / "unet", NETWORK)
    vae_file = path / "vae" / "config.json"
    vae_config = read_json(vae_file) if vae or vae_file.exists() else {}
    vae_state = modern_names(network_state(path / "vae", NETWORK)) if vae else {}
    width = unet_config.get("cross_attention_dim", 1280)
    family = BY_CONTEXT.get(width, SD1)
    name = family.name if width in BY_CONTEXT else "SD-like"
    channels = unet_config.get("in_channels", 4)
    task = TASKS.get(channels, f"{channels} channels")
    reasons = [f"{name} {task} because unet/config.json has in_channels {channels}, cross_attention_dim {width}"]
    scheduler = path / "scheduler" / "scheduler_config.json"
    if scheduler.exists():
        chosen = read_json(scheduler)
        said = "says so" if "prediction_type" in chosen else "says nothing, which means this"
        reasons.append(f"prediction type {chosen.get('prediction_type', 'epsilon')} because {scheduler.name} {said}")
        reasons.append(f"scheduler {chosen.get('_class_name', 'unnamed')} because {scheduler.name} says so")
    else:
        chosen = scheduler_config(family, task, "epsilon")
        reasons.append(f"scheduler {chosen['_class_name']} with epsilon: the folder has none, {name} mostly has this")
    two = (path / "text_encoder_2").is_dir()
    texts = tuple(
        _text(path, suffix, pad) for suffix, pad in zip(("", "_2"), SDXL.pads if two else family.pads, strict=False)
    )
    zero = bool(facts.get("force_zeros_for_empty_prompt", two))
    return Parts(
        str(path), f"{name} {task}", unet_config, unet, vae_config, vae_state, texts, chosen, zero, tuple(reasons),
        _depth(path),
    )  # fmt: skip


def _text(path: Path, suffix: str, pad: str) -> TextParts:
    folder, words = path / f"text_encoder{suffix}", path / f"tokenizer{suffix}"
    config = read_json(folder / "config.json")
    load: Any = partial(load_tokenizer, words)
    if not words.is_dir() and config.get("vocab_size") == CLIP_VOCABULARY:
        load = partial(clip_tokenizer, pad)
    return TextParts(config, network_state(folder, TEXT), load, str(folder))


def _depth(path: Path) -> DepthParts | None:
    """SD2-depth's depth network; None where the folder has none."""
    folder, extractor = path / "depth_estimator", path / "feature_extractor" / "preprocessor_config.json"
    if not folder.is_dir():
        return None
    preprocessor = read_json(extractor) if extractor.exists() else {}
    return DepthParts(read_json(folder / "config.json"), network_state(folder, TEXT), str(folder), preprocessor)


def network_state(folder: Path, stem: str) -> dict[str, Tensor]:
    """All tensors of one network of the folder. Raises `UsageError` where it has no weights."""
    for suffix in ("safetensors", "bin"):
        # transformers calls its pickles pytorch_model.bin
        name = "pytorch_model" if stem == TEXT and suffix == "bin" else stem
        if (folder / f"{name}.{suffix}").exists():
            return read_state(folder / f"{name}.{suffix}")
        # A variant's name stands before the last suffix: model.fp16.safetensors, model.safetensors.index.fp16.json
        if indices := list(folder.glob(f"{name}.{suffix}.index*.json")):
            return _sharded(folder, min(indices, key=_preference))
        if variants := [file for file in folder.glob(f"{name}.*.{suffix}") if "-of-" not in file.name]:
            return read_state(min(variants, key=_preference))
    raise UsageError(f"{folder / (stem + '.safetensors')}: missing; a checkpoint folder in diffusers layout has it")


def _preference(file: Path) -> tuple[bool, int, str]:
    """Rather the averaged weights than `non_ema`, which are for training on."""
    return "non_ema" in file.name, len(file.name), file.name


def _sharded(folder: Path, index: Path) -> dict[str, Tensor]:
    try:
        files = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()), key=str)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise UsageError(f"{index}: not an index of shards (a JSON object with weight_map)") from None
    if strange := [name for name in files if not isinstance(name, str) or Path(name).name != name]:
        raise UsageError(f"{index}: names the shard {str(strange[0])!r}, which does not lie beside it")
    state: dict[str, Tensor] = {}
    for name in files:
        state |= read_state(folder / name)
    return state
