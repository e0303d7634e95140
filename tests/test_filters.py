"""The grammar of output.filters: what it takes, what it refuses, and what passes."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchsd.filters import Bound, Named, parse
from batchsd.types import UsageError


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("safety", Named("safety")),
        (" safety ", Named("safety")),
        ("clip_score > 0.25", Bound("clip_score", ">", 0.25)),
        ("clip_score>=.25", Bound("clip_score", ">=", 0.25)),
        ("a<=-1e-3", Bound("a", "<=", -0.001)),
        ("nsfw-level == 0", Bound("nsfw-level", "==", 0.0)),
        ("mean < +1.", Bound("mean", "<", 1.0)),
    ],
)
def test_what_it_takes(text, parsed):
    assert parse(text, "here") == parsed


@pytest.mark.parametrize(
    "text",
    ["", "a b", "a >", "> 1", "1 < a", "a > b", "a => 1", "a != 1", "a > 1 and b > 2", "a > 1e999", "a > nan",
     "a > 0x1", "a()", "__import__('os')", "a > 1; b", "é > 1", "a\n> 1 1", "a > 1_0", "a > ١"],
)  # fmt: skip
def test_what_it_refuses(text):
    with pytest.raises(UsageError, match="^here: .* is not a filter; write a filter's name, or a score and a number"):
        parse(text, "here")


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_infinity=False), st.sampled_from(
    [(">", lambda a, b: a > b), (">=", lambda a, b: a >= b), ("<", lambda a, b: a < b), ("<=", lambda a, b: a <= b),
     ("==", lambda a, b: a == b)]))  # fmt: skip
def test_a_bound_means_what_python_means(number, value, sign):
    word, function = sign
    passes = parse(f"a {word} {number!r}", "").reason(value) is None
    assert passes == (not math.isnan(value) and function(value, number))


def test_reasons_say_the_value():
    bound = parse("clip_score > 0.25", "")
    assert bound.reason(0.21347) == "clip_score is 0.21347, wanted > 0.25"
    assert bound.reason(None) == "clip_score is not a number, wanted > 0.25"
