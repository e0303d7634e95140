"""A training run as a TOML file: where the pictures are, the three networks' shapes, how long each learns."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from batchsd.training.loop import Optimisation
from batchsd.types import UsageError


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AutoencoderStage(Optimisation):
    """AutoencoderKL: channels a level, resnets a level, norm groups."""

    channels: tuple[int, ...]
    layers: int = 1
    groups: int = 32
    latent_channels: int = 4


class TextStage(Optimisation):
    """CLIP text model: width, layers, attention heads, tokens a caption."""

    width: int
    layers: int
    heads: int
    tokens: int = 77


class DenoiserStage(Optimisation):
    """U-Net: channels a level, resnets a level, width of a head."""

    channels: tuple[int, ...]
    layers: int = 1
    head_width: int = 32
    groups: int = 32
    caption_dropout: float = 0.1
    prediction_type: Literal["epsilon", "v_prediction"] = "v_prediction"


class Scenes(_Section):
    """Which procedural scenes to draw where `pictures` does not exist yet (see `scenes`)."""

    count: int
    seed: int = 0
    size: int = 64


class DepthStage(Optimisation):
    """How a text model learns to follow depth; `holds` says what the numbers of the `depth` column mean."""

    caption_dropout: float = 0.1
    holds: Literal["distance", "nearness"] = "nearness"


class EstimatorStage(Optimisation):
    """A DPT of four layers: width, attention heads, pixels of a patch's side, channels where its stages meet."""

    width: int = 96
    heads: int = 4
    patch: int = 16
    fusion: int = 32


class _Run(_Section):
    """`pictures` is a Parquet of (image, caption); `work` keeps the states; `output` is made last."""

    pictures: Path
    work: Path
    output: Path
    threads: int = 0
    scenes: Scenes | None = None


class TrainingConfig(_Run):
    """A model from nothing."""

    autoencoder: AutoencoderStage
    text: TextStage
    unet: DenoiserStage


class DepthConfig(_Run):
    """A depth model made of the text model `base`, and its depth estimator; `pictures` has a column `depth` too."""

    base: Path
    depth: DepthStage
    estimator: EstimatorStage


def load_config(path: Path) -> TrainingConfig | DepthConfig:
    """Reads the TOML; paths are relative to the file; with a `base` it tunes that. Raises `UsageError`: file, key."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path}: not readable as TOML ({error})") from None
    try:
        config = (DepthConfig if "base" in values else TrainingConfig).model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{path}: {key}: {first['msg']}") from None
    paths = ("pictures", "work", "output", "base")
    places = {name: path.parent / getattr(config, name) for name in paths if name in type(config).model_fields}
    return config.model_copy(update=places)
