"""The score on pictures whose content is known, and a network small in steps that must begin to see."""

from dataclasses import replace

import numpy as np
import pytest

from batchsd.training.captions import Asked, AskedBody, Parts, asked, held_out_captions
from batchsd.training.judge import Judge, Judged, evaluate, score, train_judge, truth
from batchsd.training.scenes import has_held_out_pair, render, sample_scene


def body(words):
    colour, shape, size = words.split()
    return AskedBody(colour, shape, size)


RED, BLUE = body("red cube large"), body("blue cone small")


def one(place="left", what=RED):
    return Asked((what,), place, None, "white", "gray")


def two(relation, first=RED, second=BLUE):
    return Asked((first, second), None, relation, None, None)


def seen(layout, *bodies):
    return Judged(bodies, layout, "white", "gray")


def test_the_truth_scores_one_on_every_caption():
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(400)]
    rates = score([truth(scene) for scene in scenes], [asked(scene) for scene in scenes])
    assert set(rates) == {"colour", "shape", "size", "place", "relation", "count", "floor", "wall"}
    assert set(rates.values()) == {1.0}


@pytest.mark.parametrize(
    ("judged", "wanted", "expected"),
    [
        (seen("left", RED), one(), {"colour": 1, "shape": 1, "size": 1, "place": 1, "count": 1, "floor": 1}),
        (seen("right", RED), one(), {"place": 0, "colour": 1}),
        (seen("left", body("red cone small")), one(), {"colour": 1, "shape": 0, "size": 0}),
        (seen("left", body("pink cube large")), one(), {"colour": 0, "shape": 1, "size": 1}),
        # an extra body does not hide the asked one, but is counted
        (seen("side by side", BLUE, RED), one(), {"colour": 1, "shape": 1, "count": 0, "place": 0}),
        # a missing body misses every attribute
        (seen("left", RED), two("left of"), {"colour": 0, "shape": 0, "size": 0, "count": 0, "relation": 0}),
        # shapes that changed owners are wrong, though both are there
        (
            seen("side by side", body("red cone large"), body("blue cube small")),
            two("left of"),
            {"colour": 1, "shape": 0, "size": 1},
        ),
        # one drawn body cannot answer two asked ones
        (seen("side by side", RED, BLUE), two("left of", RED, RED), {"colour": 0}),
        (seen("side by side", RED, BLUE), two("left of"), {"relation": 1, "shape": 1, "size": 1}),
        (seen("side by side", RED, BLUE), two("right of"), {"relation": 0, "colour": 1}),
        (seen("side by side", RED, BLUE), two("in front of"), {"relation": 0}),
        (seen("left in front", RED, BLUE), two("in front of"), {"relation": 1}),
        (seen("left in front", RED, BLUE), two("behind"), {"relation": 0}),
        (seen("right in front", RED, BLUE), two("behind"), {"relation": 1}),
        (seen("left in front", RED, BLUE), two("left of"), {"relation": 0}),
        # alike bodies may stand either way; others that cannot be told apart may not
        (seen("side by side", RED, RED), two("right of", RED, RED), {"relation": 1}),
        (seen("side by side", RED, RED), two("left of"), {"relation": 0}),
    ],
)
def test_score_by_hand(judged, wanted, expected):
    rates = score([judged], [wanted])
    assert {name: rates[name] for name in expected} == expected


def test_what_is_not_asked_is_not_scored():
    scene = sample_scene(np.random.default_rng(1))
    silent = asked(scene, Parts((False, False), place=False, floor=False, wall=False))
    assert set(score([truth(scene)], [silent])) == {"colour", "shape", "count"}


class Knowing(Judge):
    """Knows each picture by its number, which the drawing left in its first pixel."""

    def __init__(self, answers):
        super().__init__()
        self.answers = answers

    def read(self, images):
        return [self.answers[int(image[0, 0, 0])] for image in images]


def test_evaluate_groups_the_held_out_captions():
    found = dict(held_out_captions(64))
    order = list(found)
    # whatever has a held-out pair is drawn in a wrong colour
    answers = []
    for text in order:
        right = truth(found[text])
        colours = [replace(each, colour="none") for each in right.bodies]
        answers.append(replace(right, bodies=tuple(colours)) if has_held_out_pair(found[text]) else right)

    def draw(texts):
        images = np.zeros((len(texts), 64, 64, 3), np.uint8)
        images[:, 0, 0, 0] = [order.index(text) for text in texts]
        return images

    rates = evaluate(draw, Knowing(answers), n=64)
    assert rates["known pairs"]["colour"] == rates["known pairs"]["relation"] == 1
    assert rates["held-out pairs"]["colour"] == 0
    assert rates["all"]["colour"] == 0.75 and rates["all"]["place"] == 1
    assert rates["shuffled"]["colour"] < 0.3 and rates["shuffled"]["floor"] < 0.6
    assert "relation" not in rates["one body"] and "place" not in rates["two bodies"]


def test_a_short_training_begins_to_see(tmp_path):
    judge = train_judge(steps=60, seed=0, scenes=200, batch_size=16)
    rng = np.random.default_rng(9)
    scenes = [sample_scene(rng) for _ in range(100)]
    images = np.stack([render(scene).image for scene in scenes])
    judged = judge.read(images)
    rates = score(judged, [asked(scene) for scene in scenes])
    # by chance: a quarter, a quarter, a third
    assert rates["wall"] > 0.8 and rates["floor"] > 0.8 and rates["place"] > 0.6, rates
    judge.save(tmp_path / "judge.safetensors")
    assert Judge.load(tmp_path / "judge.safetensors").read(images) == judged
