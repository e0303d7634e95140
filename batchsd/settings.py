"""The sections of a job file: every key, its type, its range and its default.

Values must have the type that is written here ("20" is no number); an unknown key is an error.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MIN_SIZE, MAX_SIZE = 16, 4096  # pixels: latents of 2 to 512; no SD checkpoint draws sense beyond either end
MAX_STEPS = 1000  # training steps of every SD checkpoint
MAX_SEED = 2**32 - 1  # torch's CPU generator uses the low 32 bits

HOST = re.compile(r"[\w-]+(?:\.[\w-]+)+(?::\d+)?")

Positive = Annotated[int, Field(ge=1)]
Auto = Literal["auto"]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Size = Annotated[int, Field(ge=MIN_SIZE, le=MAX_SIZE, multiple_of=8)]
Text = Annotated[str, Field(min_length=1)]
# Lists and tables arrive from TOML as lists; frozen jobs hold tuples.
Texts = Annotated[tuple[Text, ...], Field(strict=False)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Input(Section):
    manifest: Text | Annotated[Texts, Field(min_length=1)] = Field(
        description="the Parquet file, glob, folder or s3:// URI that holds the prompts, or a list of them"
    )
    columns: dict[str, Text] = Field(default={}, description="ours = theirs, as { prompt = 'caption' }")
    prompt: str | None = Field(
        default=None, description="template over the manifest's columns; {{ is a brace"
    )
    repeat: Positive = Field(default=1, description="pictures a row")
    allow_hosts: Texts = Field(
        default=(), description="hosts from which condition images may be fetched over https: images.example.org"
    )

    @field_validator("allow_hosts")
    @classmethod
    def _hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for host in value:
            if not HOST.fullmatch(host):
                raise ValueError(f"{host!r}: should be a host's name, as images.example.org or images.example.org:8443")
        return value


class Model(Section):
    path: Text = Field(description="a shipped name, a folder, a single file, or org/name in the hub cache")
    vae: str = ""
    loras: Texts = Field(default=(), description="files, each with its weight behind a colon: a.safetensors:0.8")
    embeddings: Texts = ()
    clip_skip: Annotated[int, Field(ge=0, le=12)] = 0
    tokenizer: str = ""
    ema: bool = Field(default=False, description="a single file's averaged U-Net, where it holds two")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    device: Text = "auto"
    backend: Literal["eager", "compile"] = "eager"


class Sampler(Section):
    """A manifest column of the same name overrides any of these for its row."""

    scheduler: Text = Field(
        default="dpmpp_2m", description="our name, A1111's or diffusers'; 'model': the checkpoint's own"
    )
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] = 20
    guidance_scale: Finite = 5.0
    height: Size | None = Field(
        default=None, description="pixels; left out: the model's native size, or the init image's"
    )
    width: Size | None = None
    spacing: Literal["", "leading", "trailing", "linspace"] = ""
    sigmas: Literal[
        "",
        "model",
        "karras",
        "exponential",
        "beta",
        "sgm_uniform",
        "align_your_steps",
        "align_your_steps_sdxl",
    ] = ""
    eta: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="noise of stochastic samplers; left out: each sampler's own"
    )
    guidance_rescale: Annotated[float, Field(ge=0, le=1)] = 0.0
    guidance_interval: Annotated[tuple[float, ...], Field(strict=False)] = ()
    final_sigma: Literal["", "zero", "sigma_min"] = ""

    @field_validator("guidance_interval")
    @classmethod
    def _interval(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if value and not (len(value) == 2 and value[0] <= value[1]):
            raise ValueError("should be empty or two numbers, the lower one first")
        return value


class Conditioning(Section):
    """A manifest column of the same name overrides any of these but the last three for its row."""

    task: Text = "text"
    strength: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None, description="how much of the init image is drawn anew; left out: as diffusers' pipeline"
    )
    image_guidance_scale: Finite = Field(default=1.5, description="edit: how closely to follow the image")
    resize: Literal["crop", "pad", "stretch"] = Field(
        default="crop", description="how an image of another aspect is brought to the row's size"
    )
    paste_back: bool = Field(
        default=False, description="inpaint: unmasked pixels are the init image's own, to the bit"
    )
    depth_convention: Literal["diffusers", "stability"] = Field(
        default="diffusers",
        description="depth: how the checkpoint's depth network is fed; squashed to 384 x 384, or the aspect kept",
    )
    keep_depth: bool = Field(default=False, description="depth: a column `estimated_depth`, 16-bit PNG, near is white")
    prompt_syntax: Literal["plain", "a1111"] = "plain"
    long_prompts: Literal["truncate", "chunk"] = "truncate"


class Image(Section):
    """The picture's file format. PNG takes `compress_level`, JPEG and WebP take `quality`."""

    format: Literal["png", "jpeg", "webp"] = "png"
    compress_level: Annotated[int, Field(ge=0, le=9)] | None = None
    quality: Annotated[int, Field(ge=1, le=100)] | None = None

    @field_validator("format", mode="before")
    @classmethod
    def _jpg(cls, value: Any) -> Any:
        return "jpeg" if value == "jpg" else value

    @model_validator(mode="after")
    def _option_of_this_format(self) -> Image:
        other = "quality" if self.format == "png" else "compress_level"
        if getattr(self, other) is not None:
            raise ValueError(f"format {self.format!r} has no {other!r}")
        return self

    def options(self) -> dict[str, Any]:
        """What was said, without what was not: `{"format": "png"}`."""
        return self.model_dump(exclude_none=True)


