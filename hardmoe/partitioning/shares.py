"""How different the shares of two sets of examples over the same parts are, and how different chance alone would make them.

Total variation says it in examples: the least share of one set that would have to be in other parts to match the other set.
It is never zero for two finite sets, so it is held against its exact expectation if both had been dealt out of one pool.
With c_k examples of the pool in part k, n of its N in the first set and m in the second, their number X_k there is
hypergeometric and |X_k / n - (c_k - X_k) / m| = (1/n + 1/m) |X_k - n c_k / N|. For the mean absolute deviation there is a
closed form like De Moivre's for the binomial: with g(x) = x (N - c - n + x) / N * P(X = x),

    g(x) - g(x + 1) = (x - n c / N) P(X = x),   so that   E |X - n c / N| = 2 g(floor(n c / N) + 1).

Rejected: the binomial's alone, which takes the training shares as known (too small by a factor of 1.4 for two sets of one
size), a simulation (the same number with noise), and the p-value alone, which for many examples says "different" of anything.
"""

import math
from collections.abc import Sequence

_LEAST_EXPECTED = 5
"""Cells of a chi-square test that expect fewer examples are put together: the test's usual condition."""


def total_variation(first: Sequence[int], second: Sequence[int]) -> float:
    """Half the sum of the differences of the shares, in [0, 1]; both sets must hold something."""
    n, m = sum(first), sum(second)
    return sum(abs(a * m - b * n) for a, b in zip(first, second, strict=True)) / (2 * n * m)


def chance_total_variation(first: Sequence[int], second: Sequence[int]) -> float:
    """Its expectation if the examples of both sets were dealt anew to two sets of these sizes; exact, see the module."""
    n, m = sum(first), sum(second)
    deviations = math.fsum(_half_deviation(n + m, a + b, n) for a, b in zip(first, second, strict=True))
    return (1 / n + 1 / m) * deviations


def chi_square_p(first: Sequence[int], second: Sequence[int]) -> float | None:
    """The p-value of Pearson's test of homogeneity; None where fewer than two cells are large enough for it."""
    n, m = sum(first), sum(second)
    cells, small = [], [0, 0]
    for a, b in zip(first, second, strict=True):
        if _expects_enough(a + b, n, m):
            cells.append([a, b])
        else:
            small = [small[0] + a, small[1] + b]
    if sum(small) and cells:
        if _expects_enough(sum(small), n, m):
            cells.append(small)
        else:
            least = min(cells, key=sum)
            least[:] = [least[0] + small[0], least[1] + small[1]]
    if len(cells) < 2:
        return None
    statistic = math.fsum((a * m - b * n) ** 2 / (n * m * (a + b)) for a, b in cells)
    return chi_square_tail(statistic, len(cells) - 1)


def chi_square_tail(statistic: float, degrees: int) -> float:
    """The probability that a chi-square variable exceeds a value: the incomplete gamma function's finite sum.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.4.4 and 26.4.5.
    """
    if statistic <= 0:
        return 1.0
    half, is_odd = statistic / 2, degrees % 2
    powers = [index + is_odd / 2 for index in range(degrees // 2)]
    tail = math.fsum(math.exp(power * math.log(half) - half - math.lgamma(power + 1)) for power in powers)
    return min(1.0, tail + (math.erfc(math.sqrt(half)) if is_odd else 0.0))


def _expects_enough(count: int, n: int, m: int) -> bool:
    return count * min(n, m) >= _LEAST_EXPECTED * (n + m)


def _half_deviation(pool: int, inside: int, drawn: int) -> float:
    """Half of E |X - E X|, where X of `drawn` examples are among the `inside` ones of a pool."""
    above = drawn * inside // pool + 1
    outside, rest = pool - inside, drawn - above
    if above > inside or rest < 0 or rest > outside:
        return 0.0
    log_probability = _log_choose(inside, above) + _log_choose(outside, rest) - _log_choose(pool, drawn)
    return above * (outside - rest) / pool * math.exp(log_probability)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
