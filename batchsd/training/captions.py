"""A small grammar that names what a scene shows, so that every asked attribute is known without parsing.

    caption = body [place | relation body] [", <colour> floor"] [", <colour> wall"]
    body    = ("a" | "an") [size] colour shape

Which parts are said (`Parts`) is drawn apart from the scene; `say` puts them into words, `asked` into
attributes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from batchsd.training.scenes import (
    COLOURS,
    FLOORS,
    SHAPES,
    SIZES,
    WALLS,
    Body,
    Scene,
    sample_new_pair_scene,
    sample_reserved_scene,
)

PLACE_WORDS = {
    "left": ("on the left", "to the left"),
    "center": ("in the center", "in the middle"),
    "right": ("on the right", "to the right"),
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "in front of": ("in front of",),
    "behind": ("behind",),
}
"""Place -> its wordings; the first is the one that full captions use."""

WORDS = tuple(
    dict.fromkeys(
        (",", "a", "an", "and", "floor", "wall", *SIZES, *COLOURS, *SHAPES, *FLOORS, *WALLS)
        + tuple(word for wordings in PLACE_WORDS.values() for text in wordings for word in text.split())
    )
)
"""Every word of the grammar, once each, in a fixed order: the tokenizer's vocabulary follows it."""


@dataclass(frozen=True)
class Parts:
    """What a caption says: each body's size or not, its place or not, floor, wall, and in which wording."""

    sizes: tuple[bool, bool] = (True, True)
    place: bool = True
    floor: bool = True
    wall: bool = True
    wording: int = 0


@dataclass(frozen=True)
class AskedBody:
    colour: str
    shape: str
    size: str | None


@dataclass(frozen=True)
class Asked:
    """The attributes that a caption asks for; None where it leaves them open.

    `place` belongs to a body alone; `relation` is the first body's place seen from the second.
    """

    bodies: tuple[AskedBody, ...]
    place: str | None
    relation: str | None
    floor: str | None
    wall: str | None


def draw_parts(rng: np.random.Generator, drop: float = 0.15) -> Parts:
    """Leave each part out with probability `drop`; half of the captions take the second wording."""
    first, second, place, floor, wall = (rng.random(5) >= drop).tolist()
    return Parts((first, second), place, floor, wall, int(rng.integers(2)))


def _name(body: Body, with_size: bool) -> str:
    words = f"{body.size} {body.colour}" if with_size else body.colour
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words} {body.shape}"


def say(scene: Scene, parts: Parts) -> str:
    """The caption that says these parts of the scene."""
    names = [_name(body, size) for body, size in zip(scene.bodies, parts.sizes, strict=False)]
    wordings = PLACE_WORDS[scene.bodies[0].place]
    where = wordings[parts.wording % len(wordings)]
    if len(names) == 2:
        text = f"{names[0]} {where if parts.place else 'and'} {names[1]}"
    else:
        text = f"{names[0]} {where}" if parts.place else names[0]
    floor = f", {scene.floor} floor" if parts.floor else ""
    wall = f", {scene.wall} wall" if parts.wall else ""
    return text + floor + wall


def asked(scene: Scene, parts: Parts = Parts()) -> Asked:  # noqa: B008 (frozen)
    """What `say(scene, parts)` asks for."""
    bodies = tuple(
        AskedBody(body.colour, body.shape, body.size if size else None)
        for body, size in zip(scene.bodies, parts.sizes, strict=False)
    )
    where = scene.bodies[0].place if parts.place else None
    alone = len(bodies) == 1
    return Asked(
        bodies,
        where if alone else None,
        None if alone else where,
        scene.floor if parts.floor else None,
        scene.wall if parts.wall else None,
    )


def caption(scene: Scene, rng: np.random.Generator, drop: float = 0.15) -> str:
    """A caption in one of a few wordings, parts left out at random."""
    return say(scene, draw_parts(rng, drop))


def full_caption(scene: Scene) -> str:
    """The caption that says everything, in the first wording."""
    return say(scene, Parts())


def held_out_captions(n: int = 256, seed: int = 0) -> list[tuple[str, Scene]]:
    """n different full captions that training never shows, with their scenes.

    The first n // 4 have a held-out (colour, shape) pair (`scenes.has_held_out_pair` tells); the rest are of
    the reserved tenth of attribute tuples, with pairs that training knows.
    """
    rng = np.random.default_rng([seed, 0x5CE7E])  # apart from the data sets' generators
    found: dict[str, Scene] = {}
    while len(found) < n:
        scene = sample_new_pair_scene(rng) if len(found) < n // 4 else sample_reserved_scene(rng)
        found.setdefault(full_caption(scene), scene)
    return list(found.items())
