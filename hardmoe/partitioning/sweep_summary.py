"""The table of a sweep: for each number of parts, what its fits say together. Plain JSON in, plain JSON out."""

import math
from collections.abc import Callable, Mapping, Sequence

from hardmoe.config import Json

COLUMNS = {
    "objective": "mean squared distance of an example to the centroid of its part",
    "variance_share": "the same as a share of what a single part leaves: the mean squared distance to the mean",
    "largest": "size of the largest part divided by the mean size",
    "variation": "standard deviation of the sizes divided by their mean",
    "agreement": "adjusted Rand index of the partitions of two seeds: 1 the same, 0 no more alike than by chance",
    "tag_bits": "what the part says about a hashtag, in bits per occurrence, less what parts dealt out by lot say",
    "tag_share": "the same as a share of the entropy of the hashtags",
}
"""Every measure and what it is; each is given with its mean, its range and its values over the seeds (or pairs of them)."""


def summarise(sample: Json, fitted: Sequence[Json]) -> dict[str, Json]:
    """Put the records of a sweep together.

    Args:
        sample: the payload of the sample.
        fitted: the payloads of the numbers of parts, in ascending order.
    """
    return {"sample": dict(sample), "columns": dict(COLUMNS), "sweep": [_row(sample, payload) for payload in fitted]}


def _row(sample: Json, payload: Json) -> dict[str, Json]:
    fits = payload["fits"]
    measures: dict[str, Callable[[Mapping[str, Json]], float | None]] = {
        "objective": lambda fit: fit["objective"],
        "variance_share": lambda fit: fit["objective"] / sample["variance"] if sample["variance"] else None,
        "largest": lambda fit: max(fit["sizes"]) * len(fit["sizes"]) / sum(fit["sizes"]),
        "variation": lambda fit: variation(fit["sizes"]),
        "tag_bits": lambda fit: fit["tag_bits"] - fit["tag_chance_bits"],
        "tag_share": lambda fit: _quotient(fit["tag_bits"] - fit["tag_chance_bits"], fit["tag_entropy_bits"]),
    }
    row: dict[str, Json] = {name: _spread([measure(fit) for fit in fits]) for name, measure in measures.items()}
    row |= {"agreement": _spread(payload["agreement"]), "tag_chance_bits": _spread([fit["tag_chance_bits"] for fit in fits])}
    return {
        "parts": payload["parts"],
        **{name: row[name] for name in (*COLUMNS, "tag_chance_bits")},
        "passes": [fit["passes"] for fit in fits],
        "converged": sum(fit["converged"] for fit in fits),
        "sizes": fits[0]["sizes"],
        "tags": payload["tags"],
    }


def variation(sizes: Sequence[int]) -> float:
    """Standard deviation (over all parts, N in the denominator) divided by the mean."""
    count, total = len(sizes), sum(sizes)
    return math.sqrt(max(0, count * sum(size * size for size in sizes) - total * total)) / total


def _quotient(value: float, by: float) -> float | None:
    return value / by if by else None


def _spread(values: Sequence[float | None]) -> dict[str, Json] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"mean": math.fsum(known) / len(known), "low": min(known), "high": max(known), "values": known}
