"""Draws a scene by casting rays: eye -> first surface -> depth, colour = albedo * (ambient + diffuse * n.l).

World: x right, y up, z away from the camera; the floor is y = 0, the wall z = WALL_Z. Near the origin one
world unit is 16 pixels of a 64-pixel picture. Every surface has a closed-form intersection, so depth and
masks are exact: both come from the ray through the pixel's centre. Colour is the mean of 2x2 rays a pixel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from batchsd.training.scenes import Body, Scene

Array = NDArray[np.floating[Any]]
Vector = tuple[Array, Array, Array]

COLOUR_RGB = {
    "red": (222, 32, 36),
    "green": (36, 168, 56),
    "blue": (40, 72, 232),
    "yellow": (244, 220, 36),
    "purple": (140, 44, 190),
    "orange": (248, 128, 16),
    "cyan": (48, 208, 224),
    "pink": (252, 146, 196),
}
FLOOR_RGB = {"white": (236, 236, 236), "gray": (150, 150, 150), "brown": (128, 92, 64), "black": (46, 46, 46)}
WALL_RGB = {"white": (246, 246, 246), "gray": (128, 128, 128), "beige": (222, 200, 158), "black": (34,) * 3}

PITCH = np.deg2rad(30.0)  # high enough that tops show as wide ellipses and rhombs, low enough to see the wall
DISTANCE = 12.0  # far away: weak perspective, so that a size means the same in every place
TARGET_Y = 0.58  # lifts the view, so that the floor's origin lies 8 pixels below the middle
PIXELS_PER_UNIT = 0.25  # of the picture's width, at the target: 16 of 64
WALL_Z = 2.45
AMBIENT, DIFFUSE = 0.42, 0.7  # their sum passes 1: faces turned to the light are lightened, and clipped
SHADOW = 0.55
FORWARD = (0.0, -float(np.sin(PITCH)), float(np.cos(PITCH)))
EYE = (0.0, TARGET_Y - DISTANCE * FORWARD[1], -DISTANCE * FORWARD[2])


@dataclass(frozen=True)
class Rendered:
    """One picture: `image` H W 3 uint8; `depth` H W float32, along the view axis, in world units;
    `masks` H W uint8: 0 background, 1 + index of the body seen there."""

    image: NDArray[np.uint8]
    depth: Array
    masks: NDArray[np.uint8]


@dataclass(frozen=True)
class Rays:
    """A square grid of unit rays from the eye, with what each meets when there is no body."""

    direction: Vector
    ground_t: Array
    is_floor: NDArray[np.bool_]


@lru_cache(maxsize=8)
def camera_rays(size: int) -> Rays:
    """The rays through the centres of a size x size grid of pixels."""
    step = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    u, v = np.meshgrid(step, -step)
    focal = PIXELS_PER_UNIT * DISTANCE
    # right = (1, 0, 0); up = forward turned by a right angle in the y-z plane
    dx, dy, dz = u, FORWARD[1] * focal + v * FORWARD[2], FORWARD[2] * focal - v * FORWARD[1]
    norm = np.sqrt(dx**2 + dy**2 + dz**2)
    dx, dy, dz = dx / norm, dy / norm, dz / norm
    wall_t = (WALL_Z - EYE[2]) / dz
    floor_t = np.where(dy < 0, -EYE[1] / np.minimum(dy, -1e-6), np.inf)
    return Rays((dx, dy, dz), np.minimum(floor_t, wall_t).astype(np.float32), floor_t < wall_t)


def _constant(values: tuple[float, float, float]) -> Vector:
    # float32 here keeps all later arithmetic in float32: twice as fast, and exact to 1e-5 at these distances
    x, y, z = np.array(values, np.float32)[:, None]
    return x, y, z


def _first(t: Array, ok: NDArray[np.bool_]) -> Array:
    return np.where(ok & (t > 0), t, np.float32(np.inf))


def _roots(a: Array, b: Array, c: Array) -> tuple[Array, Array]:
    """Both roots of a t^2 + 2 b t + c, ordered; NaN where there is none (it fails later comparisons)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        root = np.sqrt(b * b - a * c)
        low, high = (-b - root) / a, (-b + root) / a
    return np.minimum(low, high), np.maximum(low, high)


def sphere(o: Vector, d: Vector, w: float) -> tuple[Array, Vector]:
    """A ball of diameter w standing on the floor."""
    r = w / 2
    oy = o[1] - r
    b = o[0] * d[0] + oy * d[1] + o[2] * d[2]
    t, _ = _roots(np.ones((), np.float32), b, o[0] ** 2 + oy**2 + o[2] ** 2 - r * r)
    t = _first(t, t == t)
    at = np.where(np.isfinite(t), t, 0)
    return t, ((o[0] + at * d[0]) / r, (oy + at * d[1]) / r, (o[2] + at * d[2]) / r)


