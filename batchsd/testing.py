"""The contracts of schedulers, tasks and sinks, written once and run by everyone: ours and each plugin's.

    def test_my_task(): check_task(MyTask(), example_request(inputs={"depth": png}))

Plain functions that raise AssertionError and say which promise is broken; they need no pytest and no checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchsd.types import Conditioning, ModelFacts, Record, Request, RowError, Sink, Task

if TYPE_CHECKING:
    import pyarrow as pa
    import torch


@dataclass(frozen=True)
class TinyModel:
    """What a task may ask of a checkpoint, without one. Its latents are the picture's means over f x f pixels."""

    latent_channels: int = 4
    extra_channels: int = 0
    scale_factor: int = 8
    native_size: int = 64

    def encode_image(self, image_3HW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Means of the pixels plus one draw of noise, as a VAE's posterior has it: C H/f W/f in float32."""
        import torch

        mean_3hw = torch.nn.functional.avg_pool2d(image_3HW[None].float(), self.scale_factor)[0]
        mean_Chw = mean_3hw.mean(0, keepdim=True).expand(self.latent_channels, -1, -1)
        return mean_Chw + 0.1 * torch.randn(mean_Chw.shape, generator=generator, dtype=torch.float32)


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


# -- tasks ---------------------------------------------------------------------------------------------------


def check_task(task: Task, request: Request, model: ModelFacts | None = None) -> None:
    """A task's promises, tried on one good row (its `inputs` filled as the task wants them).

    It declares its columns; draws from the given generator alone, so that a seed is a picture; gives tensors of
    the model's shapes; and refuses bad rows with RowError only.
    """
    import torch

    model = model or TinyModel()
    assert isinstance(task, Task), f"{task!r} is not a task: it needs `columns` and `__call__`"
    columns = task.columns
    assert isinstance(columns, tuple) and all(isinstance(c, str) for c in columns), (
        f"columns is {columns!r}; give a tuple of column names"
    )
    unknown = set(request.inputs) - set(columns)
    assert not unknown, f"the example row gives {sorted(unknown)}, which the task does not declare in `columns`"

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
    for name, value in _tensors(found).items():
        assert value.dtype == torch.float32 and value.device.type == "cpu", f"{name} is not float32 on the CPU"
        assert torch.isfinite(value).all(), f"{name} holds NaN or infinity"
        wanted = {"channels_CHW": (model.extra_channels, *shape[1:]), "mask_1HW": (1, *shape[1:])}
        last = name.rpartition(".")[2]
        if last in wanted or last in ("noise_CHW", "clean_CHW"):
            want = wanted.get(last, shape)
            assert tuple(value.shape) == want, f"{name} has shape {tuple(value.shape)}, not {want}"
    assert found.branches, "no branches: the network is never asked"
    for i, branch in enumerate(found.branches):
        given = branch.channels_CHW is not None
        assert given == bool(model.extra_channels), (
            f"branches[{i}].channels_CHW is {'given' if given else 'None'}, but the checkpoint has "
            f"{model.extra_channels} extra channels"
        )
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
        odd += [replace(request, inputs={**request.inputs, column: value}) for value in (None, b"", b"no picture")]
    for row in odd:
        try:
            task(row, model, torch.Generator().manual_seed(7))
        except RowError:
            continue
        except Exception as error:
            changed = [f.name for f in fields(row) if getattr(row, f.name) is not getattr(request, f.name)]
            raise AssertionError(
                f"a row with odd {changed[0]} raised {type(error).__name__} ({error}); a task raises RowError only"
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


# -- sinks ---------------------------------------------------------------------------------------------------


def example_schema() -> pa.Schema:
    """The output schema of a small run over a manifest of `id`, `prompt` and `topics` (a list of texts)."""
    import pyarrow as pa

    from batchsd.columns import output_schema
    from batchsd.job import Input, Job, Model, Output

    job = Job(input=Input(manifest="prompts.parquet"), model=Model(path="tiny"), output=Output(uri="out"))
    manifest = pa.schema({"id": pa.string(), "prompt": pa.string(), "topics": pa.list_(pa.string())})
    return output_schema(manifest, job, {"model": "tiny", "version": "0"})


def example_records(count: int = 7) -> list[Record]:
    """Rows of `example_schema`: small PNG pictures of one colour each; every third row failed."""
    import numpy as np
    import pyarrow as pa

    from batchsd.encode import encoder

    encode = encoder({})
    schema = pa.schema({"id": pa.string(), "prompt": pa.string(), "topics": pa.list_(pa.string())})
    records = []
    for i in range(count):
        row = {"id": f"no. {i}/é", "prompt": f"picture {i}", "topics": ["a", None] * (i % 2)}
        request = example_request(
            key=row["id"], index=i, prompt=row["prompt"], columns=pa.Table.from_pylist([row], schema)
        )
        if i % 3 == 2:
            records.append(Record(request, "bad_input", "this row was made to fail"))
        else:
            data, extension = encode(np.full((64, 96, 3), i, np.uint8))
            records.append(Record(request, "ok", None, data, extension, 64, 96))
    return records


def check_sink(sink: Sink, folder: Path, read_back: Callable[[Path], Sequence[bytes | None]]) -> None:
    """A sink's promises, tried in an empty `folder`.

    `read_back` opens the folder of one finished shard, as the sink's users would, and gives each row's picture
    file in row order, None for a failed row. Every record is a row; no file is complete before `close`; the same
    records give the same bytes; names begin with the shard's; nothing is written outside the folder given.
    """
    assert isinstance(sink, Sink), f"{sink!r} is not a sink: it needs `open(folder, name, schema)`"
    name = "train-00003-of-00010"
    records = example_records()
    before, first = _write_shard(sink, folder / "first", name, records)
    read = list(read_back(folder / "first"))
    assert len(read) == len(records), f"{len(records)} records became {len(read)} rows"
    for i, record in enumerate(records):
        assert read[i] == record.image, f"row {i} ({record.status}) does not read back as it was given"

    early = [file for file, digest in first.items() if before.get(file) == digest]
    assert first and len(early) < len(first), f"{', '.join(early) or 'nothing'}: complete before `close`"
    wrong = [file for file in first if not file.startswith(name)]
    assert not wrong, f"{', '.join(wrong)}: names must begin with the shard's name, {name}"

    _, second = _write_shard(sink, folder / "second", name, records)
    changed = sorted({file for file, _ in first.items() ^ second.items()})
    assert not changed, f"{', '.join(changed)}: the same records gave other bytes"
    _check_two_open(sink, folder / "both", records, first)
    outside = sorted(path.name for path in folder.iterdir() if path.name not in ("first", "second", "both"))
    assert not outside, f"{', '.join(outside)}: written outside the folder that was given"


def _write_shard(
    sink: Sink, folder: Path, name: str, records: Sequence[Record]
) -> tuple[dict[str, str], dict[str, str]]:
    """Write one shard; give its files (name to sha256) just before `close`, and after it."""
    folder.mkdir()
    writer = sink.open(folder, name, example_schema())
    missing = [method for method in ("add", "close") if not callable(getattr(writer, method, None))]
    assert not missing, f"open() gave a {type(writer).__name__} without {' and '.join(missing)}"
    for record in records:
        writer.add(record)
    before = _files(folder)
    writer.close()
    return before, _files(folder)


def _check_two_open(sink: Sink, folder: Path, records: Sequence[Record], alone: dict[str, str]) -> None:
    """A worker has two shards open, in turns: neither may change the other."""
    folder.mkdir()
    one = sink.open(folder, "train-00003-of-00010", example_schema())
    two = sink.open(folder, "train-00004-of-00010", example_schema())
    for record in records:
        one.add(record)
        two.add(record)
    two.close()
    one.close()
    found = _files(folder)
    wrong = [file for file, digest in alone.items() if found.get(file) != digest]
    assert not wrong, f"{', '.join(wrong)}: other bytes when a second shard was open"


def _files(folder: Path) -> dict[str, str]:
    """Every file below the folder, with its sha256."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}
