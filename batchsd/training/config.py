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


class Stage(_Section):
    """How a stage learns; see `loop.Optimisation`."""

    steps: int
    batch_size: int
    learning_rate: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.01
    ema: float = 0.999
    seed: int = 0

    def optimisation(self) -> Optimisation:
        return Optimisation(**{name: getattr(self, name) for name in Stage.model_fields})


class AutoencoderStage(Stage):
    """AutoencoderKL: channels a level, resnets a level, norm groups."""

    channels: tuple[int, ...]
    layers: int = 1
    groups: int = 32
    latent_channels: int = 4


class TextStage(Stage):
    """CLIP text model: width, layers, attention heads, tokens a caption."""

    width: int
    layers: int
    heads: int
    tokens: int = 77


class DenoiserStage(Stage):
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


class TrainingConfig(_Section):
    """The whole run. `pictures` is a Parquet of (image, caption); `work` keeps the states; `output` is made last."""

    pictures: Path
    work: Path
    output: Path
    autoencoder: AutoencoderStage
    text: TextStage
    unet: DenoiserStage
    threads: int = 0
    scenes: Scenes | None = None


def load_config(path: Path) -> TrainingConfig:
    """Reads the TOML; paths are relative to the file. Raises `UsageError` naming file and key."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path}: not readable as TOML ({error})") from None
    try:
        config = TrainingConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{path}: {key}: {first['msg']}") from None
    places = {name: path.parent / getattr(config, name) for name in ("pictures", "work", "output")}
    return config.model_copy(update=places)