def cube(o: Vector, d: Vector, w: float) -> tuple[Array, Vector]:
    """Edge 0.76 w: turned by about 40 degrees it looks 1.07 w wide."""
    h = 0.38 * w
    near, far = [], []
    for o_i, d_i in zip((o[0], o[1] - h, o[2]), d, strict=True):
        with np.errstate(divide="ignore"):
            a, b = (-h - o_i) / d_i, (h - o_i) / d_i
        near.append(np.minimum(a, b))
        far.append(np.maximum(a, b))
    t = np.maximum(np.maximum(near[0], near[1]), near[2])
    t_hit = _first(t, t < np.minimum(np.minimum(far[0], far[1]), far[2]))
    x, y, z = (np.where(t == near_i, -np.sign(d_i), 0) for near_i, d_i in zip(near, d, strict=True))
    return t_hit, (x, y, z)


def cylinder(o: Vector, d: Vector, w: float) -> tuple[Array, Vector]:
    """Upright, 0.88 w across and 0.9 w high."""
    r, h = 0.44 * w, 0.9 * w
    side, _ = _roots(d[0] ** 2 + d[2] ** 2, o[0] * d[0] + o[2] * d[2], o[0] ** 2 + o[2] ** 2 - r * r)
    y = o[1] + side * d[1]
    side = _first(side, (y >= 0) & (y <= h))
    up = (h - o[1]) / d[1]
    top = _first(up, (o[0] + up * d[0]) ** 2 + (o[2] + up * d[2]) ** 2 <= r * r)
    t, is_top = np.minimum(side, top), top < side
    at = np.where(np.isfinite(t), t, 0)
    nx, nz = (o[0] + at * d[0]) / r, (o[2] + at * d[2]) / r
    return t, (np.where(is_top, 0, nx), np.where(is_top, np.float32(1), 0), np.where(is_top, 0, nz))


def cone(o: Vector, d: Vector, w: float) -> tuple[Array, Vector]:
    """Upright, w across and 1.15 w high: x^2 + z^2 = k^2 (h - y)^2, only the half below the tip."""
    r, h = 0.5 * w, 1.15 * w
    k2 = (r / h) ** 2
    oy = o[1] - h
    low, high = _roots(
        d[0] ** 2 + d[2] ** 2 - k2 * d[1] ** 2,
        o[0] * d[0] + o[2] * d[2] - k2 * oy * d[1],
        o[0] ** 2 + o[2] ** 2 - k2 * oy**2,
    )
    hits = []
    for t in (low, high):  # the nearer root may lie on the mirrored half above the tip
        y = o[1] + t * d[1]
        hits.append(_first(t, (y >= 0) & (y <= h)))
    t = np.minimum(hits[0], hits[1])
    at = np.where(np.isfinite(t), t, 0)
    nx, ny, nz = o[0] + at * d[0], -k2 * (oy + at * d[1]), o[2] + at * d[2]
    norm = np.sqrt(nx**2 + ny**2 + nz**2) + 1e-9
    return t, (nx / norm, ny / norm, nz / norm)


Surface = Callable[[Vector, Vector, float], tuple[Array, Vector]]
SURFACES: dict[str, Surface] = {"sphere": sphere, "cube": cube, "cylinder": cylinder, "cone": cone}


def _intersect(body: Body, o: Vector, d: Vector) -> tuple[Array, Vector]:
    """First hit of rays o + t d with a body: t (inf where missed) and the unit normal, both in world axes."""
    c, s = np.float32(np.cos(body.turn)), np.float32(np.sin(body.turn))
    ox, oz = o[0] - np.float32(body.x), o[2] - np.float32(body.z)
    local_o = (c * ox - s * oz, o[1], s * ox + c * oz)
    local_d = (c * d[0] - s * d[2], d[1], s * d[0] + c * d[2])
    t, (nx, ny, nz) = SURFACES[body.shape](local_o, local_d, body.width)
    return t, (c * nx + s * nz, ny, c * nz - s * nx)


def project(x: float, y: float, z: float, size: int) -> tuple[float, float, float]:
    """A world point -> pixel column, pixel row (0 at the upper left edge) and camera depth."""
    rel = (x - EYE[0], y - EYE[1], z - EYE[2])
    depth = rel[1] * FORWARD[1] + rel[2] * FORWARD[2]
    up = rel[1] * FORWARD[2] - rel[2] * FORWARD[1]
    focal = PIXELS_PER_UNIT * DISTANCE * size
    return size / 2 + focal * rel[0] / depth, size / 2 - focal * up / depth, depth


