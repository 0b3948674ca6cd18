"""The compiled pass gives the bits of the plain one: same assignment, same distances, same sums.

Batches of any size go through the compiled loops here, small ones too, which otherwise are not worth compiling for.
"""

import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardmoe.errors import DataError
from hardmoe.neighbours.assignment import assign, squared_distances
from hardmoe.neighbours.faiss_engine import FaissEngine
from hardmoe.partitioning import kernels
from hardmoe.partitioning import scan as scan_module
from hardmoe.partitioning.exact_sums import ClusterSums
from hardmoe.partitioning.scan import scan

ENGINE = FaissEngine()


@pytest.fixture(autouse=True, scope="module")
def _batches_of_any_size() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_module, "_LEAST_VALUES", 0)
        yield


def plain(features, centroids):
    assignment = assign(features, centroids, ENGINE)
    return assignment, ClusterSums.from_batch(features, assignment, len(centroids))


def assert_same(features, centroids):
    (found, sums), (expected, expected_sums) = scan(features, centroids, ENGINE), plain(features, centroids)
    np.testing.assert_array_equal(found.primary_N, expected.primary_N)
    np.testing.assert_array_equal(found.squared_distance_N, expected.squared_distance_N)
    arrays, expected_arrays = sums.to_arrays(), expected_sums.to_arrays()
    assert {name: array.tobytes() for name, array in arrays.items()} == {
        name: array.tobytes() for name, array in expected_arrays.items()
    }


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 700),
    dim=st.integers(1, 150),
    clusters=st.integers(1, 300),
    magnitude=st.sampled_from([1e-30, 1.0, 65504.0, 2.0**18.9, 2.0**19.5]),
)
def test_scan_gives_the_bits_of_assign_and_from_batch(seed, rows, dim, clusters, magnitude):
    generator = np.random.default_rng(seed)
    features = (generator.uniform(-1, 1, (rows, dim)) * magnitude).astype(np.float32)
    centroids = (generator.uniform(-1, 1, (clusters, dim)) * magnitude).astype(np.float32)
    assert_same(features, centroids)


@pytest.mark.parametrize("clusters", [2, 40, 3000])
def test_scan_decides_ties_and_near_ties_as_the_definition_does(clusters):
    """On a grid of small integers distances tie exactly all the time; a last bit more or less makes near-ties."""
    generator = np.random.default_rng(clusters)
    features = generator.integers(-2, 3, (9000, 5)).astype(np.float32)
    centroids = generator.integers(-2, 3, (clusters, 5)).astype(np.float32)
    centroids[1::2] = np.nextafter(centroids[1::2], np.float32(9))
    assert_same(features, centroids)


def test_scan_counts_on_after_the_room_for_integers_is_used_up():
    """Rows of 2^18 fill 63 bits after 2^13 of them: what was added must have been put aside by then."""
    features = np.full((40_000, 2), 2.0**18, np.float32)
    assert_same(features, np.array([[2.0**18, 0.0], [0.0, 0.0]], np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scan_refuses_what_is_no_number(bad):
    features = np.ones((5000, 3), np.float32)
    features[4321, 1] = bad
    with pytest.raises(DataError, match="NaN or infinity"):
        scan(features, np.eye(3, dtype=np.float32), ENGINE)


def test_scan_of_no_rows_is_nothing():
    assert_same(np.zeros((0, 3), np.float32), np.eye(3, dtype=np.float32))


def test_distances_are_added_in_the_order_in_which_numpy_adds():
    generator = np.random.default_rng(0)
    for dim in [*range(1, 40), 63, 64, 127, 128, 129, 136, 200, 255, 256, 257, 384, 600, 1024, 2048]:
        features, centroids = (generator.standard_normal((count, dim)).astype(np.float32) for count in (20, 5))
        primary = generator.integers(0, 5, 20).astype(np.int32)
        primary[3] = -1
        squared = np.full(20, -7.0)
        kernels.distances(features, centroids, primary, squared)
        kept = np.flatnonzero(primary >= 0)
        np.testing.assert_array_equal(squared[kept], squared_distances(features, centroids, kept, primary[kept]))
        assert squared[3] == -7.0


@pytest.mark.parametrize(("rows", "compiles"), [(65535, "False"), (65536, "True")])
def test_small_batches_are_not_worth_compiling_for(rows, compiles):
    """Every worker that fits anything compiled for 2.4 s, be it for a hundred rows."""
    program = (
        "import sys, numpy as np; from hardmoe.neighbours.faiss_engine import FaissEngine;"
        "from hardmoe.partitioning.scan import scan;"
        f"scan(np.random.default_rng(0).random(({rows}, 2), np.float32), np.eye(2, dtype=np.float32), FaissEngine());"
        "print('numba' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert told.strip() == compiles
