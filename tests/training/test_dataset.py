"""The written Parquet, read back by `datasets` and compared with the scenes that it came from."""

import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from batchsd.training.captions import Parts, say
from batchsd.training.dataset import write_dataset
from batchsd.training.scenes import Body, Scene, is_reserved, main, render


def rebuild(text):
    values = json.loads(text)
    bodies = tuple(Body(**body) for body in values["bodies"])
    return Scene(bodies, values["floor"], values["wall"], tuple(values["light"]))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("scenes") / "scenes.parquet"
    write_dataset(path, 120, seed=5)
    return path


def decode(value):
    return np.asarray(Image.open(io.BytesIO(value["bytes"])))


def test_rows_hold_what_the_scene_renders_to(file):
    table = pq.read_table(file)
    assert pq.ParquetFile(file).num_row_groups == 2 and table.num_rows == 120
    for row in table.slice(95, 10).to_pylist():
        scene = rebuild(row["attributes"])
        drawn = render(scene)
        assert np.array_equal(decode(row["image"]), drawn.image)
        assert np.array_equal(decode(row["mask"]), drawn.masks)
        assert np.abs(decode(row["depth"]) / 1000 - drawn.depth).max() <= 0.00051
        assert not is_reserved(scene)
    scene = rebuild(table["attributes"][0].as_py())
    switches = [tuple(bool(i >> bit & 1) for bit in range(5)) for i in range(32)]
    said = {say(scene, Parts((a, b), c, d, e, w)) for a, b, c, d, e in switches for w in (0, 1)}
    assert table["caption"][0].as_py() in said


def test_rows_do_not_depend_on_processes_or_count(file, tmp_path):
    write_dataset(tmp_path / "two.parquet", 110, seed=5, workers=2)
    assert pq.read_table(tmp_path / "two.parquet").equals(pq.read_table(file).slice(0, 110))


def test_datasets_shows_pictures(file, tmp_path):
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(tmp_path))
    row = loaded[0]
    assert row["image"].size == row["mask"].size == row["depth"].size == (64, 64)
    assert row["image"].mode == "RGB"


def test_the_command_writes_a_split(tmp_path, capsys):
    main([str(tmp_path / "eval.parquet"), "--count", "3", "--split", "eval", "--size", "32"])
    assert "3 scenes" in capsys.readouterr().out
    assert decode(pq.read_table(tmp_path / "eval.parquet")["image"][2].as_py()).shape == (32, 32, 3)
