"""Groups of hashes, beside all pairs compared one by one."""

from __future__ import annotations

import numpy as np
import pytest

from batchsd.alike import groups


def all_pairs(codes: list[int]) -> list[list[int]]:
    """The definition: connected components of "at most 3 bits differ", largest first."""
    left, found = set(range(len(codes))), []
    while left:
        group = [left.pop()]
        for one in group:
            near = [other for other in left if (codes[one] ^ codes[other]).bit_count() <= 3]
            group += near
            left -= set(near)
        found.append(sorted(group))
    return sorted((group for group in found if len(group) > 1), key=lambda group: (-len(group), group))


def flipped(code: int, bits: list[int]) -> int:
    return code ^ sum(1 << bit for bit in bits)


@pytest.mark.parametrize("spread", [2, 5, 9])
def test_the_groups_are_those_of_all_pairs(spread: int) -> None:
    random = np.random.default_rng(spread)
    centres = [int(code) for code in random.integers(0, 2**64, 30, dtype=np.uint64)]
    codes = [
        flipped(centres[random.integers(30)], random.choice(64, random.integers(spread), replace=False).tolist())
        for _ in range(400)
    ]
    found = groups([f"{code:016x}" for code in codes])
    assert found == all_pairs(codes) and len(found) > 20


def test_three_bits_wherever_they_are() -> None:
    random = np.random.default_rng(0)
    code = 0x0123456789ABCDEF
    for _ in range(300):
        bits = random.choice(64, 4, replace=False).tolist()
        assert groups([f"{code:016x}", f"{flipped(code, bits[:3]):016x}"]) == [[0, 1]]
        assert groups([f"{code:016x}", f"{flipped(code, bits):016x}"]) == []


def test_equal_ones_and_chains() -> None:
    chain = ["0" * 16, f"{0b111:016x}", f"{0b111111:016x}"]  # the ends are 6 bits apart
    assert groups([*chain, "f" * 16, "f" * 16]) == [[0, 1, 2], [3, 4]]
    assert groups([]) == [] and groups(["0" * 16]) == []


def test_many_equal_halves_are_no_trouble() -> None:
    """Flat skies: half of the bits are the same in all of 20,000 pictures."""
    random = np.random.default_rng(1)
    codes = random.integers(0, 2**32, 20_000, dtype=np.uint64).tolist()
    planted = [flipped(code, [1, 20, 40]) for code in codes[:50]]
    found = groups([f"{code:016x}" for code in [*codes, *planted]])
    pairs = {(group[0], member) for group in found for member in group[1:]}
    assert {(i, 20_000 + i) for i in range(50)} <= pairs
