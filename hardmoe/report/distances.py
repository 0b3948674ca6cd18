"""Distances to the centroids as the page shows them: histograms in common bins, quantiles, images between two parts.

Shape letters: N examples.
"""

import numpy as np
from numpy.typing import NDArray

from hardmoe.report.schema import Distances, PartDistances

NUM_BINS = 32
BORDER = 1.1
"""An image lies on a border if another part's centroid is at most so many times as far away as the nearest. Either may be its own
part's: a balanced or given part need not be the nearest."""
_QUANTILES = (5, 50, 95, 99)


def count_distances(distance_N: NDArray[np.float32]) -> Distances | None:
    """The bins, from the smallest distance to the largest, and what is in them; None where there is no distance."""
    if not len(distance_N):
        return None
    low, high = float(distance_N.min()), float(distance_N.max())
    return {"low": low, "high": high, "counts": _counts(distance_N, low, high), "quantiles": _quantiles(distance_N)}


def count_part_distances(distance_N: NDArray[np.float32], overall: Distances) -> PartDistances | None:
    """One part's distances in the same bins; None of an empty part."""
    if not len(distance_N):
        return None
    return {"counts": _counts(distance_N, overall["low"], overall["high"]), "quantiles": _quantiles(distance_N)}


def bordering_share(distance_N: NDArray[np.float32], second_distance_N: NDArray[np.float32]) -> float | None:
    """Share of the examples that lie on a border; None where there is no second centroid."""
    known_N = np.isfinite(second_distance_N)
    if not known_N.any():
        return None
    own_N, other_N = distance_N[known_N].astype(np.float64), second_distance_N[known_N].astype(np.float64)
    on_border_N = np.maximum(own_N, other_N) <= BORDER * np.minimum(own_N, other_N)
    return float(on_border_N.mean())


def _counts(distance_N: NDArray[np.float32], low: float, high: float) -> list[int]:
    """One bin takes all where all distances are equal."""
    counts: list[int] = np.histogram(distance_N, NUM_BINS if high > low else 1, (low, high) if high > low else None)[0].tolist()
    return counts


def _quantiles(distance_N: NDArray[np.float32]) -> dict[str, float]:
    values = np.quantile(distance_N, np.array(_QUANTILES) / 100, method="inverted_cdf")
    return {str(quantile): float(value) for quantile, value in zip(_QUANTILES, values, strict=True)}
