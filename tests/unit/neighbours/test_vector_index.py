"""Indexes of vectors, against NumPy's brute force."""

import numpy as np
import pytest

from hardmoe.errors import CorruptFileError
from hardmoe.neighbours.vector_index import (
    IndexPlan,
    VectorIndex,
    choose_probes,
    exact_neighbours,
    plan_index,
    unit_rows,
)


def clustered(count: int, dim: int = 16) -> np.ndarray:
    """Vectors around forty directions, of length 1."""
    random = np.random.default_rng(3)
    centres = random.normal(size=(40, dim))
    return unit_rows((centres[random.integers(0, 40, count)] + 0.4 * random.normal(size=(count, dim))).astype(np.float32))


def test_kind_goes_by_the_number_of_vectors() -> None:
    assert plan_index(200_000) == IndexPlan("flat", 0, 0)
    assert plan_index(1_000_000).kind == "ivf" and plan_index(1_000_000).num_lists == 4000
    assert plan_index(50_000_000).kind == "ivfpq"
    assert plan_index(10, "ivf").num_lists == 1


@pytest.mark.parametrize("kind", ["flat", "ivf", "ivfpq"])
def test_index_survives_its_bytes_and_finds_what_brute_force_finds(kind: str) -> None:
    vectors, plan = clustered(4000), plan_index(4000, kind)
    index = VectorIndex.fitted(plan, vectors)
    numbers = np.arange(1000, 5000)
    index.add(vectors[:1500], numbers[:1500])
    index.add(vectors[1500:], numbers[1500:])
    queries = clustered(4100)[4000:]
    exact = np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :10] + 1000
    best = None
    for start in range(0, 4000, 700):
        some = slice(start, start + 700)
        best = exact_neighbours(queries, best, vectors[some], numbers[some], 10)
    assert best is not None
    np.testing.assert_array_equal(best[0], exact)
    probes, recall = choose_probes(index, queries, exact, 0.95)
    again = VectorIndex.from_bytes(index.to_bytes(), "here")
    again.set_probes(probes)
    found, cosines = again.search(queries, 10)
    assert np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(found, exact, strict=True)]) == pytest.approx(recall)
    if kind == "flat":
        assert recall == 1.0
        np.testing.assert_allclose(cosines[:, 0], (queries @ vectors.T).max(axis=1), rtol=1e-5)
    elif kind == "ivf":
        assert recall >= 0.95 and 1 <= probes < plan.num_lists, "all lists were looked at, so nothing is gained"


def test_fewer_lists_are_looked_at_where_less_recall_is_wanted() -> None:
    vectors = clustered(4000)
    index = VectorIndex.fitted(plan_index(4000, "ivf"), vectors)
    index.add(vectors, np.arange(4000))
    exact, _ = exact_neighbours(vectors[:100], None, vectors, np.arange(4000), 10)
    few, _ = choose_probes(index, vectors[:100], exact, 0.5)
    many, _ = choose_probes(index, vectors[:100], exact, 0.999)
    assert few < many


def test_more_neighbours_than_vectors_gives_them_all() -> None:
    index = VectorIndex.fitted(plan_index(3), clustered(3))
    index.add(clustered(3), np.arange(3))
    assert sorted(index.search(clustered(3)[:1], 10)[0][0].tolist()) == [0, 1, 2]


def test_bytes_that_are_no_index_are_an_error_that_names_the_file() -> None:
    with pytest.raises(CorruptFileError, match=r"runs/a/index\.faiss is no index"):
        VectorIndex.from_bytes(b"no index at all", "runs/a/index.faiss")
