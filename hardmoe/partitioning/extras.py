"""Which training examples are trained on by further experts, beside the one of their own part.

Two kinds. `overlap`: those nearly as close to a second centroid as to their own part's, so that nobody sees only one side of a
border (DiPaCo, arXiv 2403.10616, trains on overlapping shards against too fine a partition); where a balanced or given part is
not the nearest one, the nearest is the second, so these always overlap. `out_of_part_fraction`: a few of all others, as MoDE
(arXiv 2404.16030) mixes in 2 %. Both are functions of the example alone, given the parts and their sizes, so they depend on no
sharding. An extra copy is a copy: the example's own part, in which it is evaluated and embedded, stays the only primary one.

Of expert e's examples the share f is to be drawn from others. It has m_e: its part and what overlaps with it. Each of the
N - m_e others is therefore drawn with the chance m_e f / (1 - f) / (N - m_e), by a hash of (seed, e, example id): the number
is right up to chance, and the same whoever computes it. Rejected: drawing the exact number, for which all ids would have to be
sorted in one place, and letting the drawn ones displace an expert's own examples, which would then be nobody's.

Shape letters: N examples of a shard, P pairs of an example and an expert, K experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hardmoe.errors import DataError
from hardmoe.hashing import hash_fractions
from hardmoe.neighbours.assignment import Assignment


@dataclass(frozen=True)
class ExtraCopies:
    """Pairs of a row and an expert that trains on it beside its own part's, by row, then by expert.

    Attributes:
        rows_P: int64 [P].
        experts_P: int32 [P].
        overlaps_P: whether by overlap, bool [P]; else it was drawn.
    """

    rows_P: NDArray[np.int64]
    experts_P: NDArray[np.int32]
    overlaps_P: NDArray[np.bool_]


def overlaps(assignment: Assignment, second_squared_distance_N: NDArray[np.float64], ratio: float | None) -> NDArray[np.bool_]:
    """Which rows train in the second nearest part as well, bool [N].

    Args:
        assignment: of the rows.
        second_squared_distance_N: to the second nearest centroid, float64 [N]; NaN where there is none.
        ratio: `partition.overlap`; None for no row. Compared in squares: d2^2 <= ratio^2 d1^2, in float64.
    """
    if ratio is None:
        return np.zeros(len(assignment.primary_N), bool)
    return second_squared_distance_N <= ratio * ratio * assignment.squared_distance_N


def chances_to_be_drawn(fraction: float, members_K: Sequence[int], num_examples: int) -> list[float]:
    """For each expert, the chance of every training example that is not its own, float [K].

    Args:
        fraction: `partition.out_of_part_fraction`.
        members_K: training examples that each expert has without any drawn ones.
        num_examples: all training examples.

    Raises:
        DataError: a part is so large that there are not enough others.
    """
    chances = []
    for expert, members in enumerate(members_K):
        wanted, others = members * fraction / (1.0 - fraction), num_examples - members
        if wanted > others:
            raise DataError(
                f"expert {expert} has {members} of the {num_examples} training examples, so partition.out_of_part_fraction "
                f"{fraction:g} asks for {round(wanted)} of the other {others}; "
                f"lower it to {_floor_two_digits(others / num_examples):g} or less, or make the parts more even"
            )
        chances.append(wanted / others if members else 0.0)
    return chances


def extra_copies(
    ids_N16: NDArray[np.uint8], assignment: Assignment, overlaps_N: NDArray[np.bool_], chances: Sequence[float], seed: int
) -> ExtraCopies:
    """Who else trains on the rows of a shard.

    Args:
        ids_N16: example ids, uint8 [N, 16].
        assignment: says the own part, and the second nearest.
        overlaps_N: as `overlaps` returns it.
        chances: as `chances_to_be_drawn` returns them; empty if none are to be drawn.
        seed: the recipe's.
    """
    border = np.flatnonzero(overlaps_N)
    rows, experts = [border], [assignment.second_N[border]]
    for expert, chance in enumerate(chances):
        own_N = (assignment.primary_N == expert) | (overlaps_N & (assignment.second_N == expert))
        drawn = np.flatnonzero((hash_fractions(ids_N16, seed, "out-of-part", expert) < chance) & ~own_N)
        rows.append(drawn)
        experts.append(np.full(len(drawn), expert, np.int32))
    rows_P, experts_P = np.concatenate(rows).astype(np.int64), np.concatenate(experts).astype(np.int32)
    overlaps_P = np.arange(len(rows_P)) < len(border)
    order_P = np.lexsort((experts_P, rows_P))
    return ExtraCopies(rows_P[order_P], experts_P[order_P], overlaps_P[order_P])


def _floor_two_digits(share: float) -> float:
    """Rounded down, so that what is recommended is possible."""
    digits = 1 - int(np.floor(np.log10(share))) if share > 0 else 0
    return float(np.floor(share * 10.0**digits) / 10.0**digits)
