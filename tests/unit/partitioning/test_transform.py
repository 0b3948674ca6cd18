"""Feature transforms: a row alone as among thousands, principal directions against scikit-learn, files without surprises."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import numpy as safetensors_numpy
from sklearn.decomposition import PCA
from sklearn.preprocessing import normalize

from hardmoe.errors import DataError
from hardmoe.partitioning.moments import Moments
from hardmoe.partitioning.transform import FeatureTransform, Projection
from hardmoe.partitioning.transform_fit import fit_transform


def random_features(rows, dim=12, seed=1, scale=1.0):
    """Float16 features whose coordinates go together, with a mean far from zero."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((dim, dim)) * np.geomspace(1.0, 0.1, dim)
    features = (rng.standard_normal((rows, dim)) @ mixing + rng.standard_normal(dim)) * scale
    return features.astype(np.float16).astype(np.float32)


def fitted(features, kind="pca", components=None):
    return fit_transform(Moments.from_batch(features), kind, components)


def reference(projection, features):
    """The same arrays, applied by NumPy in float64."""
    centred = features.astype(np.float64) @ projection.directions_PD.T.astype(np.float64) - projection.offset_P
    return normalize(centred * projection.scale_P)


# Unit length.


def test_transform_l2_matches_scikit_learn_and_keeps_zero():
    features = np.concatenate([random_features(50), np.zeros((1, 12), np.float32)])
    original = features.copy()
    transformed = FeatureTransform("l2")(features)
    np.testing.assert_allclose(transformed, normalize(features.astype(np.float64)), rtol=1e-7)
    assert transformed.dtype == np.float32
    np.testing.assert_array_equal(features, original)
    tiny = FeatureTransform("l2")(np.full((1, 4), 1e-38, np.float32))  # the squares underflow in float32
    np.testing.assert_array_equal(tiny, np.full((1, 4), 0.5, np.float32))


def test_transform_l2_row_alone_equals_row_among_thousands():
    features = random_features(5000, dim=97)
    whole = FeatureTransform("l2")(features)
    alone = np.concatenate([FeatureTransform("l2")(row[None]) for row in features])
    assert alone.tobytes() == whole.tobytes()
    fortran = FeatureTransform("l2")(np.asfortranarray(features))
    np.testing.assert_array_equal(fortran, whole)


# Principal directions: what they are.


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("components", [1, 5, 12])
def test_projection_is_scikit_learns_pca_up_to_signs_and_then_unit_length(whiten, components):
    features = random_features(3000)
    found = fitted(features, "whiten" if whiten else "pca", components)
    oracle = PCA(components, svd_solver="full", whiten=whiten).fit(features.astype(np.float64))
    projection = found.transform.projection
    signs = np.sign((oracle.components_ * projection.directions_PD).sum(axis=1))
    np.testing.assert_allclose(projection.directions_PD, oracle.components_ * signs[:, None], atol=1e-6)
    expected = normalize(oracle.transform(features.astype(np.float64)) * signs)
    np.testing.assert_allclose(found.transform(features), expected, atol=2e-5)
    assert found.explained == pytest.approx(oracle.explained_variance_ratio_.sum(), rel=1e-6)
    assert found.facts == {
        "transform": {"kind": "whiten" if whiten else "pca", "components": components, "of": 12, "explained": found.explained}
    }


def test_whitened_features_have_variance_one_in_every_direction_before_they_get_unit_length():
    features = random_features(4000, dim=8)
    projected = fitted(features, "whiten").transform.projection(features)
    np.testing.assert_allclose(np.cov(projected.T, bias=True), np.eye(8), atol=1e-4)
    np.testing.assert_allclose(projected.mean(axis=0), 0.0, atol=1e-6)


def test_coordinate_of_largest_magnitude_is_positive_and_directions_go_by_variance():
    features = random_features(2000)
    directions = fitted(features).transform.projection.directions_PD
    assert (directions[np.arange(12), np.abs(directions).argmax(axis=1)] > 0).all()
    variances = np.var(features.astype(np.float64) @ directions.T.astype(np.float64), axis=0)
    assert (np.diff(variances) < 0).all()
    mirrored = fitted(-features).transform.projection.directions_PD
    assert mirrored.tobytes() == directions.tobytes()


def test_fit_knows_no_order_of_rows():
    features = random_features(3000, dim=20)
    expected = fitted(features, "whiten", 9).transform.to_bytes()
    shuffled = features[np.random.default_rng(0).permutation(3000)]
    moments = sum((Moments.from_batch(piece) for piece in np.split(shuffled, [1, 700, 2900])), start=Moments.zero(20))
    assert fit_transform(moments, "whiten", 9).transform.to_bytes() == expected


