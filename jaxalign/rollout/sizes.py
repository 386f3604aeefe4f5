"""Bucketed array sizes for generation, so that few programs are compiled."""

from __future__ import annotations

from jaxalign.ops.platform import platform

_TILE = 128  # columns that kernels and memory layouts of accelerators come in
_NARROWEST = 32  # completions are cut to no less


def power_of_two(n: int) -> int:
    """The least power of two that is at least n.

    >>> [power_of_two(n) for n in (1, 3, 8)]
    [1, 4, 8]
    """
    return 1 << (n - 1).bit_length()


def few_sizes(n: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, ... that is enough: few programs for any sizes.

    >>> [few_sizes(n) for n in (1, 3, 5, 7, 9, 13, 100, 130)]
    [1, 3, 6, 8, 12, 16, 128, 192]
    """
    power = power_of_two(n)
    return power * 3 // 4 if power > 2 and n <= power * 3 // 4 else power


def cache_width(columns: int) -> int:
    """The least number of columns that caches are made of and that is enough; on accelerators multiples of 128.

    >>> [cache_width(n) for n in (1, 17, 24, 25, 192)]
    [16, 24, 24, 32, 192]
    """
    if platform() == "cpu":
        return max(few_sizes(columns), 16)
    return -(-few_sizes(columns) // _TILE) * _TILE


def completion_width(longest: int, most: int) -> int:
    """Columns that completions are given: a quarter of the most, two, three or all.

    Args:
      longest: tokens of the longest.
      most: that it can have.

    >>> [completion_width(n, 128) for n in (1, 33, 64, 97, 128)], completion_width(3, 40)
    ([32, 64, 64, 128, 128], 32)
    """
    quarters = (max(-(-most * i // 32) * 8, _NARROWEST) for i in (1, 2, 3))
    return next((w for w in quarters if longest <= w < most), most)
