"""A row's values. The oracles: plain Python arithmetic, hashlib, and the messages' text."""

import hashlib
import math
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from batchsd.job import Job, load, pixel_settings
from batchsd.rows import (
    InvalidText,
    Names,
    Refused,
    Resolver,
    Template,
    derived_seed,
    finite,
    row_hasher,
    text,
    whole,
)
from batchsd.types import RowError

NAMES = Names(("euler", "ddim", "model"), {"text": (), "image": ("init_image", "strength")})


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")

    def make_job(*sets: str) -> Job:
        path = Path(folder / "a.toml")
        path.write_text('[input]\nmanifest = "p"\n[model]\npath = "m"\n[output]\nuri = "o"\n')
        return load(path, ["sampler.scheduler=euler", *sets], {})

    return make_job


def read_image(name, cell) -> bytes:
    if cell == "missing.png":
        raise RowError("bad_image", "missing.png: no such file")
    return cell["bytes"] if isinstance(cell, dict) else bytes(cell)


def resolve(job: Job, row: dict, place: str = "p.parquet:3", hasher=None) -> list[tuple[dict, str]]:
    found = Resolver(job, NAMES, hasher or (lambda fields: "h")).requests(row, row, place, read_image)
    return [(fields, str(error or "")) for fields, error in found]


@given(
    st.one_of(st.integers(), st.floats(), st.decimals(allow_nan=False), st.booleans(), st.text()),
    st.integers(1, 9),
)
@example(20.0, 1)
@example(Decimal("24.0"), 8)
def test_whole_numbers(value, multiple):
    is_whole = not isinstance(value, bool | str) and math.isfinite(value) and value % 1 == 0
    if is_whole and 1 <= value <= 1000 and int(value) % multiple == 0:
        taken = whole("steps", value, 1, 1000, multiple)
        assert taken == value and type(taken) is int
    else:
        with pytest.raises(Refused, match="^steps: "):
            whole("steps", value, 1, 1000, multiple)


@given(st.one_of(st.integers(), st.floats(), st.decimals(allow_nan=False), st.booleans(), st.text()))
@example(10**400)
def test_finite_numbers(value):
    try:
        expected = math.nan if isinstance(value, bool | str) else float(value)
    except OverflowError:
        expected = math.inf
    if math.isfinite(expected):
        assert finite("guidance_scale", value) == expected
    else:
        with pytest.raises(Refused, match="^guidance_scale: "):
            finite("guidance_scale", value)


def test_texts_are_bounded():
    assert text("prompt", "x" * 20_000) == "x" * 20_000
    assert text("prompt", "") == ""
    for value, said in {
        "x" * 20_001: "prompt: 20,001 characters, at most 20,000",
        InvalidText(4): "prompt: not valid UTF-8 at byte 4",
        7: "prompt: 7 is not text",
    }.items():
        with pytest.raises(Refused) as caught:
            text("prompt", value)
        assert str(caught.value) == said


WORDS = st.text("ab{} .", max_size=5)
COLUMN = st.text("xyz_ -.", min_size=1, max_size=4)


@given(st.lists(st.tuples(WORDS, COLUMN)), WORDS, st.data())
def test_templates_fill_as_they_were_built(pieces, end, data):
    """The oracle is the construction: literals with doubled braces, and a known value for each column."""
    row = {
        name: data.draw(st.one_of(st.text("q{}", max_size=3), st.integers()), label=name)
        for _, name in pieces
    }
    doubled = [(literal.replace("{", "{{").replace("}", "}}"), name) for literal, name in pieces]
    tail = end.replace("{", "{{").replace("}", "}}")
    template = Template.parse("".join(f"{literal}{{{name}}}" for literal, name in doubled) + tail)
    assert template.fill(row) == "".join(f"{literal}{row[name]}" for literal, name in pieces) + end
    assert set(template.columns) == set(row)


@pytest.mark.parametrize("broken", ["{", "}", "a {} b", "{a!r}", "{a:>9}", "{a", "{0}}"])
def test_templates_that_are_refused(broken):
    with pytest.raises(ValueError):
        Template.parse(broken)


