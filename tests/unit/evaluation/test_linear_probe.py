"""Probes against scikit-learn and brute force: the loss, the fit, the choice of the penalty, the votes.

Shape letters: N images, D dims, T tags, F = D + 1 weights of a tag.
"""

import warnings

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression

from hardmoe.data.reading import Labels
from hardmoe.evaluation.probe import (
    NEIGHBOUR_COUNTS,
    PENALTIES,
    VOTE_TEMPERATURE,
    Images,
    LogisticObjective,
    Standardized,
    Voters,
    fit_linear_probe,
)


def images(count: int, seed: int, num_tags: int = 5, several: bool = True, dim: int = 6) -> Images:
    """Tags with a centre each, and images around the mean of their tags' centres; on one tag, or on up to three."""
    centres = 2.0 * np.random.default_rng(99).normal(size=(num_tags, dim))
    rng = np.random.default_rng(seed)
    tags = [sorted(rng.choice(num_tags, rng.integers(1, 4) if several else 1, replace=False)) for _ in range(count)]
    vectors_ND = np.array([centres[some].mean(axis=0) for some in tags]) + rng.normal(size=(count, dim))
    # Another scale for each feature: the probe must not care.
    vectors_ND = (vectors_ND * 10.0 ** (np.arange(dim) - 2) + 3.0).astype(np.float32)
    labels = Labels(np.concatenate(tags).astype(np.int32), np.cumsum([0, *map(len, tags)]).astype(np.int64))
    return Images.of(rng.integers(0, 256, (count, 16), np.uint8), vectors_ND, labels)


def rows_of(some: Images) -> list[list[int]]:
    return [row.tolist() for row in np.split(some.labels.indices_L, some.labels.offsets[1:-1])]


