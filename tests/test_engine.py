"""The engine against diffusers' own pipeline, and rows in company against rows alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from batchsd.diffusion.builtin import BUILTIN
from batchsd.engine import Engine, Settings, within
from batchsd.model.checkpoint import load
from batchsd.tasks.text import TextTask
from batchsd.types import Branch, Conditioning, Record, Request, RowError, Shard

ROW = pa.table({"id": ["x"]})
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}


def request(index: int = 0, **changes: object) -> Request:
    values: dict = {
        "key": f"r{index}", "index": index, "repeat_index": 0, "prompt": "a red cube", "negative_prompt": None,
        "seed": 100 + index, "steps": 5, "guidance_scale": 4.0, "height": None, "width": None,
        "scheduler": "ddim", "task": "text", "inputs": {}, "columns": ROW, **changes,
    }  # fmt: skip
    return Request(**values)


def raw(picture: np.ndarray) -> tuple[bytes, str]:
    """An "encoder" that keeps the pixels as they are."""
    return picture.tobytes(), "raw"


def new_engine(folder: Path, **settings: object) -> Engine:
    return Engine(
        load(folder), schedulers=BUILTIN, tasks={"text": TextTask()}, encode=raw, settings=Settings(**settings)
    )


def shards_of(*parts: Sequence[Request]) -> Iterator[tuple[Shard, Iterator[Request]] | None]:
    for i, part in enumerate(parts):
        yield Shard(1, i, len(parts), 0, i * 100, len(part)), iter(part)
        yield None  # "nothing at hand just now" must do no harm


def pixels(record: Record) -> np.ndarray:
    assert record.status == "ok", record.error
    assert record.image is not None and record.height and record.width
    return np.frombuffer(record.image, np.uint8).reshape(record.height, record.width, 3).astype(int)


def draw(engine: Engine, *parts: Sequence[Request]) -> dict[str, Record]:
    records = [record for _, record in engine.generate(shards_of(*parts))]
    assert len(records) == sum(map(len, parts))
    return {record.request.key: record for record in records}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_picture_equals_diffusers(checkpoint: Path, scheduler: str, guidance: float) -> None:
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(checkpoint, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = getattr(diffusers, SCHEDULERS[scheduler]).from_config(pipe.scheduler.config)
    asked = request(
        prompt="a red cube, left of a blue sphere", negative_prompt="green", scheduler=scheduler,
        guidance_scale=guidance, seed=7, steps=8, height=32, width=16,
    )  # fmt: skip
    theirs = pipe(
        asked.prompt, negative_prompt="green", guidance_scale=guidance, num_inference_steps=8, height=32, width=16,
        generator=torch.Generator().manual_seed(7), output_type="np",
    ).images[0]  # fmt: skip
    ours = pixels(draw(new_engine(checkpoint), [asked])["r0"])
    assert ours.std() > 5, "a flat picture would equal anything flat"
    assert np.abs(ours - theirs * 255).max() <= 1.0


SAMPLERS = ["ddim", "euler_a", "dpmpp_2m", "heun", "pndm", "lms", "dpmpp_sde"]


def mixed(count: int) -> list[Request]:
    rng = random.Random(1)
    return [
        request(
            i, prompt=rng.choice(["a red cube", "a blue cone", ""]), scheduler=rng.choice(SAMPLERS),
            steps=rng.randint(1, 6), guidance_scale=rng.choice([1.0, 3.0, 7.5]), height=rng.choice([16, 32]),
        )
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> dict[str, np.ndarray]:
    """The rows of `mixed(12)`, each drawn by itself."""
    engine = new_engine(checkpoint)
    return {row.key: pixels(draw(engine, [row])[row.key]) for row in mixed(12)}


@pytest.mark.parametrize("lanes", [1, 4, 16])
def test_rows_in_company_equal_rows_alone(checkpoint: Path, alone: dict[str, np.ndarray], lanes: int) -> None:
    rows = mixed(12)
    together = draw(new_engine(checkpoint, lanes=lanes, decode_batch=3), rows[:4], rows[4:9], rows[9:])
    random.Random(lanes).shuffle(rows)
    shuffled = draw(new_engine(checkpoint, lanes=lanes), rows[:7], rows[7:])
    for key, picture in alone.items():
        assert np.abs(pixels(together[key]) - picture).max() <= 1, key
        assert np.abs(pixels(shuffled[key]) - picture).max() <= 1, key


def test_deterministic_rows_are_equal_to_the_byte(checkpoint: Path) -> None:
    """Alone, in company, in another order, in other shards: and not because rows were alone all the time."""
    rows = mixed(12)
    found = []
    for order, first in ((rows, 12), (rows[::-1], 5), (sorted(rows, key=lambda row: row.seed % 5), 8)):
        engine = new_engine(checkpoint, lanes=4, deterministic=True)
        drawn = draw(engine, order[:first], order[first:])
        found.append({key: record.image for key, record in drawn.items()})
        assert engine.meter.evaluations > 2 * engine.meter.network_calls
    engine = new_engine(checkpoint, lanes=4, deterministic=True)
    found.append({row.key: draw(engine, [row])[row.key].image for row in rows[:4]})
    assert found[0] == found[1] == found[2]
    assert found[3].items() <= found[0].items()


def test_at_most_two_shards_are_open(checkpoint: Path) -> None:
    open_shards: set[int] = set()
    most = 0

    def watched(index: int) -> Iterator[Request]:
        nonlocal most
        for row in [request(index * 10 + i, steps=1 + i) for i in range(3)]:
            open_shards.add(index)
            most = max(most, len(open_shards))
            yield row

    shards = [(Shard(1, i, 5, 0, 3 * i, 3), watched(i)) for i in range(5)]
    seen = dict.fromkeys(range(5), 0)
    for shard, _ in new_engine(checkpoint, lanes=64).generate(iter(shards)):
        seen[shard.index] += 1
        if seen[shard.index] == 3:
            open_shards.discard(shard.index)
    assert set(seen.values()) == {3} and most == 2


def test_equal_prompts_are_encoded_once(checkpoint: Path) -> None:
    engine = new_engine(checkpoint)
    texts: list[str] = []
    encode = engine.model.encode_prompts

    def counting(batch: Sequence[str]) -> object:
        texts.extend(batch)
        return encode(batch)

    object.__setattr__(engine.model, "encode_prompts", counting)
    draw(engine, [request(i, prompt="a red cube") for i in range(9)], [request(9, prompt="a blue cone")])
    assert sorted(texts) == ["", "a blue cone", "a red cube"]


def test_failed_rows_are_rows_and_harm_nobody(checkpoint: Path) -> None:
    class Slips(TextTask):
        def __call__(self, request: Request, *rest: object) -> Conditioning:
            raise ValueError("no such thing")

    engine = new_engine(checkpoint)
    engine.tasks = {"text": TextTask(), "slips": Slips()}
    rows = [
        request(0),
        request(1, error=RowError("bad_input", "prompt is null")),
        request(2, height=31),
        request(3, task="slips"),
        request(4, steps=999, scheduler="nobody"),
        request(5),
    ]
    found = draw(engine, rows)
    assert [found[f"r{i}"].status for i in range(6)] == ["ok", "bad_input", "bad_input", "error", "bad_input", "ok"]
    assert found["r1"].error == "prompt is null"
    assert "ValueError: no such thing" in (found["r3"].error or "")
    assert np.abs(pixels(found["r5"]) - pixels(draw(engine, [rows[5]])["r5"])).max() <= 1


@pytest.mark.parametrize("deterministic", [False, True])
def test_texts_that_do_not_fit_or_cannot_be_encoded_are_their_rows_failure(
    checkpoint: Path, deterministic: bool
) -> None:
    rows = [request(i, prompt=prompt) for i, prompt in enumerate(("a cube", "huge", "a cone", "odd", "a ball"))]
    engine = new_engine(checkpoint, lanes=4, deterministic=deterministic)
    without = draw(new_engine(checkpoint, lanes=4, deterministic=deterministic), [*rows[::2]])
    encode, batches = engine._encoded, []

    def short(texts: Sequence[str | None]) -> object:
        batches.append(len(texts))
        if "huge" in texts or len(texts) > 2:
            raise torch.OutOfMemoryError("no room")
        if "odd" in texts:
            raise ValueError("no such letters")
        return encode(texts)

    engine._encoded = short  # type: ignore[method-assign, assignment]
    records = draw(engine, rows)
    assert [records[f"r{i}"].status for i in range(5)] == ["ok", "oom", "ok", "error", "ok"]
    assert records["r3"].error == "the text encoder: ValueError: no such letters"
    for key, record in without.items():
        assert np.abs(pixels(records[key]) - pixels(record)).max() <= (0 if deterministic else 1)
    assert max(batches) == (1 if deterministic else 6), "the empty text of guidance among them"


def test_a_task_that_runs_out_of_memory_is_tried_with_the_device_to_itself(checkpoint: Path) -> None:
    tried = []

    def hungry(request: Request, model: object, generator: torch.Generator) -> Conditioning:
        tried.append(request.key)
        if request.key == "r1" or tried.count(request.key) == 1:
            raise torch.OutOfMemoryError("no room")
        return TextTask()(request, model, generator)  # type: ignore[arg-type]

    engine = new_engine(checkpoint, lanes=4)
    engine.tasks = {"text": hungry}  # type: ignore[dict-item]
    records = draw(engine, [request(0), request(1)])
    assert records["r0"].status == "ok" and records["r1"].status == "oom" and len(tried) == 4
    assert np.array_equal(pixels(records["r0"]), pixels(draw(new_engine(checkpoint, lanes=4), [request(0)])["r0"]))


def test_states_of_long_texts_are_kept_in_bytes(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = new_engine(checkpoint, lanes=4)
    one = engine.model.text.length * engine.model.unet.config.context_dim * 4
    monkeypatch.setattr("batchsd.engine._TEXTS_KEPT", 3 * one)
    draw(engine, [request(i, prompt=f"{i} cubes", guidance_scale=1.0) for i in range(8)])
    assert len(engine._texts) == 3 and "7 cubes" in engine._texts


def test_guidance_interval(checkpoint: Path) -> None:
    """Around all sigmas it changes nothing, around none it is guidance off, else it is neither."""
    drawn = {}
    for interval in ((), (0, 1e9), (1e8, 1e9), (1.0, 5.0)):
        engine = new_engine(checkpoint, guidance_interval=interval)
        drawn[interval] = pixels(draw(engine, [request(0, guidance_scale=7.0)])["r0"])
    off = pixels(draw(new_engine(checkpoint), [request(0, guidance_scale=1.0)])["r0"])
    assert np.abs(drawn[()] - drawn[0, 1e9]).max() <= 1
    assert np.abs(off - drawn[1e8, 1e9]).max() <= 1
    assert np.abs(drawn[()] - off).max() > 3
    assert min(np.abs(drawn[1.0, 5.0] - other).max() for other in (off, drawn[()])) > 1


def test_outside_the_interval_the_last_branch_stands_alone() -> None:
    always = Conditioning((Branch(""),) * 3, lambda sigma: (0.5, -4.5, 5.0), torch.zeros(4, 2, 2))
    weights = within(always, (0.3, 5.5)).weights
    assert weights(5.6) == weights(0.3) == (0, 0, 1)
    assert weights(5.5) == weights(0.31) == (0.5, -4.5, 5)


def test_guidance_rescale_equals_diffusers(checkpoint: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(checkpoint, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        "a red cube", guidance_scale=7.0, guidance_rescale=0.7, num_inference_steps=5, output_type="np",
        generator=torch.Generator().manual_seed(100),
    ).images[0]  # fmt: skip
    rows = [request(0, guidance_scale=7.0), request(1, guidance_scale=1.0)]
    ours = pixels(draw(new_engine(checkpoint, guidance_rescale=0.7), rows)["r0"])
    assert np.abs(ours - theirs * 255).max() <= 1
    plain = pixels(draw(new_engine(checkpoint), rows)["r0"])
    assert np.abs(ours - plain).max() > 1


def test_numbers_that_are_not_finite_are_that_rows_failure(checkpoint: Path) -> None:
    class Broken(TextTask):
        def __call__(self, request: Request, *rest: object) -> Conditioning:
            made = super().__call__(request, *rest)  # type: ignore[arg-type]
            return Conditioning(made.branches, made.weights, made.noise_CHW * float("nan"))

    engine = new_engine(checkpoint)
    engine.tasks = {"text": TextTask(), "broken": Broken()}
    found = draw(engine, [request(0), request(1, task="broken"), request(2)])
    assert [found[f"r{i}"].status for i in range(3)] == ["ok", "nan", "ok"]


def test_a_picture_of_one_colour_is_called_flat(checkpoint: Path) -> None:
    engine = new_engine(checkpoint)
    with torch.no_grad():
        for parameter in engine.model.vae.decoder.conv_out.parameters():
            parameter.zero_()
    assert draw(engine, [request(0)])["r0"].status == "flat"