class Output(Section):
    uri: Text = Field(description="the folder that the run makes; a path or s3://")
    sink: Text = "parquet"
    rows_per_shard: Auto | Positive = "auto"
    image: Image = Image()
    columns: dict[str, Text] = Field(default={}, description="ours = theirs, as { prompt = 'text' }")
    failed: Literal["inline", "aside"] = "inline"
    embed: Annotated[tuple[Literal["parameters", "row", "xmp"], ...], Field(strict=False)] = Field(
        default=("parameters", "row", "xmp"), description="what a picture file says of itself; [] is nothing"
    )
    keep_inputs: bool = False
    scores: Texts = Field(default=(), description="columns of numbers that plugins give each picture")
    filters: Texts = Field(
        default=(), description="what a picture must pass, in this order: a filter's name, or 'score > number'"
    )
    rejected: Literal["drop", "keep"] = Field(
        default="drop", description="the picture of a row that a filter rejects: null, or there as drawn"
    )


class Run(Section):
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    batch_size: Auto | Positive = "auto"
    # An integer is a count of rows, a float a share: 1 is one row, 1.0 is every row.
    max_failed: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, le=1)] = 0.01
    strict: bool = False
    deterministic: bool = False
    deadline: str = Field(default="", description="when to stop: '2026-11-23T05:00' or '05:00'")
    grace: Annotated[float, Field(ge=0)] = 25
    scratch: str = ""
    timeout: Auto | Annotated[float, Field(ge=0)] = Field(
        default="auto", description="seconds after which a silent batch is taken for hung; 0: never"
    )

    @field_validator("deadline", mode="before")
    @classmethod
    def _written_without_quotes(cls, value: Any) -> Any:
        # TOML has dates and times of its own: deadline = 2026-11-23T05:00:00
        return value.isoformat() if isinstance(value, datetime.datetime | datetime.time) else value

    @field_validator("deadline")
    @classmethod
    def _deadline(cls, value: str) -> str:
        parse: Callable[[str], object] = datetime.time.fromisoformat
        if "-" in value:
            parse = datetime.datetime.fromisoformat
        try:
            if value:
                parse(value)
        except ValueError:
            raise ValueError("should be like '2026-11-23T05:00', or a time of day like '05:00'") from None
        return value


class Ray(Section):
    address: Text = "auto"
    workers: Auto | Positive = "auto"
    gpus_per_worker: Annotated[float, Field(ge=0)] = 1
    wait: Annotated[float, Field(ge=0)] = Field(
        default=600, description="seconds without any worker, after which the run gives up"
    )
    allow_unauthenticated: bool = Field(
        default=False, description="join a cluster from outside though it asks for no token"
    )

    @field_validator("gpus_per_worker")
    @classmethod
    def _shares(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError("should be a share of one GPU, or a whole number of them: Ray gives no other")
        return value
