"""Files, environment and --set: precedence, values, paths, lines. The oracle for lines is tomllib."""

import tomllib
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from smallest_job import SMALLEST, job, refusal

from batchsd.job import load
from batchsd.job_sources import key_lines


def test_precedence_is_set_then_environment_then_file_then_default(here):
    text, environ = "[sampler]\nsteps = 30\n", {"BATCHSD_SAMPLER__STEPS": "40"}
    assert job().sampler.steps == 20
    assert job(text).sampler.steps == 30
    assert job(text, environ=environ).sampler.steps == 40
    assert job(text, ("sampler.steps=50", "sampler.steps=60"), environ).sampler.steps == 60


def test_environment_names_are_settings_only_with_section_and_key(here):
    kubernetes = {"BATCHSD_PORT": "tcp://10.0.0.1:80", "BATCHSD_SERVICE_HOST": "10.0.0.1", "OTHER__KEY": "1"}
    assert job(environ=kubernetes) == job()
    unknown = refusal(environ={"BATCHSD_SAMPLER__STEPZ": "3"})
    assert unknown == (
        "environment BATCHSD_SAMPLER__STEPZ: unknown setting sampler.stepz - did you mean 'steps'?"
    )
    assert refusal(environ={"BATCHSD_SAMPLR__STEPS": "3"}) == (
        "environment BATCHSD_SAMPLR__STEPS: unknown setting samplr - did you mean 'sampler'?"
    )


def test_set_values_are_toml_or_else_plain_text(here):
    changed = job("", (
        "sampler.scheduler=DPM++ 2M", "sampler.guidance_scale=7", "run.strict=true",
        "output.columns.prompt=text",
        'output.image={ format = "webp" }', "input.prompt=42", "run.max_failed=1.0", "plugins=['named']",
        "run.deadline=2026-11-23T05:00:00",
    ))  # fmt: skip
    assert changed.sampler.scheduler == "DPM++ 2M" and changed.sampler.guidance_scale == 7.0
    assert changed.run.strict is True and changed.output.columns == {"prompt": "text"}
    assert changed.output.image.options() == {"format": "webp"}
    assert changed.input.prompt == "42" and changed.plugins == ("named",)
    assert (changed.run.max_failed, type(changed.run.max_failed)) == (1.0, float)
    assert changed.run.deadline == "2026-11-23T05:00:00"
    assert refusal("", ("sampler.steps",)) == (
        "--set sampler.steps: write it as section.key=value, such as sampler.steps=30"
    )
    assert refusal("", ("sampler.stepz=3",)) == (
        "--set sampler.stepz: unknown setting sampler.stepz - did you mean 'steps'?"
    )


def test_a_set_adds_to_a_table_of_the_file(here):
    assert job("[run]\n", ("output.image.compress_level=6",)).output.image.options() == {
        "format": "png",
        "compress_level": 6,
    }
    Path("jobs/a.toml").write_text(SMALLEST + 'columns = { image = "a", prompt = "b" }\n')
    assert load("jobs/a.toml", ["output.columns.prompt=c"], {}).output.columns == {
        "image": "a",
        "prompt": "c",
    }


def test_relative_paths_belong_to_the_place_that_says_them(here):
    there = here / "jobs"
    assert job().input.manifest == str(there / "prompts.parquet")
    assert job().output.uri == str(there / "out/run1")
    assert job(sets=("output.uri=2026",)).output.uri == str(here / "2026")
    assert job(environ={"BATCHSD_OUTPUT__URI": "x/../y"}).output.uri == str(here / "y")
    assert job(sets=("output.uri=s3://b/../c?region=x",)).output.uri == "s3://b/../c?region=x"
    assert job(sets=("input.manifest=data/*.parquet",)).input.manifest == str(here / "data/*.parquet")
    assert job('plugins = ["./mine.py", "mod", "other.py"]\n').plugins == (
        str(there / "mine.py"), "mod", str(there / "other.py"),
    )  # fmt: skip


NAMES = st.text("abc-_1", min_size=1, max_size=4)
VALUES = st.sampled_from(
    ["1", '"a = 1"', "[\n1, # ]\n 2\n]", '"""\n[x]\nb = 1\n"""', "'''a\n'''", "{ q = '}' }"]
)


KEYS = st.dictionaries(NAMES, VALUES, max_size=3)


@settings(deadline=None)
@given(st.dictionaries(NAMES, KEYS, max_size=3))
def test_lines_are_found_for_every_key_that_tomllib_finds(tables):
    """The oracle is tomllib: a text cut before a key's line does not hold the key yet."""
    text = ""
    for name, keys in tables.items():
        text += f"[{name}]\n" + "".join(f"{key} = {value}\n" for key, value in keys.items())
    lines = key_lines(text)
    assert set(lines) == {(name,) for name in tables} | {(t, key) for t in tables for key in tables[t]}
    for (table, *key), line in lines.items():
        before = tomllib.loads("\n".join(text.splitlines()[: line - 1]))
        assert text.splitlines()[line - 1].startswith(f"{key[0]} = " if key else f"[{table}]")
        assert key[0] not in before[table] if key else table not in before
