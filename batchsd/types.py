"""The vocabulary: the values that travel along the way of a row, and the protocols that plugins meet.

    Shard -> Request -> Conditioning -> latents -> picture -> Record -> ShardResult

Plain frozen dataclasses; torch is named only in annotations, so that importing this file costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from batchsd.figures import Figures

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch

STATUSES = ("ok", "bad_input", "bad_image", "oom", "nan", "flat", "crashed", "timeout", "rejected", "error")
"""All that a row's `status` column can say."""

PIXELS_VERSION = 1
"""Raised whenever the same job would draw other pixels than before: part of every plan."""


class BatchsdError(Exception):
    """An error for a person: one message that says where, what, and what next. Never shown as a traceback."""

    exit_code = 1


class UsageError(BatchsdError):
    """A wrong command, job file, manifest, model or plugin: trying again will not help."""

    exit_code = 2


class InfrastructureError(BatchsdError):
    """The cluster or the storage failed: trying again may help."""

    exit_code = 3


class RowError(Exception):
    """One row cannot become a picture. Its neighbours are not touched.

    `status` is one of `STATUSES`; the message goes to the row's `error` column.
    """

    def __init__(self, status: str, message: str) -> None:
        assert status in STATUSES and status != "ok", status
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Shard:
    """A slice of one manifest file and the one output that it becomes. Fixed by the plan alone.

    `file` indexes the plan's list of files; `start` and `count` are manifest rows within that file, so the
    output has `count * repeat` rows. Pickles to under 200 bytes: this is all that travels to a worker.
    """

    plan: int
    index: int
    total: int
    file: int
    start: int
    count: int

    @property
    def name(self) -> str:
        """Stem of the published file: `train-00042-of-00391`, with `-p0002` for plans after the first."""
        tail = f"-p{self.plan:04d}" if self.plan > 1 else ""
        return f"train-{self.index:05d}-of-{self.total:05d}{tail}"


@dataclass(frozen=True, slots=True)
class Request:
    """What one output row asks, every default resolved.

    `key` names the row for people (`id`, else `<file>:<row>`); `index` is the output row within its shard.
    `height` and `width` are pixels, None where the model or the init image decides. `inputs` are the manifest
    columns that the row's task declared; `columns` is a one-row Arrow table with the manifest's row untouched.
    `error` is set where the row's values were already refused.
    """

    key: str
    index: int
    repeat_index: int
    prompt: str
    negative_prompt: str | None
    seed: int
    steps: int
    guidance_scale: float
    height: int | None
    width: int | None
    scheduler: str
    task: str
    inputs: Mapping[str, Any]
    columns: pa.Table
    row_hash: str = ""
    error: RowError | None = None


@dataclass(frozen=True, slots=True)
class Branch:
    """One evaluation of the network: what it is told beside the latents and the timestep.

    `prompt` is encoded by the engine (once per text and encoder); None stands for zeros, as SDXL has it for a
    negative that is not given. `channels_CHW` are joined to the noisy latents after input scaling (depth,
    mask, masked image, edit source); C is unet.in_channels - vae.latent_channels.
    """

    prompt: str | None
    channels_CHW: torch.Tensor | None = None
    added: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Blend:
    """Kept latents: after every call x <- mask * x + (1 - mask) * (alpha * clean + sigma * noise).

    `mask_1HW` is 0 or 1 at latent size, 1 where the picture is drawn anew.
    """

    mask_1HW: torch.Tensor
    clean_CHW: torch.Tensor
    noise_CHW: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.mask_1HW, self.clean_CHW, self.noise_CHW