def test_an_image_that_cannot_be_read_is_bad_image(make):
    def status(**row) -> tuple[str, str]:
        resolver = Resolver(make("conditioning.task=image"), NAMES, lambda fields: "h")
        ((_, error),) = resolver.requests({"prompt": "a", **row}, {}, "p:0", read_image)
        assert error is not None
        return error.status, str(error)

    missing = "init_image: missing.png: no such file"
    assert status(init_image="missing.png") == ("bad_image", missing)
    both = f"steps: 0 is outside 1 to 1000; {missing}"
    assert status(init_image="missing.png", steps=0) == ("bad_input", both)


def test_a_template_needs_its_columns(make):
    job = make("input.prompt=a {color} {shape}, {{x}}")
    resolver = Resolver(job, NAMES, lambda fields: "h", Template.parse(job.input.prompt))

    def prompt(**row):
        ((fields, problem),) = resolver.requests({}, row, "p:0", read_image)
        return fields["prompt"], str(problem or "")

    assert prompt(color="red", shape="cube") == ("a red cube, {x}", "")
    assert prompt(color="", shape=3) == ("a  3, {x}", "")
    assert prompt(color=None, shape="cube") == (None, "prompt: the template needs 'color', which is null")
    assert prompt(color="red", shape=math.nan) == (None, "prompt: the template needs 'shape', which is null")
    assert prompt(color=InvalidText(0), shape="x") == (None, "color: not valid UTF-8 at byte 0")


def test_null_and_nan_mean_the_jobs_default(make):
    job = make("sampler.steps=7", "sampler.guidance_scale=3", "sampler.height=72", "conditioning.task=image")
    for nothing in (None, math.nan):
        row = dict.fromkeys(
            ("steps", "guidance_scale", "height", "width", "seed", "negative_prompt", "id"), nothing
        )
        ((fields, problem),) = resolve(job, {"prompt": "", **row, "strength": nothing})
        assert problem == ""
        assert fields == {
            "key": "p.parquet:3", "prompt": "", "negative_prompt": None, "steps": 7, "guidance_scale": 3.0,
            "seed": derived_seed(0, "p.parquet:3", 0), "height": 72, "width": None, "scheduler": "euler",
            "task": "image", "repeat_index": 0, "inputs": {"init_image": None, "strength": None},
            "row_hash": "h",
        }  # fmt: skip


def test_a_row_over_the_job(make):
    row = {
        "id": 12, "prompt": "a", "negative_prompt": "", "seed": 2.0**32 - 1, "steps": 5.0,
        "guidance_scale": 1,
        "height": 64, "width": 128, "scheduler": "ddim", "task": "image", "init_image": b"x", "strength": 0.5,
    }  # fmt: skip
    ((fields, problem),) = resolve(make(), row)
    assert problem == ""
    assert fields == {
        "key": "12", "prompt": "a", "negative_prompt": "", "seed": 2**32 - 1, "steps": 5,
        "guidance_scale": 1.0,
        "height": 64, "width": 128, "scheduler": "ddim", "task": "image", "repeat_index": 0,
        "inputs": {"init_image": b"x", "strength": 0.5}, "row_hash": "h",
    }  # fmt: skip


BAD = {
    "prompt": {
        None: "prompt: null (an empty text is a valid prompt)",
        InvalidText(1): "prompt: not valid UTF-8 at byte 1",
    },
    "negative_prompt": {"n" * 20_001: "negative_prompt: 20,001 characters, at most 20,000"},
    "steps": {
        0: "steps: 0 is outside 1 to 1000",
        1001.0: "steps: 1001 is outside 1 to 1000",
        2.5: "steps: 2.5 is not a whole number",
        math.inf: "steps: inf is not a whole number",
    },
    "guidance_scale": {-math.inf: "guidance_scale: -inf is not a finite number"},
    "height": {
        100: "height: 100 is not a multiple of 8",
        0: "height: 0 is outside 16 to 4096",
        8192: "height: 8192 is outside 16 to 4096",
    },
    "seed": {
        2**32: "seed: 4294967296 is outside -1 to 4294967295",
        -2: "seed: -2 is outside -1 to 4294967295",
    },
    "scheduler": {"dpm": "scheduler: 'dpm' is unknown; have ddim, euler, model"},
    "task": {"": "task: '' is unknown; have image, text"},
    "id": {InvalidText(0): "id: not valid UTF-8 at byte 0"},
}


