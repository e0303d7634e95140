"""Small scenes to learn from: one or two solid bodies on a floor before a wall, and little else that varies.

A scene's *attributes* (shapes, colours, sizes, places, floor, wall) decide whether it may be trained on:
3 of the 32 (colour, shape) pairs and a fixed tenth of all attribute tuples are kept back, so that captions
exist which training never saw. `python -m batchsd.training.scenes OUT.parquet` writes a data set.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from batchsd.training.render import (
    COLOUR_RGB,
    DISTANCE,
    FLOOR_RGB,
    FORWARD,
    SURFACES,
    WALL_RGB,
    Rendered,
    render,
)

__all__ = ["Body", "Rendered", "Scene", "render", "sample_scene", "sample_training_scene"]

SHAPES = tuple(SURFACES)
COLOURS = tuple(COLOUR_RGB)
FLOORS = tuple(FLOOR_RGB)
WALLS = tuple(WALL_RGB)
SIZES = ("large", "small")
PLACES = ("left", "center", "right")
RELATIONS = {"left of": "right of", "right of": "left of", "in front of": "behind", "behind": "in front of"}
"""Place of the first of two bodies -> place of the second, each as seen from the other."""

Pair = tuple[str, str]
ALL_PAIRS: tuple[Pair, ...] = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
HELD_OUT_PAIRS: tuple[Pair, ...] = (("red", "cone"), ("cyan", "cylinder"), ("purple", "cube"))

WIDTH = {(1, "large"): 1.82, (1, "small"): 1.12, (2, "large"): 1.5, (2, "small"): 1.0}
"""World width by number of bodies and size; 16 pixels a unit at 64 pixels: 29, 18, 24 and 16 pixels."""


@dataclass(frozen=True)
class Body:
    """A solid. `place` is one of PLACES when alone, else its relation to the other body (keys of RELATIONS).

    `x`, `z`: where it stands on the floor; `width`: its size in world units; `turn`: radians, about y.
    """

    shape: str
    colour: str
    size: str
    place: str
    x: float
    z: float
    width: float
    turn: float


@dataclass(frozen=True)
class Scene:
    """One or two bodies, the names of the floor's and the wall's colour, and the unit vector to the light."""

    bodies: tuple[Body, ...]
    floor: str
    wall: str
    light: tuple[float, float, float]


def training_pairs() -> tuple[Pair, ...]:
    """The 29 (colour, shape) pairs that training may show."""
    return tuple(pair for pair in ALL_PAIRS if pair not in HELD_OUT_PAIRS)


def _light(rng: np.random.Generator) -> tuple[float, float, float]:
    # from the upper left, a little from the front: the three faces of a turned cube get three clear tones
    x, y, z = np.array([-0.5, 0.82, -0.3]) + rng.uniform(-0.05, 0.05, 3)
    norm = float(np.sqrt(x * x + y * y + z * z))
    return float(x) / norm, float(y) / norm, float(z) / norm


def _body(rng: np.random.Generator, pair: Pair, size: str, place: str, x: float, z: float, n: int) -> Body:
    """A body with its small variations: 1 pixel in x, 1/2 in z, 3 % in width, 5 degrees in turn."""
    x, z = x + rng.uniform(-0.06, 0.06), z + rng.uniform(-0.06, 0.06)
    # as wide in the picture wherever it stands: "large" must not depend on the distance
    depth = 1 + z * FORWARD[2] / DISTANCE
    width = WIDTH[n, size] * depth * rng.uniform(0.97, 1.03)
    turn = np.deg2rad(38 + rng.uniform(-5, 5))
    return Body(pair[1], pair[0], size, place, float(x), float(z), float(width), float(turn))


def _positions(rng: np.random.Generator, relation: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """(x, z) of both bodies: side by side, or one well behind the other and shifted so that both are seen."""
    if relation in ("left of", "right of"):
        side = -0.92 if relation == "left of" else 0.92
        return (side, -0.2), (-side, -0.2)
    shift = float(rng.choice([-0.42, 0.42]))
    near = -1.25 if relation == "in front of" else 1.25
    return (shift, near), (-shift, -near)


def sample_scene(rng: np.random.Generator, pairs_allowed: Collection[Pair] = ALL_PAIRS) -> Scene:
    """One body or two (as often), every attribute evenly drawn, (colour, shape) from `pairs_allowed` only."""
    pairs = list(pairs_allowed)

    def draw_pair() -> Pair:
        return pairs[rng.integers(len(pairs))]

    if rng.random() < 0.5:
        place, size = str(rng.choice(PLACES)), str(rng.choice(SIZES))
        x = {"left": -1.0, "center": 0.0, "right": 1.0}[place] * (0.92 if size == "large" else 1.02)
        bodies: tuple[Body, ...] = (_body(rng, draw_pair(), size, place, x, -0.3, 1),)
    else:
        relation = str(rng.choice(list(RELATIONS)))
        first, second = _positions(rng, relation)
        bodies = (
            _body(rng, draw_pair(), str(rng.choice(SIZES)), relation, *first, 2),
            _body(rng, draw_pair(), str(rng.choice(SIZES)), RELATIONS[relation], *second, 2),
        )
    return Scene(bodies, str(rng.choice(FLOORS)), str(rng.choice(WALLS)), _light(rng))


def attributes(scene: Scene) -> tuple[str, ...]:
    """What a full caption says, in one fixed order: "A right of B" and "B left of A" are the same tuple."""
    bodies = scene.bodies
    if bodies[0].place in ("right of", "behind"):
        bodies = bodies[::-1]
    said = [word for body in bodies for word in (body.size, body.colour, body.shape)]
    return (bodies[0].place, *said, scene.floor, scene.wall)


def is_reserved(scene: Scene) -> bool:
    """Whether the scene's attribute tuple is in the tenth that is kept for evaluation."""
    digest = hashlib.blake2b("|".join(attributes(scene)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 10 == 0


def has_held_out_pair(scene: Scene) -> bool:
    """Whether any body has a colour and shape that training never shows together."""
    return any((body.colour, body.shape) in HELD_OUT_PAIRS for body in scene.bodies)


def sample_training_scene(rng: np.random.Generator) -> Scene:
    """A scene that may be trained on: no held-out pair, no reserved attribute tuple."""
    while is_reserved(scene := sample_scene(rng, training_pairs())):
        pass
    return scene


def sample_reserved_scene(rng: np.random.Generator) -> Scene:
    """A scene of the reserved tenth, its (colour, shape) pairs all known from training."""
    while not is_reserved(scene := sample_scene(rng, training_pairs())):
        pass
    return scene


def sample_new_pair_scene(rng: np.random.Generator) -> Scene:
    """A scene with at least one held-out (colour, shape) pair."""
    while not has_held_out_pair(scene := sample_scene(rng)):
        pass
    return scene


def sample_evaluation_scene(rng: np.random.Generator) -> Scene:
    """A scene that training never shows; one in four has a held-out pair."""
    return sample_new_pair_scene(rng) if rng.random() < 0.25 else sample_reserved_scene(rng)


def main(arguments: list[str] | None = None) -> None:
    from batchsd.training.dataset import SPLITS, write_dataset

    parser = argparse.ArgumentParser(prog="batchsd.training.scenes", description="Draw scenes to Parquet.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=24000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    parser.add_argument("--workers", type=int, default=1, help="processes; the data do not depend on it")
    parser.add_argument("--split", choices=sorted(SPLITS), default="train")
    given = parser.parse_args(arguments)
    start = time.monotonic()
    write_dataset(given.out, given.count, given.seed, given.size, given.workers, given.split)
    print(f"{given.count} scenes in {time.monotonic() - start:.0f} s: {given.out}")


if __name__ == "__main__":
    main()
