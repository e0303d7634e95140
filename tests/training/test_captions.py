"""What captions say against a parser of the grammar that is written here, apart from the code under test."""

import re

import numpy as np

from batchsd.training.captions import (
    WORDS,
    Asked,
    AskedBody,
    Parts,
    asked,
    caption,
    draw_parts,
    full_caption,
    held_out_captions,
    say,
)
from batchsd.training.scenes import (
    Body,
    Scene,
    has_held_out_pair,
    is_reserved,
    sample_scene,
    sample_training_scene,
)

BODY = r"an? (?:(large|small) )?(\w+) (sphere|cube|cylinder|cone)"
RELATION = r"((?:to the )?left of|(?:to the )?right of|in front of|behind|and)"
PLACE = r"(?: (?:on the|to the|in the) (left|right|center|middle))?"
REST = r"(?:, (\w+) floor)?(?:, (\w+) wall)?"


def parse(text):
    if match := re.fullmatch(f"{BODY} {RELATION} {BODY}{REST}", text):
        size, colour, shape, relation, size2, colour2, shape2, floor, wall = match.groups()
        relation = None if relation == "and" else relation.removeprefix("to the ")
        both = (AskedBody(colour, shape, size), AskedBody(colour2, shape2, size2))
        return Asked(both, None, relation, floor, wall)
    match = re.fullmatch(f"{BODY}{PLACE}{REST}", text)
    assert match, text
    size, colour, shape, place, floor, wall = match.groups()
    place = "center" if place == "middle" else place
    return Asked((AskedBody(colour, shape, size),), place, None, floor, wall)


def test_the_text_says_exactly_what_is_asked():
    rng = np.random.default_rng(0)
    for _ in range(1500):
        scene, parts = sample_scene(rng), draw_parts(rng, drop=0.4)
        assert parse(say(scene, parts)) == asked(scene, parts), say(scene, parts)


def test_examples():
    def body(colour, shape, size, place):
        return Body(shape, colour, size, place, 0, 0, 1, 0)

    both = (body("red", "sphere", "large", "left of"), body("blue", "cube", "small", "right of"))
    scene = Scene(both, "white", "gray", (0, 1, 0))
    text = "a large red sphere to the left of a small blue cube, white floor, gray wall"
    assert full_caption(scene) == text
    assert say(scene, Parts((False, True), place=False, floor=False)) == (
        "a red sphere and a small blue cube, gray wall"
    )
    alone = Scene((body("orange", "cone", "small", "center"),), "black", "beige", (0, 1, 0))
    text = "an orange cone in the middle, black floor"
    assert say(alone, Parts((False, True), wording=1, wall=False)) == text


def test_parts_are_dropped_as_often_as_asked():
    rng = np.random.default_rng(1)
    drawn = [draw_parts(rng, 0.15) for _ in range(4000)]
    for kept in ("place", "floor", "wall"):
        assert 0.83 < np.mean([getattr(parts, kept) for parts in drawn]) < 0.87
    scene = sample_scene(rng)
    assert caption(scene, np.random.default_rng(2), drop=0) in {say(scene, Parts(wording=i)) for i in (0, 1)}


def test_words_are_all_that_the_grammar_uses():
    rng = np.random.default_rng(3)
    texts = [caption(sample_scene(rng), rng, drop=0.3) for _ in range(3000)]
    assert {word for text in texts for word in re.findall(r"\w+|,", text)} == set(WORDS)
    assert len(set(WORDS)) == len(WORDS)


def test_held_out_captions_are_never_trained_on():
    found = held_out_captions(256)
    texts = [text for text, _ in found]
    assert len(set(texts)) == 256 and found == held_out_captions(256)
    assert sum(has_held_out_pair(scene) for _, scene in found) == 64
    assert all(has_held_out_pair(scene) or is_reserved(scene) for _, scene in found)
    assert all(text == full_caption(scene) for text, scene in found)
    rng = np.random.default_rng(4)
    trained = {say(sample_training_scene(rng), Parts(wording=i % 2)) for i in range(2500)}
    assert not trained & set(texts)
    # in the second wording too
    assert not trained & {say(scene, Parts(wording=1)) for _, scene in found}
