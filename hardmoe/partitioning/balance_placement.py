"""Where a shard's training examples go by a balanced plan, and what the whole is worth, by the definition of the distance.

Only the training split is balanced. The other splits, and every image in use, go to the nearest centroid: nobody knows there
what other images will come, and no room is short. So a training example whose nearest centroid is another part's is *trained
elsewhere than it would be served*, and counted. Rejected: routing by distance plus price in use as well, which would send
images away from the part whose expert knows their like best.

The plan was found with integers near the distances (`cost_grid`). Here every distance is measured again by definition, the
bound that the prices give is lowered by all that the integers may err, and everything is summed in units of 2^-40: what the
record calls a lower bound is one, for the very numbers that the assignments show.

Shape letters: N rows, K parts, D feature dim, B rows of a block.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from hardmoe.arrays import load_arrays
from hardmoe.config import Json
from hardmoe.neighbours.assignment import Assignment, squared_distances
from hardmoe.partitioning.balance_pass import Plan
from hardmoe.partitioning.cost_grid import NOISE_BITS, Batches, CostGrid, row_blocks
from hardmoe.partitioning.router import Router
from hardmoe.stage import UnitContext

_DISTANCE_BITS = 40
_SUMMED_ROWS = 2**14  # whole squared distances below 2^49 and fractions below 2^40 add up exactly in int64


@dataclass(frozen=True)
class Balanced:
    """What the search came to."""

    plan: Plan
    unit: int
    """Exponent of the costs' unit, see `CostGrid.unit_exponent`."""
    capacity: int
    slack: float
    path: str
    """Where the units find plan and unit."""


def place_shard(
    context: UnitContext, router: Router, batch: tuple[NDArray[np.uint8], NDArray[np.float32]], nearest: Assignment
) -> tuple[Assignment, Json]:
    """`place_rows` for a training shard's ids and features, after the router's transform, by the plan that the unit was given."""
    shared = load_arrays(context.storage, context.unit.arguments["plan"])
    plan = Plan.from_arrays(shared), int(shared["unit"][0])
    return place_rows([batch], CostGrid.of(router.centroids_KD, context.stage.config["seed"]), router, plan, nearest)


def place_rows(
    batches: Batches, grid: CostGrid, router: Router, plan: tuple[Plan, int], nearest: Assignment
) -> tuple[Assignment, Json]:
    """Where rows go by a plan and its unit, given which centroids they are nearest to.

    Returns:
        The assignment: the part they go to, its squared distance, and the nearest of the other parts; and what all that comes
        to, in numbers that add up over the shards (`summarise` reads them).
    """
    parts, priced, squared = [], [], []
    exponents: Counter[int] = Counter()
    start = bound = 0
    for ids_B16, features_BD in row_blocks(batches, grid):
        rows, start = slice(start, start + len(ids_B16)), start + len(ids_B16)
        costs_BK, exponents_B = grid.measure(features_BD)
        priced_B, placed_B = plan[0].place(grid.to_integers(costs_BK, ids_B16, plan[1]), ids_B16)
        squared_B = nearest.squared_distance_N[rows].copy()
        _measure_again(squared_B, features_BD, router, placed_B, placed_B != nearest.primary_N[rows])
        parts.append(placed_B)
        priced.append(priced_B)
        squared.append(squared_B.copy())
        _measure_again(squared_B, features_BD, router, priced_B, priced_B != placed_B)
        bound += to_units(squared_B)
        exponents.update(exponents_B.tolist())
    # Twice: the part that the integers prefer may err by it, and so may the one that is truly cheapest. One unit was rounded.
    errors = {each: 1 + math.ceil(2**_DISTANCE_BITS * 2.0 * grid.slack(each, plan[1])) for each in exponents}
    bound -= sum(count * errors[each] for each, count in exponents.items())
    placed_N = np.concatenate(parts)
    is_moved_N = placed_N != nearest.primary_N
    second_N = np.where(is_moved_N, nearest.primary_N, nearest.second_N)
    assignment = Assignment(placed_N, second_N, np.concatenate(squared))
    tally = {
        "cost": to_units(assignment.squared_distance_N),
        "unconstrained": to_units(nearest.squared_distance_N),
        "bound": bound,
        "priced": np.bincount(np.concatenate(priced), minlength=router.num_experts).tolist(),
        "elsewhere": np.bincount(placed_N[is_moved_N], minlength=router.num_experts).tolist(),
    }
    return assignment, tally


def _measure_again(
    squared_B: NDArray[np.float64],
    features_BD: NDArray[np.float32],
    router: Router,
    parts_B: NDArray[np.int32],
    chosen_B: NDArray[np.bool_],
) -> None:
    """Put the squared distances to other centroids where they are chosen."""
    rows = np.flatnonzero(chosen_B)
    squared_B[rows] = squared_distances(features_BD, router.centroids_KD, rows, parts_B[rows])


def summarise(balanced: Balanced, tallies: Sequence[Json], sizes: Sequence[int]) -> Json:
    """What the partition's record says of the balance, from the tallies of all shards and the sizes of the training parts."""
    assert max(sizes) <= balanced.capacity, f"parts of {list(sizes)} examples where {balanced.capacity} are allowed"
    scale = Fraction(1, 2**_DISTANCE_BITS)
    step = Fraction(2) ** (balanced.unit - NOISE_BITS)
    prices = balanced.plan.prices_K.tolist()
    priced_K = [sum(counts) for counts in zip(*(tally["priced"] for tally in tallies), strict=True)]
    bound = scale * sum(tally["bound"] for tally in tallies)
    bound += step * sum(price * (count - balanced.capacity) for price, count in zip(prices, priced_K, strict=True))
    unconstrained = float(scale * sum(tally["unconstrained"] for tally in tallies))
    return {
        "slack": balanced.slack,
        "capacity": balanced.capacity,
        "largest": max(sizes),
        "cost": float(scale * sum(tally["cost"] for tally in tallies)),
        "unconstrained_cost": unconstrained,
        "lower_bound": max(math.nextafter(float(bound), -math.inf), unconstrained),
        "prices": [float(step * price) for price in prices],
        "serve_elsewhere": [sum(counts) for counts in zip(*(tally["elsewhere"] for tally in tallies), strict=True)],
        "exceptions": len(balanced.plan.parts_E),
        "passes": balanced.plan.passes,
    }


def to_units(squared_distances_N: NDArray[np.float64]) -> int:
    """Sum of the distances, each rounded to a multiple of 2^-40, in such units."""
    units = 0
    for start in range(0, len(squared_distances_N), _SUMMED_ROWS):
        fractions, whole = np.modf(squared_distances_N[start : start + _SUMMED_ROWS])
        units += int(whole.astype(np.int64).sum()) << _DISTANCE_BITS
        units += int(np.rint(np.ldexp(fractions, _DISTANCE_BITS)).astype(np.int64).sum())
    return units
