"""The contract of scores, and what this one means."""

import numpy as np
from mine import light, register_scores

from batchsd.testing import check_score


def test_contract():
    check_score(register_scores()["mine"])


def test_white_is_one_and_black_is_nothing():
    pictures = [np.full((8, 8, 3), value, np.uint8) for value in (255, 0)]
    assert light([], pictures) == [1.0, 0.0]