@dataclass(frozen=True, slots=True)
class Kept:
    """Pixels put back into the finished picture: where `mask_HW` (bool) is False, those of `picture_HW3` (uint8)."""

    mask_HW: np.ndarray
    picture_HW3: np.ndarray

    def into(self, drawn_HW3: np.ndarray) -> np.ndarray:
        """The drawn picture with the kept pixels in their places."""
        mask_HW1 = self.mask_HW[..., None]
        return drawn_HW3 * mask_HW1 + self.picture_HW3 * ~mask_HW1


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What the network is told for one row, in a form that holds every task.

    The guided prediction is sum_i weights(sigma)[i] * prediction of branches[i]; a branch of weight 0 is not
    evaluated. `noise_CHW` is the row's first draw at latent size; the walk starts from it alone, or, where
    `clean_CHW` is given, from alpha * clean + sigma * noise after skipping `begin` of the row's steps. Where all
    steps are skipped the picture is `clean_CHW`, decoded. `made` are image files that the task made on the way, for
    the output columns of those names (`columns.ON_REQUEST`).
    """

    branches: tuple[Branch, ...]
    weights: Callable[[float], Sequence[float]]
    noise_CHW: torch.Tensor
    clean_CHW: torch.Tensor | None = None
    begin: int = 0
    blend: Blend | None = None
    kept: Kept | None = None
    made: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Record:
    """One finished output row: an encoded picture, or None with the reason.

    `image` holds file bytes; `extension` is `png`, `jpg` or `webp`; `height` and `width` are the pixels drawn;
    `made` are PNG files of columns that the job asked for; `tokens_cut` counts tokens that the network did not see.
    """

    request: Request
    status: str
    error: str | None = None
    image: bytes | None = None
    extension: str = "png"
    height: int | None = None
    width: int | None = None
    made: Mapping[str, bytes] = field(default_factory=dict)
    tokens_cut: int | None = None
    figures: Figures = field(default_factory=Figures)
    scores: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One staged file: its name (`failed/...` stays, all others are below the run's `data/`), bytes, sha256 in hex."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What a worker hands in for a shard: enough for the driver to commit it without opening it."""

    shard: Shard
    nonce: str
    rows: int
    ok: int
    failed: Mapping[str, int]
    files: tuple[OutputFile, ...]
    facts: Mapping[str, Any]
    timings: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Progress:
    """A small event from a worker: rows done since its last one, and the keys now in flight.

    `ok` counts rejected rows too; `rows` are those in flight, by their index in the shard; `good` is one just drawn
    well, or -1. `long`: what comes next may take long: the first batch of a shape, or the handing in of a shard.
    """

    shard: Shard
    ok: int
    failed: int
    in_flight: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()
    good: int = -1
    long: bool = False


@dataclass(frozen=True, slots=True)
class Tried:
    """A row of a shard was drawn alone, for a trial, and its worker lives. `ok`: it became a picture."""

    shard: Shard
    row: int
    ok: bool


Event = Progress | Tried | ShardResult


class SinkWriter(Protocol):
    """Writes one shard's files. Records come in row order; nothing is complete before `close`."""

    def add(self, record: Record) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class Sink(Protocol):
    """An output layout. It writes into a folder it is given and never publishes."""

    def open(self, folder: Path, name: str, schema: pa.Schema) -> SinkWriter:
        """Start the files of one shard below `folder`, their names beginning with `name`.

        `schema` is the run's fixed output schema with its key-value metadata (see `columns.output_schema`).
        """
        ...


class ModelFacts(Protocol):
    """What a task may ask of the loaded checkpoint."""

    @property
    def latent_channels(self) -> int: ...

    @property
    def extra_channels(self) -> int:
        """Input channels of the network beyond the latents."""
        ...

    @property
    def scale_factor(self) -> int:
        """Pixels a latent, along one side."""
        ...

    @property
    def native_size(self) -> int:
        """Pixels of the side of the pictures that it was trained on."""
        ...

    @property
    def zero_negative(self) -> bool:
        """Whether a negative prompt that is not given is zeros (SDXL), not the empty text."""
        ...

    @property
    def takes_sizes(self) -> bool:
        """Whether the network is told the picture's sizes, `Branch.added["time_ids"]` (SDXL)."""
        ...

    @property
    def guidance_dim(self) -> int:
        """Numbers in which the network is told its guidance, `Branch.added["timestep_cond"]` (LCM); 0: it is not."""
        ...

    def encode_image(self, image_3HW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Pixels in [-1, 1] -> a scaled draw of the VAE's posterior, C H/8 W/8, in float32."""
        ...

    def encode_mode(self, image_3HW: torch.Tensor) -> torch.Tensor:
        """Pixels in [-1, 1] -> the posterior's mode as the VAE has it, not scaled: C H/8 W/8, in float32."""
        ...

    def estimate_depth(self, picture_HW3: np.ndarray, convention: str = "diffusers") -> np.ndarray | None:
        """RGB pixels, uint8 -> a map of any size in float32, greater is nearer; None: it has no depth network."""
        ...


@runtime_checkable
class Task(Protocol):
    """A kind of conditioning. `columns` are the manifest columns it wants in `Request.inputs`.

    Calling it may raise `RowError`. The order of its draws is written in its docstring: it is part of the
    picture.
    """

    @property
    def columns(self) -> tuple[str, ...]: ...

    def __call__(self, request: Request, model: ModelFacts, generator: torch.Generator) -> Conditioning: ...


Records = Iterator[tuple[Shard, Record]]
