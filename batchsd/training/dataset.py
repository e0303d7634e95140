"""Writes sampled scenes as Parquet: row i depends on (seed, i) alone, whatever the number of processes.

Columns: image, depth, mask (PNG), caption, attributes (the whole scene as JSON). Depth is 16 bit, in
thousandths of a world unit along the view axis; mask holds 0 for background and 1 + the body's index.
"""

from __future__ import annotations

import io
import json
import multiprocessing
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from batchsd.training.captions import caption
from batchsd.training.scenes import (
    Scene,
    render,
    sample_evaluation_scene,
    sample_scene,
    sample_training_scene,
)

if TYPE_CHECKING:
    import pyarrow as pa

SPLITS: dict[str, Callable[[np.random.Generator], Scene]] = {
    "train": sample_training_scene,
    "eval": sample_evaluation_scene,
    "all": sample_scene,
}
DEPTH_STEPS = 1000  # a world unit; the farthest wall is at 15, so 16 bits hold it
ROWS = 100  # a row group: what viewers of image data sets read quickly

PICTURES = ("image", "depth", "mask")


def schema() -> pa.Schema:
    """The columns, with the metadata by which `datasets` shows pictures."""
    import pyarrow as pa

    picture = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
    features = {name: {"_type": "Image"} for name in PICTURES}
    return pa.schema(
        [pa.field(name, picture) for name in PICTURES]
        + [pa.field("caption", pa.string()), pa.field("attributes", pa.string())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )


def _png(pixels: np.ndarray, path: str) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": path}


def scene_row(index: int, seed: int, size: int, split: str) -> dict[str, Any]:
    """Row `index` of the data set `seed`: a dict of the columns."""
    rng = np.random.default_rng([seed, index])
    scene = SPLITS[split](rng)
    drawn = render(scene, size)
    return {
        "image": _png(drawn.image, f"{index:06d}.png"),
        "depth": _png(np.rint(drawn.depth * DEPTH_STEPS).astype(np.uint16), f"{index:06d}-depth.png"),
        "mask": _png(drawn.masks, f"{index:06d}-mask.png"),
        "caption": caption(scene, rng),
        "attributes": json.dumps(asdict(scene)),
    }


def write_dataset(
    path: Path | str, n: int, seed: int, size: int = 64, workers: int = 1, split: str = "train"
) -> None:
    """Draw n scenes of a split (a key of SPLITS) at size x size pixels into one Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = partial(scene_row, seed=seed, size=size, split=split)
    plain = [f"{name}.{part}" for name in PICTURES for part in ("bytes", "path")]
    codecs = {"caption": "snappy", "attributes": "snappy"} | dict.fromkeys(plain, "none")  # PNG is packed

    def write(rows: Iterable[dict[str, Any]]) -> None:
        with pq.ParquetWriter(
            path, schema(), compression=codecs, use_dictionary=["caption"], write_page_index=True
        ) as writer:
            group = []
            for i, values in enumerate(rows):
                group.append(values)
                if len(group) == ROWS or i == n - 1:
                    writer.write_table(pa.Table.from_pylist(group, schema()))
                    group = []

    if workers == 1:
        write(map(row, range(n)))
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        write(pool.imap(row, range(n), chunksize=ROWS))
