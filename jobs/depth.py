"""Writes depth.parquet, the manifest of depth.toml: the layouts of 7 rendered scenes, each drawn in 4 other ways.

Three rows of each bring the scene's depth map, a 16-bit PNG in which nearer is brighter; the fourth brings the scene's
picture alone, from which the model's own depth network estimates the map. Prompts name other colours than the scenes
had, and no sizes: those are in the map alone.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batchsd.images import grey16, png
from batchsd.training.captions import Parts, full_caption, say
from batchsd.training.scenes import COLOURS, FLOORS, WALLS, render, sample_reserved_scene

SCENES = (3, 7, 9, 16, 20, 22, 25)  # of many, for their variety
WITHOUT_SIZES = Parts(sizes=(False, False))

rows = []
for way in range(4):
    for i in SCENES:
        rng = np.random.default_rng([22, i])
        scene = sample_reserved_scene(rng)
        others = rng.permutation([colour for colour in COLOURS if colour not in {b.colour for b in scene.bodies}])
        colours = [str(others[(way + 3 * j) % len(others)]) for j in range(len(scene.bodies))]
        bodies = tuple(replace(b, colour=colour) for b, colour in zip(scene.bodies, colours, strict=True))
        floor, wall = FLOORS[(i + way) % len(FLOORS)], WALLS[(i + 2 * way + 1) % len(WALLS)]
        drawn, estimated = render(scene), way == 3
        rows.append(
            {
                "id": f"scene-{i}-{way}",
                "prompt": say(replace(scene, bodies=bodies, floor=floor, wall=wall), WITHOUT_SIZES),
                "source": full_caption(scene),
                "depth": None if estimated else {"bytes": grey16(1 / drawn.depth), "path": f"depth-{i}.png"},
                "init_image": {"bytes": png(drawn.image), "path": f"scene-{i}.png"} if estimated else None,
            }
        )
picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
schema = pa.schema(
    {"id": pa.string(), "prompt": pa.string(), "source": pa.string(), "depth": picture, "init_image": picture}
)
pq.write_table(pa.Table.from_pylist(rows, schema), Path(__file__).with_suffix(".parquet"))