@pytest.mark.parametrize(
    ("name", "value", "said"), [(n, v, s) for n, cases in BAD.items() for v, s in cases.items()]
)
def test_a_bad_value_is_its_rows_problem(make, name, value, said):
    ((fields, problem),) = resolve(make(), {"prompt": "a", "id": "k", name: value})
    assert problem == said
    assert fields["row_hash"] == ""
    assert fields["key"] == ("p.parquet:3" if name == "id" else "k")
    if name != "id":
        assert fields[name] == (value if isinstance(value, str) else None)


def test_an_adapter_in_a_prompt_is_refused_where_the_syntax_knows_it(make):
    row = {"prompt": "a cat <lora:style:0.8>"}
    ((_, error),) = resolve(make("conditioning.prompt_syntax=a1111"), row)
    assert error == "prompt: '<lora:style:0.8>' would hold for this row alone; give LoRAs as model.loras"
    ((fields, error),) = resolve(make(), row)
    assert not error and fields["prompt"] == row["prompt"]


def test_all_problems_of_a_row_are_said(make):
    ((_, problem),) = resolve(make(), {"prompt": None, "steps": 0, "scheduler": "x"})
    assert problem == (
        "prompt: null (an empty text is a valid prompt); steps: 0 is outside 1 to 1000; "
        "scheduler: 'x' is unknown; have ddim, euler, model"
    )


def test_seeds_come_from_the_key_and_the_repeat_alone(make):
    job = make("input.repeat=3", "run.seed=9")
    for row in ({"id": "k"}, {"id": "k", "seed": -1}, {"id": "k", "seed": None}):
        seeds = [fields["seed"] for fields, _ in resolve(job, {"prompt": "a", **row})]
        digests = [hashlib.blake2b(f"9:{i}:k".encode(), digest_size=8).hexdigest() for i in range(3)]
        assert seeds == [int(digest, 16) % 2**32 for digest in digests]
    explicit = [fields["seed"] for fields, _ in resolve(job, {"prompt": "a", "seed": 2**32 - 2})]
    assert explicit == [2**32 - 2, 2**32 - 1, 0]
    assert (
        derived_seed(0, "a", 0)
        != derived_seed(1, "a", 0)
        != derived_seed(0, "a", 1)
        != derived_seed(0, "b", 0)
    )


@pytest.mark.parametrize(
    ("value", "key"), [(3, "3"), (3.0, "3"), ("é/..", "é/.."), (b"\x01\xff", "01ff"), (0, "0")]
)
def test_keys(make, value, key):
    ((fields, _),) = resolve(make(), {"prompt": "a", "id": value})
    assert fields["key"] == key


def test_row_hashes_see_every_pixel_input_and_nothing_else(make):
    def hashed(*sets: str, checkpoint: str = "c", **row) -> str:
        job = make(*sets)
        hasher = row_hasher(checkpoint, pixel_settings(job))
        ((fields, problem),) = resolve(job, {"prompt": "a", "id": "k", **row}, hasher=hasher)
        assert problem == ""
        return fields["row_hash"]

    base = hashed(seed=1)
    assert len(base) == 32 and int(base, 16)
    same = [
        hashed("sampler.steps=99", seed=1, steps=20), hashed("run.seed=5", seed=1),
        hashed("ray.workers=3", seed=1),
        hashed("sampler.scheduler=ddim", seed=1, scheduler="euler"), hashed(seed=1, id="other"),
        hashed("input.prompt=x", seed=1),
    ]  # fmt: skip
    assert set(same) == {base}
    others = [
        hashed(seed=2), hashed(seed=1, prompt="b"), hashed(seed=1, negative_prompt=""),
        hashed(seed=1, steps=21),
        hashed(seed=1, guidance_scale=5.5), hashed(seed=1, height=64), hashed(seed=1, width=64),
        hashed(seed=1, scheduler="ddim"), hashed(seed=1, checkpoint="d"), hashed("sampler.eta=1", seed=1),
        hashed("conditioning.prompt_syntax=a1111", seed=1), hashed("output.image.compress_level=9", seed=1),
        hashed(seed=1, task="image"), hashed(seed=1, task="image", init_image=b"x"),
        hashed(seed=1, task="image", init_image=b"y"), hashed(seed=1, task="image", strength=0.5), hashed(),
    ]  # fmt: skip
    of_content = hashed(seed=1, task="image", init_image={"bytes": b"x", "path": None}, strength=0.5)
    assert of_content == hashed("conditioning.strength=0.5", seed=1, task="image", init_image=b"x")
    assert len({base, *others}) == len(others) + 1
