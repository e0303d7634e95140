"""What is said of a wrong job. The oracle is the text of each message."""

from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from smallest_job import SMALLEST, refusal

from batchsd.job import load
from batchsd.types import UsageError

ERRORS = {
    "misspelt key": ("[sampler]\n\nstepz = 3\n", "9: unknown setting sampler.stepz - did you mean 'steps'?"),
    "key of another section": (
        "[run]\nsteps = 3\n",
        "8: unknown setting run.steps - did you mean 'sampler.steps'?",
    ),
    "misspelt section": ("[samplr]\nsteps = 3\n", "7: unknown setting samplr - did you mean 'sampler'?"),
    "nothing like it": (
        "[ray]\nzzz = 1\n",
        "8: unknown setting ray.zzz; have address, allow_unauthenticated, gpus_per_worker, wait, workers",
    ),
    "text for a number": ('[sampler]\nsteps = "20"\n', '8: sampler.steps = "20" should be a whole number'),
    "truth for a number": ("[sampler]\nsteps = true\n", "8: sampler.steps = true should be a whole number"),
    "number for truth": ("[run]\nstrict = 1\n", "8: run.strict = 1 should be true or false"),
    "too many steps": ("[sampler]\nsteps = 1001\n", "8: sampler.steps = 1001 should be at most 1000"),
    "no steps": ("[sampler]\nsteps = 0\n", "8: sampler.steps = 0 should be at least 1"),
    "odd size": ("[sampler]\nheight = 100\n", "8: sampler.height = 100 should be a multiple of 8"),
    "not finite": (
        "[sampler]\nguidance_scale = inf\n",
        "8: sampler.guidance_scale = Infinity should be a finite number",
    ),
    "no choice": (
        '[run]\nbatch_size = "big"\n',
        "8: run.batch_size = \"big\" should be 'auto' or a whole number",
    ),
    "share above one": (
        "[run]\nmax_failed = 1.5\n",
        "8: run.max_failed = 1.5 should be a whole number or at most 1",
    ),
    "unknown word": (
        '[conditioning]\nlong_prompts = "cut"\n',
        "8: conditioning.long_prompts = \"cut\" should be 'truncate' or 'chunk'",
    ),
    "a section that is none": ("[run.seed]\n", "7: run.seed = {} should be a whole number"),
    "interval of one": (
        "[sampler]\nguidance_interval = [3]\n",
        "8: sampler.guidance_interval = [3] should be empty or two numbers, the lower one first",
    ),
    "deadline": (
        '[run]\ndeadline = "tomorrow"\n',
        "8: run.deadline = \"tomorrow\" should be like '2026-11-23T05:00', or a time of day like '05:00'",
    ),
    "a GPU and a half": (
        "[ray]\ngpus_per_worker = 1.5\n",
        "8: ray.gpus_per_worker = 1.5 should be a share of one GPU, or a whole number of them: Ray gives no other",
    ),
    "syntax": ("[run]\nseed = \n", "8: not valid TOML: Invalid value"),
    "twice": ("[run]\nseed = 1\nseed = 2\n", "9: not valid TOML: Cannot overwrite a value"),
    "open to the end": ('[run]\nscratch = """\n\n', "9: not valid TOML: Unterminated string"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_file_line_and_what_would_be_right(here, name):
    text, message = ERRORS[name]
    assert refusal(text) == f"jobs/a.toml:{message}"


def test_several_problems_are_one_line_each(here):
    assert refusal(
        "[sampler]\nsteps = 0\n", ("run.seed=-1",), {"BATCHSD_RUN__GRACE": "long"}
    ).splitlines() == [
        "jobs/a.toml:8: sampler.steps = 0 should be at least 1",
        "--set run.seed = -1 should be at least 0",
        'environment BATCHSD_RUN__GRACE: run.grace = "long" should be a number',
    ]


def test_what_must_be_given_is_named(here):
    Path("empty.toml").write_text("")
    with pytest.raises(UsageError) as caught:
        load("empty.toml", [], {})
    assert [line.split(" is missing: ")[0] for line in str(caught.value).splitlines()] == [
        "empty.toml: input.manifest",
        "empty.toml: model.path",
        "empty.toml: output.uri",
    ]


def test_files_that_are_no_jobs(here):
    Path("latin.toml").write_bytes(b'[input]\nmanifest = "caf\xe9"\n')
    for name, message in {
        "none.toml": "none.toml: no such job file",
        "jobs": "jobs: cannot be read: Is a directory",
        "latin.toml": "latin.toml: not a job file: it is not UTF-8 text",
    }.items():
        with pytest.raises(UsageError) as caught:
            load(name, [], {})
        assert str(caught.value) == message


KEYS = st.sampled_from([f"{s}.{k}" for s, k in product(
    ("input", "model", "sampler", "output", "run", "x"),
    ("columns", "path", "steps", "image", "seed", "a.b", "uri"),
)] + ["plugins", "sampler", "run", "output.image.quality"])  # fmt: skip
VALUES = st.one_of(
    st.text(max_size=5),
    st.sampled_from(["{a=1}", "[1]", "[[1], {b=2}]", "1e400", "-0", "1979-05-27", "''", "true"]),
)


@settings(deadline=None)
@given(st.lists(st.tuples(KEYS, VALUES), max_size=3))
def test_whatever_is_set_gives_a_job_or_one_line_a_problem(tmp_path_factory, pairs):
    path = tmp_path_factory.getbasetemp() / "fuzz.toml"
    path.write_text(SMALLEST)
    try:
        load(path, [f"{key}={value}" for key, value in pairs], {})
    except UsageError as error:
        for line in str(error).splitlines():
            assert line.startswith("--set ") or " is missing: " in line
