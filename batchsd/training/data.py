"""Training pictures in memory: a Parquet of (image, caption), with `attributes` and `mask` where it has them.

Pictures stay uint8 (64 px: 12 KB each) and become floats in [-1, 1] a batch at a time.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from batchsd.types import UsageError


@dataclass(frozen=True)
class Pictures:
    """N pictures with what is known of each.

    `images_N3HW` uint8; `masks_N1HW` uint8, an object's number a pixel, 0 the background; `attributes` a
    mapping of names to labels a picture. The last two are None where the file has no such column.
    """

    images_N3HW: Tensor
    captions: Sequence[str]
    masks_N1HW: Tensor | None
    attributes: Sequence[Mapping[str, Any]] | None

    def __len__(self) -> int:
        return len(self.captions)

    def floats(self, index: Tensor) -> Tensor:
        """The chosen pictures, B 3 H W in [-1, 1]."""
        return self.images_N3HW[index].float() / 127.5 - 1


def load_pictures(path: Path) -> Pictures:
    """Reads the whole file; all pictures must have one size. Raises `UsageError` where it cannot be used."""
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise UsageError(f"{path}: not readable as Parquet ({error})") from None
    names = set(file.schema_arrow.names)
    if missing := {"image", "caption"} - names:
        raise UsageError(f"{path}: no column {', '.join(sorted(missing))}; training needs image and caption")
    images, masks, captions, attributes = [], [], [], []
    columns = [name for name in ("image", "caption", "mask", "attributes") if name in names]
    for batch in file.iter_batches(batch_size=500, columns=columns):
        for row in batch.to_pylist():
            images.append(_decode(row["image"], "RGB"))
            captions.append(row["caption"])
            if row.get("mask") is not None:
                masks.append(_decode(row["mask"], "L"))
            if row.get("attributes") is not None:
                attributes.append(_labels(row["attributes"]))
    if len({image.shape for image in images}) != 1:
        raise UsageError(f"{path}: pictures of several sizes; training wants one size")
    return Pictures(
        torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
        captions,
        torch.from_numpy(np.stack(masks))[:, None] if len(masks) == len(images) else None,
        attributes if len(attributes) == len(images) else None,
    )


def content_of(value: Any) -> bytes:
    """An image column's file bytes: a struct of bytes and path, or the bytes themselves."""
    return value["bytes"] if isinstance(value, Mapping) else value


def _decode(value: Any, mode: str) -> np.ndarray:
    with Image.open(io.BytesIO(content_of(value))) as image:
        return np.array(image if image.mode == mode else image.convert(mode))


def _labels(value: Any) -> Mapping[str, Any]:
    return json.loads(value) if isinstance(value, str) else value
