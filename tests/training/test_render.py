"""The closed-form ray caster against brute force: step along each ray until a point lies inside a body."""

import numpy as np
import pytest

from batchsd.training.render import (
    COLOUR_RGB,
    EYE,
    FLOOR_RGB,
    FORWARD,
    WALL_RGB,
    WALL_Z,
    camera_rays,
    project,
    render,
)
from batchsd.training.scenes import SHAPES, Body, Scene, sample_scene

LIGHT = (-0.5, 0.81, -0.3)


def body(shape, colour="red", x=0.1, z=-0.2, width=1.6, turn=0.7):
    return Body(shape, colour, "large", "center", x, z, width, turn)


def inside(body, x, y, z):
    """Whether points lie in a body, from its definition alone."""
    c, s, w = np.cos(body.turn), np.sin(body.turn), body.width
    x, z = x - body.x, z - body.z
    x, z = c * x - s * z, s * x + c * z
    if body.shape == "sphere":
        return x**2 + (y - w / 2) ** 2 + z**2 <= (w / 2) ** 2
    if body.shape == "cube":
        h = 0.38 * w
        return (abs(x) <= h) & (abs(z) <= h) & (y >= 0) & (y <= 2 * h)
    if body.shape == "cylinder":
        return (x**2 + z**2 <= (0.44 * w) ** 2) & (y >= 0) & (y <= 0.9 * w)
    height = 1.15 * w
    return (x**2 + z**2 <= (w / 2 * (1 - y / height)) ** 2) & (y >= 0) & (y <= height)


def march(scene, size, step=0.01):
    """Depth and owner of each pixel by walking its ray; depth is right to one step."""
    direction = np.stack([d.astype(np.float64) for d in camera_rays(size).direction])
    depth, owner = np.full((size, size), np.nan), np.zeros((size, size), int)
    for t in np.arange(8, 16.5, step):
        x, y, z = (e + t * d for e, d in zip(EYE, direction, strict=True))
        new = np.isnan(depth)
        for i, each in enumerate(scene.bodies):
            hit = new & np.isnan(depth) & inside(each, x, y, z)
            depth[hit], owner[hit] = t, i + 1
        depth[np.isnan(depth) & ((y < 0) | (z > WALL_Z))] = t
    return depth * np.tensordot(FORWARD, direction, 1), owner


@pytest.mark.parametrize("shape", SHAPES)
def test_depth_and_mask_match_marched_rays(shape):
    scene = Scene((body(shape), body("sphere", "blue", x=-0.6, z=1.0, width=1.1)), "white", "gray", LIGHT)
    drawn = render(scene, 32)
    depth, owner = march(scene, 32)
    same = drawn.masks == owner
    assert same.mean() > 0.99  # a ray that grazes an outline may be inside for less than one step
    assert set(np.unique(drawn.masks)) == {0, 1, 2}
    assert np.abs(drawn.depth - depth)[same].max() < 0.0101
    assert drawn.depth.dtype == np.float32 and drawn.masks.dtype == np.uint8


def test_a_rays_point_projects_to_its_pixel():
    rays = camera_rays(16)
    for row, column in ((0, 0), (3, 11), (15, 7)):
        point = [e + 11.0 * float(d[row, column]) for e, d in zip(EYE, rays.direction, strict=True)]
        assert project(*point, 16)[:2] == pytest.approx((column + 0.5, row + 0.5), abs=1e-4)


def test_colours_are_the_named_ones():
    """Floor and wall have their own tones far from the body; a flat top is its colour times its light."""
    image = render(Scene((body("cylinder", "green"),), "brown", "beige", LIGHT)).image
    assert tuple(image[60, 3]) == FLOOR_RGB["brown"]
    assert image[2, 3] == pytest.approx(0.9 * np.array(WALL_RGB["beige"]), abs=1)
    column, row, _ = project(0.1, 0.9 * 1.6, -0.2, 64)
    expected = np.array(COLOUR_RGB["green"]) * (0.42 + 0.7 * LIGHT[1])
    assert image[int(row), int(column)] == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_shadow_falls_where_the_body_hides_the_light(shape):
    solid = body(shape)
    drawn = render(Scene((solid,), "white", "black", LIGHT))
    rays = camera_rays(64)
    away = np.arange(0.01, 3, 0.01)
    dark = 0
    for row in range(22, 64):
        for column in range(64):
            if drawn.masks[row, column]:
                continue
            t = float(rays.ground_t[row, column])
            x, _, z = (e + t * float(d[row, column]) for e, d in zip(EYE, rays.direction, strict=True))
            to_light = (p + away * d for p, d in zip((x, 0, z), LIGHT, strict=True))
            hidden = inside(solid, *to_light).any()
            dark += hidden
            if z < WALL_Z - 0.2:
                # 0.55 and 1 times 236; between them only where the four rays of a pixel disagree
                value = drawn.image[row, column, 1]
                near = drawn.masks[row - 1 : row + 2, max(0, column - 1) : column + 2].any()
                assert value <= 205 if hidden else value >= 150 or near, (row, column)
    assert dark > 15


def test_one_scene_gives_one_picture():
    scene = sample_scene(np.random.default_rng(3))
    assert np.array_equal(render(scene).image, render(scene).image)
    assert render(scene, 128).image.shape == (128, 128, 3)
