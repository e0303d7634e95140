"""Writes image.parquet, the manifest of image.toml: 5 rendered scenes, each to be recoloured at 5 strengths.

The pictures lie in the manifest itself, as PNG bytes, in the struct<bytes, path> that `datasets` uses.
"""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from batchsd.training.captions import full_caption
from batchsd.training.scenes import render, sample_reserved_scene

NEW_COLOURS = {0: "green", 1: "blue", 2: "yellow", 5: "purple", 6: "cyan"}  # of the first body of that scene
STRENGTHS = (0.05, 0.1, 0.2, 0.5, 1.0)

rows = []
for i, colour in NEW_COLOURS.items():
    scene = sample_reserved_scene(np.random.default_rng([20, i]))
    recoloured = replace(scene, bodies=(replace(scene.bodies[0], colour=colour), *scene.bodies[1:]))
    file = io.BytesIO()
    Image.fromarray(render(scene).image).save(file, "PNG")
    for strength in STRENGTHS:
        rows.append(
            {
                "id": f"scene-{i}-{strength}",
                "prompt": full_caption(recoloured),
                "source": full_caption(scene),
                "init_image": {"bytes": file.getvalue(), "path": f"scene-{i}.png"},
                "strength": strength,
            }
        )
schema = pa.schema(
    {
        "id": pa.string(),
        "prompt": pa.string(),
        "source": pa.string(),
        "init_image": pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        "strength": pa.float64(),
    }
)
pq.write_table(pa.Table.from_pylist(rows, schema), Path(__file__).with_suffix(".parquet"))
