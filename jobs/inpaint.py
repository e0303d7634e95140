"""Writes inpaint.parquet, the manifest of inpaint.toml: 12 rendered scenes, each with one body to be replaced.

The mask is white where the picture is drawn anew: the box around the body and its shadow, without the other body.
"""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from batchsd.training.captions import full_caption
from batchsd.training.scenes import COLOURS, SHAPES, render, sample_reserved_scene

MARGIN, SHADOW = 3, 12  # pixels around the body; light comes from the left, so more on its right
CELL = 8  # pixels a latent: a cell that is masked in part keeps, or loses, what it held as a whole


def png(pixels: np.ndarray, path: str) -> dict[str, object]:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": path}


def box_around_first(bodies_HW: np.ndarray) -> np.ndarray:
    """A mask of whole cells: 255 in the first body's box and around it, 0 on the second body."""
    y, x = np.nonzero(bodies_HW == 1)
    mask_HW = np.zeros(bodies_HW.shape, np.uint8)
    top, left = (max(0, side.min() - MARGIN) // CELL * CELL for side in (y, x))
    bottom, right = (-(-(end + 1) // CELL) * CELL for end in (y.max() + MARGIN, x.max() + SHADOW))
    mask_HW[top:bottom, left:right] = 255
    mask_HW[bodies_HW == 2] = 0
    return mask_HW


rows = []
for i in range(12):
    rng = np.random.default_rng([21, i])
    scene = sample_reserved_scene(rng)
    body = scene.bodies[0]
    colour = rng.choice([each for each in COLOURS if each != body.colour])
    shape = rng.choice([each for each in SHAPES if each != body.shape])
    wanted = replace(scene, bodies=(replace(body, colour=str(colour), shape=str(shape)), *scene.bodies[1:]))
    rendered = render(scene)
    rows.append(
        {
            "id": f"scene-{i:02d}",
            "prompt": full_caption(wanted),
            "source": full_caption(scene),
            "init_image": png(rendered.image, f"scene-{i:02d}.png"),
            "mask": png(box_around_first(rendered.masks), f"mask-{i:02d}.png"),
        }
    )
picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
schema = pa.schema(
    {"id": pa.string(), "prompt": pa.string(), "source": pa.string(), "init_image": picture, "mask": picture}
)
pq.write_table(pa.Table.from_pylist(rows, schema), Path(__file__).with_suffix(".parquet"))