def test_directions_without_variance_are_left_out_and_asking_for_them_is_refused():
    features = random_features(500, dim=6)
    features[:, 2] = 7.25  # the same in every row
    features[:, 4] = 2.0 * features[:, 1]  # says nothing new
    found = fitted(features)
    assert len(found.transform.projection.directions_PD) == 4
    assert found.explained == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(
        DataError,
        match=r"partition\.components is 5, but the 500 training features of width 6 vary in 4 directions only; set it to 4",
    ):
        fitted(features, "whiten", 5)


def test_direction_in_which_only_rounding_varies_is_left_out():
    """Of float16 the last bit is noise; whitening would make as much of it as of anything else."""
    rng = np.random.default_rng(5)
    wide = rng.standard_normal((4000, 3)) @ rng.standard_normal((3, 8)) + 5.0
    assert len(fitted(wide.astype(np.float16).astype(np.float32), "whiten").transform.projection.directions_PD) == 3
    # A small variance is no noise where the values are small enough to have it.
    small = np.concatenate([wide, rng.standard_normal((4000, 1)) * 1e-4], axis=1)
    assert len(fitted(small.astype(np.float16).astype(np.float32), "whiten").transform.projection.directions_PD) == 4


def test_direction_whose_variance_is_below_what_lapack_promises_is_left_out():
    """An eigenvalue errs by D * 2^-52 of the largest one: at 2e-8 beside 6e7, another machine may see something else."""
    rng = np.random.default_rng(0)
    large = np.rint(rng.standard_normal((300, 4)) * 8) * 1024.0
    small = np.rint(rng.standard_normal((300, 3)) * 100) * 2.0**-20
    features = np.concatenate([large, small], axis=1).astype(np.float16).astype(np.float32)
    assert len(fitted(features).transform.projection.directions_PD) == 4
    assert len(fitted(features[:, 4:]).transform.projection.directions_PD) == 3


def test_fewer_rows_than_dimensions_have_as_many_directions_as_rows_but_one():
    features = random_features(10, dim=40)
    found = fitted(features, "whiten")
    assert len(found.transform.projection.directions_PD) == 9
    transformed = found.transform(features).astype(np.float64)
    # Whitened and as many as there can be: all rows are equally far from each other, up to the rounding that was left out.
    np.testing.assert_allclose(transformed @ transformed.T, np.eye(10) * (10 / 9) - 1 / 9, atol=1e-4)


def test_features_that_are_all_the_same_are_refused():
    with pytest.raises(DataError, match=r"the 30 training features are all the same.*set partition\.transform to l2"):
        fitted(np.full((30, 5), 0.3, np.float16).astype(np.float32))


def test_single_dimension_becomes_a_sign_and_the_mean_nothing():
    features = np.array([[1.0], [2.0], [3.0], [6.0]], np.float32)
    transform = fitted(features, "whiten").transform
    np.testing.assert_array_equal(transform(features), [[-1.0], [-1.0], [0.0], [1.0]])


def test_feature_that_is_the_mean_is_projected_to_exactly_zero():
    features = (np.random.default_rng(1).integers(-500, 500, (64, 9)) * 2.0**-7).astype(np.float32)
    features[-1] -= (features.sum(axis=0) * 128 % 64 / 128).astype(np.float32)  # so that the mean is a float16
    mean = features.mean(axis=0, dtype=np.float64).astype(np.float32)
    assert (mean.astype(np.float64) == features.mean(axis=0, dtype=np.float64)).all()
    assert not fitted(features).transform(mean[None]).any()


# Principal directions: how they are applied.


@pytest.mark.parametrize("kind", ["pca", "whiten"])
@pytest.mark.parametrize(("dim", "components"), [(1, 1), (7, 3), (97, 40), (300, None)])
def test_projected_row_alone_equals_row_among_thousands(kind, dim, components):
    features = random_features(3000, dim, scale=0.5)
    features[::7] *= 16.0  # some blocks hold rows that are short and rows that are long
    transform = fitted(features, kind, components).transform
    whole = transform(features)
    rows = np.arange(0, 3000, 11)
    assert np.concatenate([transform(features[row][None]) for row in rows]).tobytes() == whole[rows].tobytes()
    order = np.random.default_rng(2).permutation(3000)
    assert transform(features[order]).tobytes() == whole[order].tobytes()
    np.testing.assert_array_equal(transform(np.asfortranarray(features)), whole)
    np.testing.assert_allclose(whole, reference(transform.projection, features), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(whole.astype(np.float64), axis=1), 1.0, atol=1e-6)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), exponents=st.tuples(st.integers(-24, 15), st.integers(-24, 15)))