def by_scikit_learn(train: Images, penalty: float) -> np.ndarray:
    """The weights float64 [T, F] with the smallest loss: an image stands there once for every tag, each time with its share."""
    scaled = Standardized.of(train.vectors_ND)(train.vectors_ND).numpy()[:, :-1]
    lengths_N = np.diff(train.labels.offsets)
    repeated = np.repeat(np.arange(len(train)), lengths_N)
    model = LogisticRegression(C=1.0 / (penalty * len(train)), tol=1e-10, max_iter=10_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.fit(scaled[repeated], train.labels.indices_L, sample_weight=1.0 / lengths_N[repeated])
    return np.concatenate([model.coef_, model.intercept_[:, None]], axis=1)


def test_loss_and_gradient_are_those_of_autograd_and_scipy() -> None:
    train, rng = images(50, 0), np.random.default_rng(1)
    features_NF = Standardized.of(train.vectors_ND)(train.vectors_ND)
    weight_TF = torch.from_numpy(rng.normal(size=(5, 7))).requires_grad_()
    objective = LogisticObjective(features_NF, train.labels, 5)
    objective._chunk = 7  # several chunks, the last one shorter
    loss, gradient_TF = objective(weight_TF.detach(), 0.3)
    said_NT = log_softmax(features_NF.numpy() @ weight_TF.detach().numpy().T, axis=1)
    expected = np.mean([-said_NT[row, tags].mean() for row, tags in enumerate(rows_of(train))])
    expected += 0.15 * (weight_TF.detach().numpy()[:, :-1] ** 2).sum()
    assert loss == pytest.approx(expected, rel=1e-12)
    targets_NT = torch.zeros(50, 5, dtype=torch.float64)
    for row, tags in enumerate(rows_of(train)):
        targets_NT[row, tags] = 1 / len(tags)
    value = torch.nn.functional.cross_entropy(features_NF @ weight_TF.T, targets_NT) + 0.15 * weight_TF[:, :-1].square().sum()
    value.backward()
    torch.testing.assert_close(gradient_TF, weight_TF.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("penalty", [1.0, 1e-2, 1e-4])
def test_fit_is_that_of_scikit_learn(several: bool, penalty: float) -> None:
    train = images(200, 2, several=several)
    objective = LogisticObjective(Standardized.of(train.vectors_ND)(train.vectors_ND), train.labels, 5)
    weight_TF, converged = objective.minimize(torch.zeros(5, 7, dtype=torch.float64), penalty, tolerance=1e-7)
    assert converged
    expected_TF = by_scikit_learn(train, penalty)
    # A constant added to all biases changes nothing.
    found_TF = weight_TF.numpy() - np.append(np.zeros(6), weight_TF[:, -1].mean())
    expected_TF -= np.append(np.zeros(6), expected_TF[:, -1].mean())
    np.testing.assert_allclose(found_TF, expected_TF, rtol=1e-3, atol=1e-5)


def test_penalty_is_the_one_with_the_smallest_validation_loss_of_all() -> None:
    train, validation = images(60, 3, several=False), images(200, 4, several=False)
    chosen = fit_linear_probe(train, validation)
    losses = []
    for penalty in PENALTIES:
        weight_TF = by_scikit_learn(train, penalty)
        said = log_softmax(Standardized.of(train.vectors_ND)(validation.vectors_ND).numpy() @ weight_TF.T, axis=1)
        losses.append(np.mean([-said[row, tags].mean() for row, tags in enumerate(rows_of(validation))]))
    best = int(np.argmin(losses))
    assert 0 < best < len(PENALTIES) - 1, "a problem that says something about the choice"
    assert chosen.penalty == PENALTIES[best]
    assert chosen.validation_loss == pytest.approx(losses[best], rel=1e-4)
    assert chosen.converged


def test_scores_are_log_probabilities_and_unknown_tags_come_last() -> None:
    train = images(100, 5, num_tags=3)
    moved = Images(train.ids_N16, train.vectors_ND, Labels(train.labels.indices_L * 2, train.labels.offsets))
    scores_NV = fit_linear_probe(moved, moved, [0.1]).probe.scores(train.vectors_ND, 6)
    assert np.isneginf(scores_NV[:, [1, 3, 5]]).all()
    np.testing.assert_allclose(np.exp(scores_NV[:, ::2].astype(float)).sum(axis=1), 1.0, rtol=1e-6)
    plain_NT = fit_linear_probe(train, train, [0.1]).probe.scores(train.vectors_ND, 3)
    np.testing.assert_array_equal(scores_NV[:, ::2], plain_NT)


def test_probe_does_not_depend_on_the_order_of_the_images_or_the_scale_of_a_feature() -> None:
    train, validation = images(80, 6), images(40, 7)
    order = np.random.default_rng(0).permutation(len(train))
    tags = [rows_of(train)[row] for row in order]
    labels = Labels(np.concatenate(tags).astype(np.int32), np.cumsum([0, *map(len, tags)]).astype(np.int64))
    again = Images.of(train.ids_N16[order], train.vectors_ND[order], labels)
    first, second = fit_linear_probe(train, validation), fit_linear_probe(again, validation)
    np.testing.assert_array_equal(first.probe.weight_TF, second.probe.weight_TF)
    factors_D = np.float32(2.0) ** np.arange(6, dtype=np.float32)
    scaled, held = (Images(some.ids_N16, some.vectors_ND * factors_D, some.labels) for some in (train, validation))
    third = fit_linear_probe(scaled, held)
    np.testing.assert_allclose(third.probe.weight_TF, first.probe.weight_TF, rtol=1e-6, atol=1e-8)


def test_validation_images_of_unknown_tags_alone_cannot_choose() -> None:
    train = images(20, 8, num_tags=3)
    other = Images(train.ids_N16, train.vectors_ND, Labels(train.labels.indices_L + 3, train.labels.offsets))
    with pytest.raises(ValueError, match="no validation image has a tag of a training image"):
        fit_linear_probe(train, other)


@pytest.mark.parametrize("count", [1, 10, 50])
def test_votes_are_those_of_brute_force(count: int) -> None:
    train, asked = images(50, 9), images(20, 10)
    (found_NV,) = Voters(train, 5).scores(asked.vectors_ND, [count])
    unit = {
        name: v / np.linalg.norm(v, axis=1, keepdims=True)
        for name, v in (("train", train.vectors_ND.astype(float)), ("asked", asked.vectors_ND.astype(float)))
    }
    for row, similar_M in enumerate(unit["asked"] @ unit["train"].T):
        expected_V = np.zeros(5)
        for other in np.argsort(-similar_M, kind="stable")[:count]:
            expected_V[rows_of(train)[other]] += np.exp((similar_M[other] - similar_M.max()) / VOTE_TEMPERATURE)
        np.testing.assert_allclose(found_NV[row], expected_V, rtol=1e-4, atol=1e-6)


def test_number_of_neighbours_is_the_best_on_validation() -> None:
    train, validation = images(150, 11), images(300, 12)
    voters = Voters(train, 5)
    counts = [count for count in NEIGHBOUR_COUNTS if count <= 150]
    right = [
        sum(int(scores_V.argmax()) in tags for scores_V, tags in zip(scores_NV, rows_of(validation), strict=True))
        for scores_NV in voters.scores(validation.vectors_ND, counts)
    ]
    assert voters.choose(validation, batch=77) == (counts[int(np.argmax(right))], max(right) / 300)
    assert len(set(right)) > 1