def _window(body: Body, size: int) -> tuple[slice, slice]:
    """Rows and columns that hold all of a body: its bounding ball, so that the other rays are not tried."""
    column, row, depth = project(body.x, 0.55 * body.width, body.z, size)
    reach = 0.85 * body.width * PIXELS_PER_UNIT * DISTANCE * size / depth + 2
    low = (max(0, int(row - reach)), max(0, int(column - reach)))
    return slice(low[0], int(row + reach)), slice(low[1], int(column + reach))


@dataclass
class _Hits:
    t: Array
    owner: NDArray[np.uint8]
    normal: Vector


def _trace(scene: Scene, rays: Rays) -> _Hits:
    size = rays.ground_t.shape[0]
    zeros = [np.zeros((size, size), np.float32) for _ in range(3)]
    hits = _Hits(rays.ground_t.copy(), np.zeros((size, size), np.uint8), (zeros[0], zeros[1], zeros[2]))
    eye = _constant(EYE)
    dx, dy, dz = rays.direction
    for i, body in enumerate(scene.bodies):
        window = _window(body, size)
        t, normal = _intersect(body, eye, (dx[window], dy[window], dz[window]))
        nearer = t < hits.t[window]
        hits.t[window][nearer] = t[nearer]
        hits.owner[window][nearer] = i + 1
        for total, part in zip(hits.normal, normal, strict=True):
            total[window][nearer] = part[nearer]
    return hits


def _shade_ground(scene: Scene, rays: Rays) -> Array:
    """Colours of floor and wall, with the bodies' shadows on the floor."""
    size = rays.ground_t.shape[0]
    light = _constant(scene.light)
    rgb = np.empty((size, size, 3), np.float32)
    rgb[:] = np.array(WALL_RGB[scene.wall], np.float32) * 0.9
    floor = np.array(FLOOR_RGB[scene.floor], np.float32)
    t = rays.ground_t[rays.is_floor]
    at = [np.float32(e) + t * d[rays.is_floor] for e, d in zip(EYE, rays.direction, strict=True)]
    dark = np.zeros(t.shape, bool)
    for body in scene.bodies:
        # a shadow is never longer than the body's height over the light's slope: about 1.3 widths
        close = (np.abs(at[0] - body.x) < 1.9 * body.width) & (np.abs(at[2] - body.z) < 1.9 * body.width)
        start = (at[0][close], np.full_like(at[0][close], 1e-3), at[2][close])
        dark[close] |= np.isfinite(_intersect(body, start, light)[0])
    rgb[rays.is_floor] = np.where(dark[:, None], SHADOW * floor, floor)
    return rgb


def _shade(scene: Scene, rays: Rays) -> Array:
    hits = _trace(scene, rays)
    rgb = _shade_ground(scene, rays)
    for i, body in enumerate(scene.bodies):
        seen = hits.owner == i + 1
        n = [part[seen] for part in hits.normal]
        lambert = np.maximum(sum(n_i * np.float32(l_i) for n_i, l_i in zip(n, scene.light, strict=True)), 0)
        colour = np.array(COLOUR_RGB[body.colour], np.float32)
        lit = (AMBIENT + DIFFUSE * lambert)[:, None] * colour
        if body.shape == "sphere":  # glossy: the highlight is what tells a small ball from a small cylinder
            half = [np.float32(l_i) - d[seen] for l_i, d in zip(scene.light, rays.direction, strict=True)]
            norm = np.sqrt(half[0] ** 2 + half[1] ** 2 + half[2] ** 2)
            shine = np.maximum(sum(n_i * h_i for n_i, h_i in zip(n, half, strict=True)) / norm, 0) ** 28
            lit += 0.75 * shine[:, None] * (255 - lit)
        rgb[seen] = lit
    return rgb


def render(scene: Scene, size: int = 64) -> Rendered:
    """Draw a scene as a size x size picture with its exact depth and body masks."""
    fine = np.clip(_shade(scene, camera_rays(2 * size)), 0, 255)
    image = fine.reshape(size, 2, size, 2, 3).mean(axis=(1, 3))
    rays = camera_rays(size)
    hits = _trace(scene, rays)
    along = sum(np.float32(f) * d for f, d in zip(FORWARD, rays.direction, strict=True))
    return Rendered((image + 0.5).astype(np.uint8), (hits.t * along).astype(np.float32), hits.owner)
