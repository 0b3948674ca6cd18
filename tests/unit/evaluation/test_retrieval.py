"""Neighbours against brute force in float64, and what each of the three numbers says.

Shape letters: N images, D dims.
"""

import numpy as np
import pytest

from hardmoe.data.reading import Labels
from hardmoe.evaluation.bootstrap import poisson_weights
from hardmoe.evaluation.retrieval import AMONG, NEIGHBOURS, Points, neighbour_hits, replicated_shares, share_results


def images(count: int, seed: int = 0, experts: int = 3) -> tuple[Points, list[set[int]]]:
    """Points of random vectors, a tenth of them without a hashtag, and the hashtags in the points' order."""
    rng = np.random.default_rng(seed)
    ids_N16 = rng.integers(0, 256, (count, 16), np.uint8)
    tags = [set() if rng.random() < 0.1 else set(rng.integers(0, 12, rng.integers(1, 4)).tolist()) for _ in range(count)]
    labels = Labels(
        np.array([tag for some in tags for tag in sorted(some)], np.int32), np.cumsum([0, *map(len, tags)]).astype(np.int64)
    )
    vectors_ND = rng.normal(size=(count, 8)).astype(np.float32)
    points = Points.of(ids_N16, vectors_ND, rng.integers(0, experts, count), labels)
    by_id = {ids.tobytes(): some for ids, some in zip(ids_N16, tags, strict=True)}
    return points, [by_id[ids.tobytes()] for ids in points.ids_N16]


@pytest.mark.parametrize("count", [3, 60, 300])
def test_hits_are_those_of_brute_force(count: int) -> None:
    points, tags = images(count, experts=3 if count > 10 else 2)
    assert all(tags)
    assert [ids.tobytes() for ids in points.ids_N16] == sorted(ids.tobytes() for ids in points.ids_N16)
    found, vectors_ND = neighbour_hits(points), points.vectors_ND.astype(float)
    for row in range(len(tags)):
        order = [int(other) for other in np.argsort(-(vectors_ND @ vectors_ND[row]), kind="stable") if other != row]
        same = points.experts_N == points.experts_N[row]
        chosen = {"all": order, "own": [o for o in order if same[o]], "other": [o for o in order if not same[o]]}
        for among in AMONG:
            nearest = chosen[among][:NEIGHBOURS]
            assert found[among][1][row] == len(nearest)
            assert found[among][0][row] == sum(bool(tags[row] & tags[other]) for other in nearest)


def test_shares_do_not_depend_on_the_order_of_the_images_or_on_the_length_of_their_vectors() -> None:
    rng, (points, _) = np.random.default_rng(1), images(80)
    order = rng.permutation(len(points.ids_N16))
    lengths = np.diff(points.labels.offsets)
    indices = [points.labels.indices_L[points.labels.offsets[row] : points.labels.offsets[row + 1]] for row in order]
    labels = Labels(np.concatenate(indices), np.cumsum([0, *lengths[order]]).astype(np.int64))
    scaled_ND = points.vectors_ND[order] * np.float32(4.0)
    again = Points.of(points.ids_N16[order], scaled_ND, points.experts_N[order], labels)
    assert replicated_shares(again, 5, 7) == replicated_shares(points, 5, 7)


def test_replicates_weigh_images_like_every_other_metric() -> None:
    points, _ = images(50)
    shares, hits = replicated_shares(points, 20, seed=3), neighbour_hits(points)
    weights_BN = poisson_weights(points.ids_N16, 20, 3).astype(float)
    for among in AMONG:
        hits_N, totals_N = hits[among]
        assert shares[among] is not None
        assert shares[among][0] == pytest.approx(hits_N.sum() / totals_N.sum())
        assert shares[among][1:] == pytest.approx(weights_BN @ hits_N / (weights_BN @ totals_N))


def test_spaces_that_do_not_understand_each_other_find_nothing_across_their_border() -> None:
    """Two experts that put the same hashtags in opposite places: perfect within, and wrong between."""
    rng = np.random.default_rng(0)
    tags_N, experts_N = np.repeat(np.arange(4), 40), np.tile([0, 1], 80)
    turned_N = np.where(experts_N == 0, tags_N, (tags_N + 1) % 4)
    vectors = {"one": np.eye(4)[tags_N], "two": np.eye(4)[turned_N]}
    labels = Labels(tags_N.astype(np.int32), np.arange(161))
    ids_N16 = rng.integers(0, 256, (160, 16), np.uint8)
    noise_ND = rng.normal(size=(160, 4)) * 1e-3
    found = {
        name: replicated_shares(Points.of(ids_N16, (at + noise_ND).astype(np.float32), experts_N, labels), 50, 0)
        for name, at in vectors.items()
    }
    assert [found["one"][among][0] for among in AMONG] == [1.0, 1.0, 1.0]
    assert found["two"]["own"][0] == 1.0
    assert found["two"]["other"][0] == 0.0
    assert share_results(found["two"], found["one"])["neighbours@10:other"] == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_one_part_has_no_neighbours_elsewhere() -> None:
    points, _ = images(30, experts=1)
    results = share_results(replicated_shares(points, 10, 0), None)
    assert results["neighbours@10:other"]["reason"] == "no test image has such neighbours"
    assert results["neighbours@10:own"] == results["neighbours@10:all"]
