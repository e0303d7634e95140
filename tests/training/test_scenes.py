"""What is sampled: what a person reads in the picture, and what training never sees."""

from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from batchsd.training.render import COLOUR_RGB, project
from batchsd.training.scenes import (
    ALL_PAIRS,
    HELD_OUT_PAIRS,
    attributes,
    has_held_out_pair,
    is_reserved,
    render,
    sample_evaluation_scene,
    sample_new_pair_scene,
    sample_reserved_scene,
    sample_scene,
    sample_training_scene,
    training_pairs,
)


def scenes(sample, n, seed=0):
    rng = np.random.default_rng(seed)
    return [sample(rng) for _ in range(n)]


@pytest.fixture(scope="module")
def drawn():
    return [(scene, render(scene)) for scene in scenes(sample_scene, 250)]


def box(mask):
    rows, columns = np.nonzero(mask)
    return rows.min(), rows.max(), columns.min(), columns.max()


# Half width at the foot and at the top, and height, of a body of width 1; the cube's corners stand out.
OUTLINE = {"sphere": (0.5, 0.5), "cube": (0.54, 0.54), "cylinder": (0.44, 0.44), "cone": (0.5, 0)}
HEIGHT = {"sphere": 1, "cube": 0.76, "cylinder": 0.9, "cone": 1.15}


def test_bodies_lie_inside_the_frame_and_are_seen(drawn):
    for scene, picture in drawn:
        for i, body in enumerate(scene.bodies):
            assert (picture.masks == i + 1).sum() >= 120, body  # even a small cone behind a large cube
            for across, up in product((-1, 1), (0, 1)):
                half = OUTLINE[body.shape][up] * body.width
                height = up * HEIGHT[body.shape] * body.width
                column, row, _ = project(body.x + across * half, height, body.z, 64)
                # a large cube or ball at the side may lose its outermost pixel, no more
                assert -1.5 <= column <= 65.5 and 0 <= row <= 64, body


def test_places_and_sizes_are_what_the_pixels_show(drawn):
    for scene, picture in drawn:
        boxes = [box(picture.masks == i + 1) for i in range(len(scene.bodies))]
        if len(scene.bodies) == 1:
            (body,), (_, _, left, right) = scene.bodies, boxes[0]
            third = {"left": (0, 24), "center": (24, 40), "right": (40, 64)}[body.place]
            assert third[0] <= (left + right) / 2 <= third[1]
            width = right - left + 1
            assert 24 <= width <= 33 if body.size == "large" else 14 <= width <= 21
        elif scene.bodies[0].place in ("left of", "right of"):
            first, second = boxes if scene.bodies[0].place == "left of" else boxes[::-1]
            assert first[3] < second[2]  # a gap between them
            assert abs(first[1] - second[1]) <= 7  # they stand on one line, one wider than the other
        else:
            front, back = boxes if scene.bodies[0].place == "in front of" else boxes[::-1]
            assert front[1] > back[1] + 8  # lower in the picture


def test_a_bodys_commonest_hue_is_its_named_one(drawn):
    """A pixel's direction in RGB is nearest to the asked colour's, whatever the shade."""
    named = {name: np.array(rgb) / np.linalg.norm(rgb) for name, rgb in COLOUR_RGB.items()}
    for scene, picture in drawn:
        for i, body in enumerate(scene.bodies):
            pixels = picture.image[picture.masks == i + 1].astype(float)
            # the largest cosine; a pixel's own length does not matter
            nearest = np.argmax(pixels @ np.stack(list(named.values())).T, axis=1)
            assert list(named)[np.bincount(nearest).argmax()] == body.colour


def test_attributes_are_drawn_evenly():
    bodies = [body for scene in scenes(sample_scene, 3000) for body in scene.bodies]
    counts = Counter((body.colour, body.shape) for body in bodies)
    assert set(counts) == set(ALL_PAIRS)
    expected = len(bodies) / 32
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 62  # chi-square, 31 free: p = 0.001
    assert 0.45 < np.mean([body.size == "large" for body in bodies]) < 0.55


def test_training_sees_nothing_that_is_held_back():
    for scene in scenes(sample_training_scene, 1500):
        assert not is_reserved(scene)
        assert all((body.colour, body.shape) not in HELD_OUT_PAIRS for body in scene.bodies)
    assert len(training_pairs()) == 29
    assert set(training_pairs()) | set(HELD_OUT_PAIRS) == set(ALL_PAIRS)


def test_evaluation_sees_only_what_is_held_back():
    assert all(has_held_out_pair(scene) for scene in scenes(sample_new_pair_scene, 60))
    reserved = scenes(sample_reserved_scene, 60)
    assert all(is_reserved(scene) and not has_held_out_pair(scene) for scene in reserved)
    assert all(is_reserved(s) or has_held_out_pair(s) for s in scenes(sample_evaluation_scene, 60))


def test_a_tenth_is_reserved_whichever_body_is_named_first():
    both = [scene for scene in scenes(sample_scene, 4000) if len(scene.bodies) == 2]
    assert 0.08 < np.mean([is_reserved(scene) for scene in both]) < 0.12
    for scene in both[:200]:
        turned = replace(scene, bodies=scene.bodies[::-1])
        assert attributes(turned) == attributes(scene)


def test_a_seed_gives_the_same_scenes():
    assert scenes(sample_training_scene, 5, seed=7) == scenes(sample_training_scene, 5, seed=7)
    assert scenes(sample_training_scene, 5, seed=7) != scenes(sample_training_scene, 5, seed=8)
