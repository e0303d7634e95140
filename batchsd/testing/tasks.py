"""A task's contract: tried on one row and a stand-in for a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from batchsd.types import Conditioning, ModelFacts, Request, RowError, Task

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True)
class TinyModel:
    """What a task may ask of a checkpoint, without one: its latents are means over f x f pixels."""

    latent_channels: int = 4
    extra_channels: int = 0
    scale_factor: int = 8
    native_size: int = 64
    zero_negative: bool = False
    takes_sizes: bool = False
    guidance_dim: int = 0

    def encode_image(self, image_3HW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Means of the pixels plus one draw of noise, as a VAE's posterior has it: C H/f W/f in float32."""
        import torch

        mean_Chw = self.encode_mode(image_3HW)
        return mean_Chw + 0.1 * torch.randn(mean_Chw.shape, generator=generator, dtype=torch.float32)

    def encode_mode(self, image_3HW: torch.Tensor) -> torch.Tensor:
        """Means of the pixels: C H/f W/f in float32."""
        import torch

        mean_3hw = torch.nn.functional.avg_pool2d(image_3HW[None].float(), self.scale_factor)[0]
        return mean_3hw.mean(0, keepdim=True).repeat(self.latent_channels, 1, 1)

    def estimate_depth(self, picture_HW3: np.ndarray, convention: str = "diffusers") -> np.ndarray | None:
        """The brightness of the pixels, in float32 at the picture's size."""
        import numpy as np

        return picture_HW3.mean(axis=2, dtype=np.float32)


TINY = TinyModel()


def example_request(**changes: Any) -> Request:
    """A plain row: 64 x 96 pixels, 20 steps, guidance 5, seed 7; `changes` replace its fields."""
    import pyarrow as pa

    plain = Request(
        key="row-0",
        index=0,
        repeat_index=0,
        prompt="a large red sphere",
        negative_prompt="blurry",
        seed=7,
        steps=20,
        guidance_scale=5.0,
        height=64,
        width=96,
        scheduler="euler",
        task="text",
        inputs={},
        columns=pa.table({"prompt": ["a large red sphere"]}),
        row_hash="0" * 32,
    )
    return replace(plain, **changes)


def check_task(task: Task, request: Request, model: ModelFacts = TINY) -> None:
    """A task's promises, tried on one good row (its `inputs` filled as the task wants them).

    It declares its columns; draws from the given generator alone, so that a seed is a picture; gives tensors
    of the model's shapes; and refuses bad rows with RowError only.
    """
    import torch

    assert isinstance(task, Task), f"{task!r} is not a task: it needs `columns` and `__call__`"
    columns = task.columns
    assert isinstance(columns, tuple) and all(isinstance(c, str) for c in columns), (
        f"columns is {columns!r}; give a tuple of column names"
    )
    unknown = set(request.inputs) - set(columns)
    assert not unknown, (
        f"the example row gives {sorted(unknown)}, which the task does not declare in `columns`"
    )

    def condition(seed: int) -> Conditioning:
        state = torch.get_rng_state()
        result = task(request, model, torch.Generator().manual_seed(seed))
        assert torch.equal(state, torch.get_rng_state()), "the task drew from torch's global generator"
        return result

    first, again, other = condition(7), condition(7), condition(8)
    _check_conditioning(first, request, model)
    for name, value in _tensors(first).items():
        assert torch.equal(value, _tensors(again)[name]), f"{name} differs between two calls with one seed"
    assert not torch.equal(first.noise_CHW, other.noise_CHW), "another seed gives the same noise_CHW"
    _check_refusals(task, request, model)


def _check_conditioning(found: Conditioning, request: Request, model: ModelFacts) -> None:
    import torch

    assert isinstance(found, Conditioning), f"the task returned {type(found).__name__}, not a Conditioning"
    shape = tuple(found.noise_CHW.shape)
    height, width = (
        (model.native_size if side is None else side) // model.scale_factor
        for side in (request.height, request.width)
    )
    assert shape == (model.latent_channels, height, width), (
        f"noise_CHW has shape {shape}; a {request.height} x {request.width} row of this model has "
        f"{(model.latent_channels, height, width)}"
    )
    assert found.branches, "no branches: the network is never asked"
    for i, branch in enumerate(found.branches):
        given = branch.channels_CHW is not None
        assert given == bool(model.extra_channels), (
            f"branches[{i}].channels_CHW is {'given' if given else 'None'}, but the checkpoint has "
            f"{model.extra_channels} extra channels"
        )
    for name, value in _tensors(found).items():
        assert value.dtype == torch.float32 and value.device.type == "cpu", (
            f"{name} is not float32 on the CPU"
        )
        assert torch.isfinite(value).all(), f"{name} holds NaN or infinity"
        wanted = {"channels_CHW": (model.extra_channels, *shape[1:]), "mask_1HW": (1, *shape[1:])}
        last = name.rpartition(".")[2]
        if last in wanted or last in ("noise_CHW", "clean_CHW"):
            want = wanted.get(last, shape)
            assert tuple(value.shape) == want, f"{name} has shape {tuple(value.shape)}, not {want}"
    for sigma in (0.03, 1.0, 14.6):
        weights = tuple(found.weights(sigma))
        assert len(weights) == len(found.branches), f"weights({sigma}) gives {len(weights)} numbers"
        assert abs(sum(weights) - 1) < 1e-6, f"weights({sigma}) sum to {sum(weights)}, not 1"
    assert 0 <= found.begin <= request.steps, f"begin is {found.begin} of {request.steps} steps"
    assert found.begin == 0 or found.clean_CHW is not None, "begin without clean_CHW: nothing to begin from"
    if found.blend:
        assert set(found.blend.mask_1HW.unique().tolist()) <= {0.0, 1.0}, "blend.mask_1HW is not 0 or 1"


def _check_refusals(task: Task, request: Request, model: ModelFacts) -> None:
    """Odd sizes and missing or senseless inputs: taken, or refused with RowError."""
    import torch

    odd = [replace(request, height=model.scale_factor * 4 + 1), replace(request, width=0)]
    for column in task.columns:
        odd += [
            replace(request, inputs={**request.inputs, column: value}) for value in (None, b"", b"no picture")
        ]
    for row in odd:
        try:
            task(row, model, torch.Generator().manual_seed(7))
        except RowError:
            continue
        except Exception as error:
            changed = [f.name for f in fields(row) if getattr(row, f.name) is not getattr(request, f.name)]
            raise AssertionError(
                f"a row with odd {changed[0]} raised {type(error).__name__} ({error}); "
                "a task raises RowError only"
            ) from error


def _tensors(found: Conditioning) -> dict[str, torch.Tensor]:
    """Every tensor of a conditioning by its dotted name."""
    named: dict[str, Any] = {"noise_CHW": found.noise_CHW, "clean_CHW": found.clean_CHW}
    for i, branch in enumerate(found.branches):
        named[f"branches[{i}].channels_CHW"] = branch.channels_CHW
        named |= {f"branches[{i}].added.{key}": value for key, value in branch.added.items()}
    if found.blend:
        named |= {f"blend.{field.name}": getattr(found.blend, field.name) for field in fields(found.blend)}
    return {name: value for name, value in named.items() if value is not None}
