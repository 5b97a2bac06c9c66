"""Integer thresholds of a quantizer behind a rising or falling function: found by asking it, not by solving for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Array = np.ndarray


def find_thresholds(
    function: Callable[[Array], Array], low: int, high: int, levels: Sequence[int]
) -> tuple[Array, Array, tuple[int, ...]]:
    """Where a function of an integer passes each of its levels, by binary search in every channel at once.

    Equation: function(x) = used[number of t in a row with t ≤ x], or with t ≤ −x in a channel that falls, for every
    integer x in [low, high].

    Args:
        function: integers (C, T) → integers (C, T), each row either rising or falling, never both.
        low, high: where it is asked; a channel that passes a level nowhere there has a threshold at an end.
        levels: all values it may take, rising.

    Returns:
        thresholds (C, T), rising in each row; whether each channel falls (C,); the levels used, T + 1 of them.
    """
    ends = function(np.array([[low, high]]))
    falls_C = ends[:, 0] > ends[:, 1]
    used = [level for level in levels if ends.min() <= level <= ends.max()]
    assert ends.min() == used[0]
    assert ends.max() == used[-1]
    wanted = np.array(used[1:], np.int64)[None]
    sign = np.where(falls_C, -1, 1)[:, None]
    first = np.where(falls_C, -high, low)[:, None] + np.zeros_like(wanted)  # the smallest that may be the threshold
    last = np.where(falls_C, -low, high)[:, None] + 1 + np.zeros_like(wanted)  # the largest
    while wanted.size and (first < last).any():
        middle = first + last >> 1
        passed = function(sign * middle) >= wanted
        first, last = np.where(passed | (first == last), first, middle + 1), np.where(passed, middle, last)
    return first, falls_C, tuple(used)
