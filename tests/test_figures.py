"""Mean, deviation and dHash. The oracles: numpy in float64, and a Lanczos resize written out here."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchsd.figures import dhash, figures, moments


def picture(seed: int, height: int = 64, width: int = 96) -> np.ndarray:
    """A few soft bumps and noise: no neighbours of the small copy are alike."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 64
    bumps = sum(a * np.sin(b * x + c * y + d) for a, b, c, d in rng.normal(0, 4, (6, 4)))
    return np.clip(128 + 12 * bumps[..., None] + rng.normal(0, 9, (height, width, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("seed", range(5))
def test_moments_are_those_of_the_numbers(seed):
    drawn = picture(seed)
    mean, deviation = moments(drawn)
    assert mean == pytest.approx(drawn.mean(dtype=np.float64) / 255, rel=1e-12)
    assert deviation == pytest.approx(drawn.std(dtype=np.float64) / 255, rel=1e-12)


def test_black_white_and_half():
    half = np.zeros((8, 8, 3), np.uint8)
    assert moments(half) == (0.0, 0.0) and moments(half + 255) == (1.0, 0.0)
    half[:4] = 255
    assert moments(half) == (0.5, 0.5)


def test_no_sum_overflows():
    assert moments(np.full((4096, 4096, 3), 255, np.uint8)) == (1.0, 0.0)


def lanczos(row: np.ndarray, size: int) -> np.ndarray:
    """Samples (n, ...) brought to `size` of them with the Lanczos-3 window, widened where it gets smaller."""
    scale = len(row) / size
    out = np.zeros((size, *row.shape[1:]))
    for i in range(size):
        distance = (np.arange(len(row)) + 0.5 - (i + 0.5) * scale) / max(scale, 1)
        weights = np.where(np.abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0)
        out[i] = np.tensordot(weights / weights.sum(), row, 1)
    return out


@pytest.mark.parametrize("seed", range(5))
def test_dhash_compares_neighbours_of_a_small_grey_copy(seed):
    drawn = picture(seed)
    grey = drawn @ [0.299, 0.587, 0.114]
    small = lanczos(lanczos(grey, 8).T, 9).T
    steps = np.diff(small, axis=1).ravel()
    bits = [int(bit) for bit in f"{int(dhash(drawn), 16):064b}"]
    sure = np.abs(steps) > 1.5  # Pillow rounds to whole numbers twice
    assert sure.sum() > 40
    assert [bit for bit, known in zip(bits, sure, strict=True) if known] == (steps[sure] > 0).astype(int).tolist()


def test_like_pictures_have_like_hashes():
    def far(a: np.ndarray, b: np.ndarray) -> int:
        return (int(dhash(a), 16) ^ int(dhash(b), 16)).bit_count()

    drawn = picture(1)
    assert far(drawn, (drawn * 0.9).astype(np.uint8)) <= 4
    assert far(drawn, 255 - drawn) >= 60
    assert 15 < np.mean([far(picture(i), picture(i + 1)) for i in range(10)]) < 45


def test_figures_survive_every_reader_with_nulls_beside_them(tmp_path):
    """The reason for hex digits: pandas reads a whole-number column with nulls as floats."""
    found = figures(picture(3))
    path = tmp_path / "t.parquet"
    columns = {"dhash": pa.string(), "mean": pa.float64(), "deviation": pa.float64()}
    pq.write_table(pa.Table.from_pylist([dict(found), {}], pa.schema(list(columns.items()))), path)
    import pandas
    from datasets import load_dataset

    read = [pandas.read_parquet(path).iloc[0].to_dict()]
    read.append(load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "c"))[0])
    assert all(row == found for row in read)
    assert all(math.isfinite(row["mean"]) and len(row["dhash"]) == 16 for row in read)
