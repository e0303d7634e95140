"""`batchsd init`: a job file with its manifest, small and whole, to begin from. It draws with the shipped model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from batchsd.types import UsageError

PROMPTS = (
    "a large red sphere on the left, white floor, blue background",
    "a small green cube in the middle, gray floor, white background",
    "a large yellow cone on the right, brown floor, gray background",
    "a small blue cylinder to the left of a large red cube",
    "a large purple sphere in front of a small white cone",
    "a small orange cube behind a large cyan cylinder",
)

JOB = """\
# batchsd run job.toml
# Every key: batchsd schema. Each value here can be overridden for one run: --set sampler.steps=30

[input]
manifest = "prompts.parquet"        # a file, glob, folder or s3://..., or a list; one row is one picture
# columns = { prompt = "caption" }  # where your columns have other names: ours = theirs
# prompt = "a photo of a {color} {shape}"   # or a template over them
# repeat = 4                        # pictures a row, each with its own seed

[model]
path = "tiny-scenes"                # ships with batchsd; or a folder in diffusers layout, a .safetensors file, org/name

[sampler]                           # a manifest column of the same name is over these, row by row
scheduler = "dpmpp_2m"
steps = 20
guidance_scale = 2.0                # 5 to 8 for Stable Diffusion; the small model wants less
# height = 512                      # left out: the model's own size
# width = 512

[output]
uri = "out"                         # a folder that the run makes, or s3://...
# sink = "webdataset"               # or folder; parquet if left out
# image = { format = "jpeg", quality = 95 }

[run]
seed = 0                            # for rows without one
"""


def start(folder: Path) -> list[Path]:
    """Write `job.toml` and `prompts.parquet` into `folder` and name them. Raises UsageError where one is there."""
    job, manifest = folder / "job.toml", folder / "prompts.parquet"
    for path in (job, manifest):
        if path.exists():
            raise UsageError(f"{path} is there already; batchsd init overwrites nothing: name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_manifest(manifest)
        job.write_text(JOB, "utf-8")
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written: {error.strerror}") from None
    return [job, manifest]


def write_manifest(path: Path, **more: Sequence[str]) -> None:
    """`PROMPTS` with an `id` each, and other columns beside them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids = [f"scene-{number}" for number in range(len(PROMPTS))]
    pq.write_table(pa.table({"id": ids, "prompt": PROMPTS, **more}), path)
