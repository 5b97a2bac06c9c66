"""Level sets: the values a quantized number may take, as integers over one denominator.

Shape suffixes: ``_L`` one entry a level, ``_T`` one entry a decision threshold, ``_C`` one entry a look-up cell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise, product
from math import gcd

import torch

MAX_BITS = 8
_MAX_TABLE_DENOMINATOR = 1 << 14  # PoT above 4 bits has larger ones; its table would be mostly one value


@dataclass(frozen=True)
class LevelSet:
    """A set of quantization levels: ``numerators / denominator``, on [0, 1] or signed.

    Equation: L = {n / d : n in numerators}, n integer, n_0 < n_1 < … < n_max = d. With n_0 = 0 the levels are those of
    an activation, or of a weight's magnitude; with n_0 < 0 (``is_signed``) those of a weight, and equally spaced.
    From it follow the levels, the decision thresholds t_i = (n_i + n_{i+1}) / 2d and, since every threshold is an
    integer over 2d, an exact look-up: floor(u · 2d) names a cell on which the nearest level is constant.

    Args:
        numerators: rising integers, the first 0 or negative, the last ``denominator``; dimensionless.
        denominator: positive integer d.

    ``levels`` are the n / d as correctly rounded Python floats, shape (L,); ``thresholds`` the t_i, shape (L − 1,);
    ``float_numerators`` and ``steps`` the numerators and the denominator as floats; ``spacing`` the distance of
    neighbouring numerators, 0 where it is not always the same.

    Raises:
        ValueError: numerators that do not rise strictly from 0 to the denominator, or signed ones at unequal distances.

    Paper: APoT, "Additive Powers-of-Two Quantization" (the set Q^a(1, b)); written as integers here so that packing,
    integer inference and the shift-and-add cost of a level are exact.

    >>> LevelSet((0, 1, 2, 3, 4, 6, 8, 10), 10).bits
    3
    """

    numerators: tuple[int, ...]
    denominator: int
    # derived here and not when first asked for: torch.compile traces through code that reads them; and as floats, since
    # of integers it makes arguments of the kernel
    levels: tuple[float, ...] = field(init=False, repr=False, compare=False)
    thresholds: tuple[float, ...] = field(init=False, repr=False, compare=False)
    float_numerators: tuple[float, ...] = field(init=False, repr=False, compare=False)
    steps: float = field(init=False, repr=False, compare=False)
    spacing: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        n = self.numerators
        if len(n) < 2 or n[0] > 0 or n[-1] != self.denominator or any(a >= b for a, b in pairwise(n)):
            raise ValueError(
                f"numerators {n} over {self.denominator}: they must rise strictly from 0 to the denominator"
            )
        distances = {b - a for a, b in pairwise(n)}
        if n[0] < 0 and len(distances) > 1:
            raise ValueError(f"numerators {n}: signed ones must be equally spaced")
        object.__setattr__(self, "spacing", distances.pop() if len(distances) == 1 else 0)
        object.__setattr__(self, "levels", tuple(a / self.denominator for a in n))
        object.__setattr__(self, "thresholds", tuple((a + b) / (2 * self.denominator) for a, b in pairwise(n)))
        object.__setattr__(self, "float_numerators", tuple(map(float, n)))
        object.__setattr__(self, "steps", float(self.denominator))

    def __len__(self) -> int:
        return len(self.numerators)

    @property
    def bits(self) -> int:
        """Bits a code of this set takes: ceil(log2(number of levels))."""
        return (len(self) - 1).bit_length()

    @property
    def is_signed(self) -> bool:
        """Whether the set holds its negative levels itself; otherwise a weight's levels are ± those of the set."""
        return self.numerators[0] < 0

    @property
    def signed_numerators(self) -> tuple[int, ...]:
        """The numerators of a weight, from the most negative up: n, or ± n where the set is one of magnitudes."""
        n = self.numerators
        return n if self.is_signed else (*(-a for a in reversed(n[1:])), *n)

    @property
    def positive_levels(self) -> int:
        """How many levels lie above 0: LSQ's Q_P."""
        return sum(n > 0 for n in self.numerators)

    @property
    def is_uniform(self) -> bool:
        """Whether the levels are equally spaced, so that rounding projects onto them."""
        return self.spacing == 1

    @property
    def is_pot(self) -> bool:
        """Whether each level above 0 is twice the one before: rounding to one significant bit projects onto them."""
        return all(b == 2 * a for a, b in pairwise(self.numerators[1:]))

    @property
    def has_table(self) -> bool:
        """Whether the denominator is small enough for the exact look-up table."""
        return self.denominator <= _MAX_TABLE_DENOMINATOR

    @property
    def fits_byte(self) -> bool:
        """Whether the numerators fit into a byte."""
        return self.denominator <= 255

    @cached_property
    def cell_codes(self) -> tuple[int, ...]:
        """Code (index of the nearest level) of each cell [c / 2d, (c + 1) / 2d), c = 0 … 2d; a tie goes up."""
        cuts = [a + b for a, b in pairwise(self.numerators)]  # thresholds in units of 1 / 2d
        codes, code = [], 0
        for cell in range(2 * self.denominator + 1):
            while code < len(cuts) and cell >= cuts[code]:
                code += 1
            codes.append(code)
        return tuple(codes)

    def tensor(self, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> torch.Tensor:
        """The levels as a tensor ``levels_L``."""
        return torch.tensor(self.levels, dtype=dtype, device=device)

    def signed_tensor(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The levels of a weight, ``signed_numerators`` / d, as a tensor."""
        return torch.tensor([n / self.denominator for n in self.signed_numerators], dtype=dtype)


def uniform_levels(bits: int) -> LevelSet:
    """Uniform levels k / (2^B − 1), k = 0 … 2^B − 1.

    Args:
        bits: B, 1 to 8.

    Raises:
        ValueError: bits outside 1 to 8.

    >>> uniform_levels(2).numerators
    (0, 1, 2, 3)
    """
    _check_bits(bits)
    return LevelSet(tuple(range(2**bits)), 2**bits - 1)


def pot_levels(bits: int) -> LevelSet:
    """Powers-of-two levels {0} ∪ {2^−i : i = 0 … 2^B − 2}.

    Args:
        bits: B, 1 to 8. Above 7 bits the smallest levels lie under float32's range and become 0 there.

    Raises:
        ValueError: bits outside 1 to 8.

    Paper: APoT, "Preliminaries" (the set Q^p(1, b)).

    >>> pot_levels(2).levels
    (0.0, 0.25, 0.5, 1.0)
    """
    _check_bits(bits)
    top = 2**bits - 2
    return LevelSet((0, *(1 << i for i in range(top + 1))), 1 << top)


def apot_levels(bits: int) -> LevelSet:
    """Additive powers-of-two levels: every sum of one member of each base set, over the largest sum.

    Args:
        bits: B, 1 to 8.

    Raises:
        ValueError: bits outside 1 to 8.

    Paper: APoT, "Additive Powers-of-Two Quantization" (n terms of k = 2 bits; 2n + 1 bits add one term). The published
    code has these sets at 2 to 6 bits (equal to these) and gives NaN at 1, 7 and 8.

    >>> apot_levels(3)
    LevelSet(numerators=(0, 1, 2, 3, 4, 6, 8, 10), denominator=10)
    """
    sums = sorted({sum(members) for members in product(*apot_base_sets(bits))})
    return LevelSet(tuple(sums), sums[-1])


def apot_base_sets(bits: int) -> list[tuple[int, ...]]:
    """The base sets of APoT's levels, as integers over the denominator: rising, 0 and powers of two.

    With n = B // 2 base sets of two bits, the i-th (i = 0 … n − 1) is {0, 2^−i, 2^−(i+n), 2^−(i+2n)} for even B. For
    odd B a one-bit set {0, 2^−2n} is added and the last member becomes 2^−(i+2n+1), so that all exponents differ and
    all 2^B sums are distinct. B = 1 is {0, 1}.

    Args:
        bits: B, 1 to 8.

    Raises:
        ValueError: bits outside 1 to 8.

    Paper: APoT, "Additive Powers-of-Two Quantization" (the sets whose members are added).

    >>> apot_base_sets(3)
    [(0, 1, 4, 8), (0, 2)]
    """
    _check_bits(bits)
    n, odd = divmod(bits, 2)
    last = 2 * n + odd  # offset of the smallest member of a two-bit set
    top = max(n - 1 + last, 2 * n)  # largest exponent: the common denominator before reduction is 2^top
    base_sets = [(0, *(1 << (top - i - offset) for offset in (last, n, 0))) for i in range(n)]
    if odd:
        base_sets.append((0, 1 << (top - 2 * n)))
    divisor = gcd(*(member for base_set in base_sets for member in base_set))
    return [tuple(member // divisor for member in base_set) for base_set in base_sets]


def twos_complement_levels(bits: int) -> LevelSet:
    """The signed integers of B bits, −2^(B−1) … 2^(B−1) − 1, over the largest.

    Args:
        bits: B, 2 to 8.

    Raises:
        ValueError: bits outside 2 to 8.

    Paper: LSQ, "Learned Step Size Quantization" (Q_N = 2^(B−1), Q_P = 2^(B−1) − 1 for weights).

    >>> twos_complement_levels(2)
    LevelSet(numerators=(-2, -1, 0, 1), denominator=1)
    """
    _check_bits(bits, 2)
    half = 2 ** (bits - 1)
    return LevelSet(tuple(range(-half, half)), half - 1)


def odd_levels(bits: int) -> LevelSet:
    """The 2^B levels (2 k − n) / n, n = 2^B − 1, k = 0 … n: odd numerators, and no zero.

    Args:
        bits: B, 1 to 8.

    Raises:
        ValueError: bits outside 1 to 8.

    Paper: DoReFa-Net, "Low Bitwidth Training" of weights: 2 quantize_B(·) − 1.

    >>> odd_levels(2).numerators
    (-3, -1, 1, 3)
    """
    _check_bits(bits)
    top = 2**bits - 1
    return LevelSet(tuple(range(-top, top + 1, 2)), top)


LEVEL_FAMILIES: dict[str, Callable[[int], LevelSet]] = {
    "uniform": uniform_levels,
    "pot": pot_levels,
    "apot": apot_levels,
}
SIGNED_FAMILIES: dict[str, Callable[[int], LevelSet]] = {
    "twos-complement": twos_complement_levels,
    "odd": odd_levels,
}
"""Of weights alone; their B bits are all of the weight's."""


@lru_cache(maxsize=None, typed=True)  # typed: True is not 1
def level_set(family: str, bits: int) -> LevelSet:
    """The level set of a family: ``uniform``, ``pot`` or ``apot`` at B = ``bits`` magnitude bits, or a signed one.

    Raises:
        ValueError: an unknown family, or bits outside 1 to 8.
    """
    families = LEVEL_FAMILIES | SIGNED_FAMILIES
    if family not in families:
        raise ValueError(f"unknown level family {family!r}: choose one of {', '.join(families)}")
    return families[family](bits)


def build_power_value(B: int = 2, additive: bool = True) -> torch.Tensor:
    """The published level builder: APoT (``additive``) or PoT levels on [0, 1] as a float32 tensor of shape (2^B,).

    Args:
        B: bits, 1 to 8.
        additive: True for additive powers of two, False for plain ones.

    Raises:
        ValueError: B outside 1 to 8.

    Departs from the published code in that the levels come sorted, and exist at 1, 7 and 8 bits.
    """
    return level_set("apot" if additive else "pot", B).tensor()


def _check_bits(bits: int, fewest: int = 1) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not fewest <= bits <= MAX_BITS:
        raise ValueError(f"{bits!r} bits: a level set takes an integer from {fewest} to {MAX_BITS}")