def test_projection_is_the_exact_product_rounded_once(seed, exponents):
    """Against sums without rounding, for rows of any magnitude that float16 has."""
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.standard_normal((19, 19)))[0][:4]
    directions = (np.rint(directions * 2.0**24) * 2.0**-24).astype(np.float32)
    features = rng.uniform(-1.0, 1.0, (6, 19)) * 2.0 ** rng.integers(min(exponents), max(exponents) + 1, (6, 1))
    features = features.astype(np.float16).astype(np.float32)
    found = Projection(directions, np.zeros(4), np.ones(4))(features)
    # A product of 11 and 24 bits is exact in float64; fsum rounds the sum of them once.
    expected = [
        [math.fsum(row.astype(np.float64) * direction.astype(np.float64)) for direction in directions] for row in features
    ]
    np.testing.assert_array_equal(found, expected)


def test_largest_values_in_the_widest_features_are_projected_exactly():
    features = np.full((3, 2**13), 65504.0, np.float32)
    features[1, ::2] *= -1.0
    features[2, 5] = 2.0**-24
    direction = np.full((1, 2**13), np.rint(2.0**24 / 2.0**6.5) * 2.0**-24, np.float32)
    direction[0, ::2] *= -1.0
    found = Projection(direction, np.zeros(1), np.ones(1))(features)
    np.testing.assert_array_equal(
        found, [[math.fsum(row.astype(np.float64) * direction[0].astype(np.float64))] for row in features]
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("long", [False, True])
def test_row_that_is_not_finite_stays_so_and_leaves_its_neighbours_alone(bad, long):
    features = random_features(100, scale=64.0 if long else 1.0)
    transform = fitted(features).transform
    expected = transform(features)
    features[41, 3] = bad
    found = transform(features)
    assert np.isnan(found[41]).all()
    np.testing.assert_array_equal(np.delete(found, 41, axis=0), np.delete(expected, 41, axis=0))


def test_feature_beyond_float16_is_refused_also_beside_infinity():
    features = random_features(10)
    transform = fitted(features).transform
    features[3, 0], features[4, 0] = 1e6, np.inf
    with pytest.raises(DataError, match=r"a feature of magnitude 1e\+06 is beyond 65536"):
        transform(features)


def test_transform_takes_no_rows_and_refuses_another_width():
    transform = fitted(random_features(50), "pca", 4).transform
    assert transform(np.empty((0, 12), np.float32)).shape == (0, 4)
    with pytest.raises(ValueError, match="features of width 7 on directions of width 12"):
        transform(random_features(3, dim=7))


# Files.


def test_unknown_kinds_and_missing_or_needless_directions_are_refused():
    with pytest.raises(ValueError, match="unknown transform 'lda'"):
        FeatureTransform("lda")
    with pytest.raises(ValueError, match="'pca' lacks directions"):
        FeatureTransform("pca")
    with pytest.raises(ValueError, match="'l2' has no directions"):
        FeatureTransform("l2", fitted(random_features(50)).transform.projection)


@pytest.mark.parametrize("kind", ["none", "l2", "pca", "whiten"])
def test_bytes_round_trip(kind):
    features = random_features(80)
    transform = fitted(features, kind, 5).transform if kind in ("pca", "whiten") else FeatureTransform(kind)
    again = FeatureTransform.from_bytes(transform.to_bytes())
    assert again.to_bytes() == transform.to_bytes()
    assert again.kind == kind
    assert again(features).tobytes() == transform(features).tobytes()


def repacked(transform, kind=None, **changes):
    arrays = {**safetensors_numpy.load(transform.to_bytes()), **changes}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    return safetensors_numpy.save(arrays, metadata={"kind": kind or transform.kind})


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "l2"},
        {"kind": "lda"},
        {"offset": None},
        {"offset": np.zeros(4)},
        {"scale": np.full(5, np.nan)},
        {"scale": np.ones(5, np.float32)},
        {"directions": np.eye(5, 12, dtype=np.float64)},
        {"directions": np.eye(5, 12, dtype=np.float32) * np.float32(0.5)},
        {"directions": np.eye(5, 12, k=1, dtype=np.float32) + np.float32(2.0**-30)},
        {"directions": np.full((5, 12), np.nan, np.float32)},
        {"directions": np.eye(5, 3, dtype=np.float32)},
    ],
    ids=str,
)
def test_bytes_that_describe_no_transform_are_refused(changes):
    transform = fitted(random_features(80), "whiten", 5).transform
    assert FeatureTransform.from_bytes(repacked(transform)).to_bytes() == transform.to_bytes()
    with pytest.raises((ValueError, KeyError)):
        FeatureTransform.from_bytes(repacked(transform, **changes))


def test_kind_is_in_the_file_itself():
    data = fitted(random_features(80), "whiten", 5).transform.to_bytes()
    assert json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"] == {"kind": "whiten"}
