"""How layouts are compared: the cutting rule on renders, whose masks are exact, and the rows that are drawn."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
from PIL import Image

from batchsd.training.layout import Layouts, foreground, overlap
from batchsd.training.scenes import Body, Scene, render


def test_overlap_by_hand() -> None:
    one = np.zeros((2, 4, 4), bool)
    one[0, :2], one[1] = True, False
    other = np.zeros((2, 4, 4), bool)
    other[0, 1:3] = True
    assert overlap(one, other) == (4 / 12 + 0) / 2
    assert overlap(one, one) == 0.5, "nothing found where nothing is: no overlap to speak of"


def test_renders_are_cut_out_along_their_masks() -> None:
    layouts = Layouts.held_out(24)
    assert layouts.overlap(layouts.images) > 0.94
    assert layouts.overlap(layouts.images[::-1].copy()) < 0.6, "another scene's picture is not this layout"
    empty = [replace(scene, bodies=()) for scene in layouts.scenes]
    bare = np.stack([render(scene).image for scene in empty])
    assert not foreground(bare, layouts.scenes).any()


def test_shadows_are_floor() -> None:
    body = Body("cube", "red", "large", "center", 0.0, -0.3, 1.8, 0.6)
    scene = Scene((body,), "white", "gray", (-0.5, 0.8, -0.3))
    drawn = render(scene)
    dark = (drawn.image.max(-1) < 160) & (np.ptp(drawn.image, axis=-1) < 8) & (drawn.masks == 0)
    dark[:28] = False  # the wall
    assert dark.sum() > 50
    assert foreground(drawn.image[None], [scene])[0][dark].mean() < 0.05


def test_depth_rows_hold_nearness_and_image_rows_ask_for_one_other_colour() -> None:
    layouts = Layouts.held_out(12)
    for each, given in zip(layouts.drawn, layouts.depth_inputs(), strict=True):
        near = np.asarray(Image.open(io.BytesIO(given["depth"]))).astype(float)
        assert near.max() == 65535 and near.flat[each.depth.argmin()] == 65535
        order = np.argsort(each.depth, axis=None)
        assert (np.diff(near.flat[order]) <= 1).all()
    for asked, scene in zip(layouts.recoloured(), layouts.scenes, strict=True):
        assert asked.bodies[0].colour != scene.bodies[0].colour
        assert replace(asked, bodies=scene.bodies) == scene and asked.bodies[1:] == scene.bodies[1:]
        assert replace(asked.bodies[0], colour=scene.bodies[0].colour) == scene.bodies[0]
