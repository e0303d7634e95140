"""What is not built is refused by name, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchsd.job import Job, load
from batchsd.types import UsageError
from batchsd.unbuilt import NOT_BUILT, refuse_unbuilt

VALUES: dict[str, str] = {}


def job(tmp_path: Path, *sets: str) -> Job:
    file = tmp_path / "a.toml"
    file.write_text('[input]\nmanifest = "m.parquet"\n[model]\npath = "tiny-scenes"\n[output]\nuri = "out"\n')
    return load(file, sets, {})


def test_a_plain_job_passes(tmp_path: Path) -> None:
    refuse_unbuilt(job(tmp_path))
    assert VALUES.keys() == NOT_BUILT.keys()


@pytest.mark.parametrize("key", NOT_BUILT)
def test_refused_by_name(tmp_path: Path, key: str) -> None:
    with pytest.raises(UsageError) as error:
        refuse_unbuilt(job(tmp_path, f"{key}={VALUES[key]}"))
    assert f"{key}: {NOT_BUILT[key]} is not built yet" in str(error.value)
    assert "\n" not in str(error.value)
