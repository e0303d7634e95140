"""The contract of filters, and what this one rejects."""

import numpy as np
from mine import grey, register_filters

from batchsd.testing import check_filter


def test_contract():
    check_filter(register_filters()["mine"])


def test_grey_is_rejected_and_red_is_not():
    pictures = [np.full((8, 8, 3), colour, np.uint8) for colour in ((90, 90, 91), (200, 20, 20))]
    assert grey([], pictures) == ["grey: its channels differ by 1.0", None]
