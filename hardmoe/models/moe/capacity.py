"""How many items of a group an expert takes at most."""

import math
from fractions import Fraction

MULTIPLE = 4
"""Slots are rounded up to so many, as Riquelme et al.'s code does (arXiv 2106.05974)."""


def expert_capacity(group_size: int, k: int, num_experts: int, factor: float) -> int:
    """Slots of every expert: ceil(S * k * factor / E), rounded up to a multiple of 4, but never more than there are items.

    Libraries disagree here (some forget k, some round down); this is the rule of V-MoE's code. The product is exact, as 1.05 is
    no binary fraction and a slot more or less would depend on its rounding.

    Args:
        group_size: S, items that are routed together.
        k: experts of each item.
        num_experts: E.
        factor: 1 where an even routing fills all slots exactly; 0 for no limit.
    """
    if factor == 0:
        return group_size
    wanted = math.ceil(Fraction(repr(factor)) * group_size * k / num_experts)
    return min(group_size, -(-wanted // MULTIPLE) * MULTIPLE)
