"""The smallest job file, for the tests of jobs; written below the `here` fixture's folder."""

from pathlib import Path

import pytest

from batchsd.job import Job, load
from batchsd.types import UsageError

SMALLEST = """\
[input]
manifest = "prompts.parquet"
[model]
path = "tiny-scenes"
[output]
uri = "out/run1"
"""


def job(text: str = "", sets: tuple[str, ...] = (), environ: dict[str, str] | None = None) -> Job:
    """The smallest job with `text` added (before it, where it is top-level keys)."""
    Path("jobs/a.toml").write_text(text + SMALLEST if text.startswith("plugins") else SMALLEST + text)
    return load("jobs/a.toml", sets, environ or {})


def refusal(text: str = "", sets: tuple[str, ...] = (), environ: dict[str, str] | None = None) -> str:
    """What is said of such a job."""
    with pytest.raises(UsageError) as caught:
        job(text, sets, environ)
    return str(caught.value)
