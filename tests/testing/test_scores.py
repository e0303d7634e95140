"""The contracts of scores and filters: good ones pass, and each broken promise is named."""

import numpy as np
import pytest
import torch

from batchsd import Filter, Score
from batchsd.testing import check_filter, check_score


def mean(requests, pictures):
    return [float(picture.mean()) for picture in pictures]


def dark(requests, pictures):
    return ["dark" if picture.mean() < 100 else None for picture in pictures]


def test_good_ones_pass():
    check_score(Score.of(mean))
    check_score(Score.of(lambda requests, pictures: [None] * len(pictures)))
    check_score(Score.of(lambda requests, pictures: torch.tensor(np.stack(pictures)).double().mean((1, 2, 3))))
    check_filter(Filter.of(dark))
    check_score(Score(lambda settings, device: mean, files=("path",), options={"n": 1}), {"path": "/x"})


def spoils(requests, pictures):
    pictures[0][:] = 0
    return mean(requests, pictures)


BROKEN = {
    "other pictures": (lambda r, p: [float(np.mean(p))] * len(p), "alone and .* among others"),
    "count": (lambda r, p: [1.0], "1 answers for 3 pictures"),
    "text": (lambda r, p: ["a"] * len(p), "'a' is not a number or None"),
    "truth": (lambda r, p: [True] * len(p), "True is not a number or None"),
    "nan": (lambda r, p: [float("nan")] * len(p), "nan is not finite"),
    "dice": (lambda r, p: [torch.rand(()).item() * 0 for _ in p], "drew from a global random generator"),
    "changes": (spoils, "it changed a picture"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_each_broken_promise_is_named(case):
    function, words = BROKEN[case]
    with pytest.raises(AssertionError, match=words):
        check_score(Score.of(function))


def test_what_is_no_score_or_lacks_its_settings():
    with pytest.raises(AssertionError, match="is not a batchsd.Score; a function is wrapped"):
        check_score(mean)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match=r"\['path'\] are in `files`"):
        check_score(Score(lambda settings, device: mean, files=("path",)))
    with pytest.raises(AssertionError, match=r"\['n'\] are neither in `files` nor in `options`"):
        check_score(Score.of(mean), {"n": 1})
    with pytest.raises(AssertionError, match="True is not a reason"):
        check_filter(Filter.of(lambda requests, pictures: [True] * len(pictures)))
