"""Writes quickstart.parquet, the manifest of quickstart.toml: 48 prompts with the settings of some rows changed.

Columns left empty (null) take the job's value: so one job mixes samplers, step counts and guidance.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

PROMPTS = [
    "a large red sphere on the left, white floor, gray wall",
    "a small blue cube in the center, brown floor, beige wall",
    "a large green cone on the right, gray floor, white wall",
    "a large yellow cylinder in the center, black floor, gray wall",
    "a small purple sphere on the right, white floor, beige wall",
    "a large orange cube on the left, gray floor, black wall",
    "a large cyan cone in the center, brown floor, white wall",
    "a small pink cylinder on the left, black floor, beige wall",
    "a large red cube to the left of a small blue sphere, white floor, gray wall",
    "a small green cylinder to the right of a large yellow cone, gray floor, beige wall",
    "a large purple cone in front of a small orange cube, brown floor, white wall",
    "a small cyan sphere behind a large pink cylinder, black floor, white wall",
    "a large blue cylinder to the left of a large red sphere, beige wall",
    "a small yellow cube to the right of a small green sphere, white floor",
    "a large orange cone and a small purple cylinder, gray floor, white wall",
    "a large cyan cube in front of a large pink sphere, white floor, gray wall",
]
VARIANTS = [
    {"scheduler": None, "steps": None, "guidance_scale": None},
    {"scheduler": "euler_a", "steps": 30, "guidance_scale": 3.0},
    {"scheduler": "ddim", "steps": 12, "guidance_scale": 1.0},
]

rows = [
    {"id": f"scene-{i:02d}-{variant}", "prompt": prompt, **settings, "collection": "quickstart"}
    for i, prompt in enumerate(PROMPTS)
    for variant, settings in zip("abc", VARIANTS, strict=True)
]
schema = pa.schema(
    {
        "id": pa.string(),
        "prompt": pa.string(),
        "scheduler": pa.string(),
        "steps": pa.int32(),
        "guidance_scale": pa.float64(),
        "collection": pa.string(),
    }
)
pq.write_table(pa.Table.from_pylist(rows, schema), Path(__file__).with_suffix(".parquet"))
