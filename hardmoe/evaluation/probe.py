"""What can be read off a space by those who did not train it: a linear probe, and the votes of the nearest neighbours.

The linear probe is multinomial logistic regression on frozen features: every feature at mean 0 and variance 1, the loss

    mean over images of -sum_t y_t log softmax(W x + b)_t  +  penalty / 2 |W|^2,        y_t = 1/k on each of an image's k tags

as the networks themselves are trained, by L-BFGS in float64 until the gradient is nothing to speak of. The problem is convex, so
the fit has one answer, whatever it starts from. The penalty is the power of sqrt(10) from 10 to 1e-6 with the smallest loss on
the validation split, the largest first, each fit starting from the last; two in a row that are worse end the search. Tags that no
training image of the sample has are not learnt: they come after all others and do not count on validation.

Neighbours vote as in Wu et al. 2018 (arXiv 1805.01978, section 3.4): every one of the k nearest by cosine gives each of its tags
exp(cos / 0.07); k is the one with the best precision@1 on validation, the smallest of equals.

Rejected: stochastic gradients, whose schedule would be one more thing that favours one space over another; and features as they
are, where the penalty of a wide space means another thing than that of a narrow one.

Shape letters: N images, n of a batch, D dims, V tags, T tags that are learnt, L labels, k neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hardmoe.data.ids import order_of_distinct
from hardmoe.data.ragged import take_rows
from hardmoe.data.reading import Labels
from hardmoe.evaluation.metrics import top_tags
from hardmoe.evaluation.retrieval import nearest_columns, unit_vectors

PENALTIES = tuple(10.0 ** (-step / 2) for step in range(-2, 13))
"""From the largest on."""
NEIGHBOUR_COUNTS = (1, 2, 5, 10, 20, 50, 100, 200)
VOTE_TEMPERATURE = 0.07
TOLERANCE = 1e-6
"""Of the largest component of the gradient; the loss is then within about its square over the penalty of the smallest."""
_MOST_ITERATIONS = 500
_WORSE_IN_A_ROW = 2
_CHUNK_LOGITS = 2**21
"""Logits that are held at a time, in float64: 16 MB."""


@dataclass(frozen=True)
class Images:
    """Labelled images in a space, ids in ascending order."""

    ids_N16: NDArray[np.uint8]
    vectors_ND: NDArray[np.float32]
    labels: Labels

    @classmethod
    def of(cls, ids_N16: NDArray[np.uint8], vectors_ND: NDArray[np.float32], labels: Labels) -> "Images":
        """Images in any order; those without a label are left out."""
        labelled_N = np.flatnonzero(np.diff(labels.offsets) > 0)
        kept_N = labelled_N[order_of_distinct(ids_N16[labelled_N])]
        return cls(ids_N16[kept_N], vectors_ND[kept_N], Labels(*take_rows(labels.indices_L, labels.offsets, kept_N)))

    def __len__(self) -> int:
        return len(self.ids_N16)


@dataclass(frozen=True)
class Standardized:
    """How features are brought to mean 0 and variance 1."""

    mean_D: NDArray[np.float64]
    scale_D: NDArray[np.float64]

    @classmethod
    def of(cls, vectors_ND: NDArray[np.float32]) -> "Standardized":
        """By these images; a feature that never varies stays 0."""
        scale_D = vectors_ND.std(axis=0, dtype=np.float64)
        return cls(vectors_ND.mean(axis=0, dtype=np.float64), np.where(scale_D > 0, scale_D, 1.0))

    def __call__(self, vectors_ND: NDArray[np.float32]) -> Tensor:
        """Float64 [N, D + 1]: the features, and a constant 1 for the bias."""
        scaled_ND = (vectors_ND.astype(np.float64) - self.mean_D) / self.scale_D
        return torch.from_numpy(np.concatenate([scaled_ND, np.ones((len(scaled_ND), 1))], axis=1))


class LogisticObjective:
    """Loss and gradient of multinomial logistic regression with soft targets.

    Args:
        features_NF: float64 [N, F], the last a constant 1, whose weight is not penalised.
        labels: of the images, each of which has one at least.
        num_tags: T.
    """

    def __init__(self, features_NF: Tensor, labels: Labels, num_tags: int) -> None:
        lengths_N = np.diff(labels.offsets)
        rows_L = np.repeat(np.arange(len(lengths_N)), lengths_N)
        shares_L1 = torch.from_numpy(1.0 / lengths_N[rows_L])[:, None]
        self._features_NF = features_NF
        # The targets meet the features once: their part of the loss is linear in the weights.
        targets_TF = torch.zeros(num_tags, features_NF.shape[1], dtype=torch.float64)
        self._targets_TF = targets_TF.index_add_(
            0, torch.from_numpy(labels.indices_L.astype(np.int64)), features_NF[torch.from_numpy(rows_L)] * shares_L1
        )
        self._chunk = max(1, _CHUNK_LOGITS // num_tags)

    def __call__(self, weight_TF: Tensor, penalty: float) -> tuple[float, Tensor]:
        """The loss, and its gradient float64 [T, F]."""
        count = len(self._features_NF)
        total, gradient_TF = -float((weight_TF * self._targets_TF).sum()), -self._targets_TF
        for start in range(0, count, self._chunk):
            features_nF = self._features_NF[start : start + self._chunk]
            logits_nT = features_nF @ weight_TF.T
            normalizer_n1 = logits_nT.logsumexp(1, keepdim=True)
            total += float(normalizer_n1.sum())
            gradient_TF.addmm_(logits_nT.sub_(normalizer_n1).exp_().T, features_nF)
        gradient_TF /= count
        penalized_TD = weight_TF[:, :-1]
        gradient_TF[:, :-1] += penalty * penalized_TD
        return total / count + penalty / 2 * float(penalized_TD.square().sum()), gradient_TF

    def minimize(self, weight_TF: Tensor, penalty: float, tolerance: float = TOLERANCE) -> tuple[Tensor, bool]:
        """The weights with the smallest loss, from where they are, and whether the gradient is as small as asked."""
        weight_TF = weight_TF.clone()
        search = torch.optim.LBFGS(
            [weight_TF],
            max_iter=_MOST_ITERATIONS,
            tolerance_grad=tolerance,
            tolerance_change=0.0,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def closure() -> float:
            loss, weight_TF.grad = self(weight_TF, penalty)
            return loss

        with torch.no_grad():
            search.step(closure)  # type: ignore[no-untyped-call]
            _, gradient_TF = self(weight_TF, penalty)
        return weight_TF.detach(), bool(gradient_TF.abs().max() <= tolerance)


@dataclass(frozen=True)
class LinearProbe:
    """A fitted probe."""

    standardized: Standardized
    tags_T: NDArray[np.int64]
    """The tags that it knows."""
    weight_TF: NDArray[np.float64]
    """The last column is the bias."""

    def scores(self, vectors_ND: NDArray[np.float32], num_tags: int) -> NDArray[np.float32]:
        """Log-probabilities float32 [N, V]; minus infinity of tags that it does not know."""
        logits_NT = self.standardized(vectors_ND) @ torch.from_numpy(self.weight_TF).T
        scores_NV = np.full((len(vectors_ND), num_tags), -np.inf, np.float32)
        scores_NV[:, self.tags_T] = torch.log_softmax(logits_NT, dim=1).numpy()
        return scores_NV


@dataclass(frozen=True)
class Chosen:
    """What was chosen on the validation split."""

    probe: LinearProbe
    penalty: float
    validation_loss: float
    converged: bool
    """Whether the fit with that penalty came to its end within the iterations that it is given."""


def fit_linear_probe(train: Images, validation: Images, penalties: Sequence[float] = PENALTIES) -> Chosen:
    """Fit a probe with every penalty and choose by the loss on validation images.

    Args:
        train: labelled images.
        validation: others, of which one at least must have a tag of theirs.
        penalties: from the largest on.

    Raises:
        ValueError: no validation image has a tag of a training image.
    """
    tags_T = np.unique(train.labels.indices_L).astype(np.int64)
    held_vectors_nD, held_labels = _known(validation, tags_T)
    if not len(held_vectors_nD):
        raise ValueError("no validation image has a tag of a training image")
    standardized = Standardized.of(train.vectors_ND)
    objective = LogisticObjective(standardized(train.vectors_ND), _renumbered(train.labels, tags_T), len(tags_T))
    held = LogisticObjective(standardized(held_vectors_nD), held_labels, len(tags_T))
    weight_TF = torch.zeros(len(tags_T), train.vectors_ND.shape[1] + 1, dtype=torch.float64)
    best: Chosen | None = None
    worse = 0
    for penalty in penalties:
        weight_TF, converged = objective.minimize(weight_TF, penalty)
        loss, _ = held(weight_TF, 0.0)
        if best is None or loss < best.validation_loss:
            best, worse = Chosen(LinearProbe(standardized, tags_T, weight_TF.numpy()), penalty, loss, converged), 0
        elif (worse := worse + 1) == _WORSE_IN_A_ROW:
            break
    assert best is not None
    return best


def _renumbered(labels: Labels, tags_T: NDArray[np.int64]) -> Labels:
    """Labels by their places among tags that hold all of them."""
    return Labels(np.searchsorted(tags_T, labels.indices_L).astype(np.int32), labels.offsets)


def _known(points: Images, tags_T: NDArray[np.int64]) -> tuple[NDArray[np.float32], Labels]:
    """The images with a tag among these, and their labels among these."""
    known_L = np.isin(points.labels.indices_L, tags_T)
    before = np.concatenate([[0], np.cumsum(known_L)])
    labels = Labels(points.labels.indices_L[known_L], before[points.labels.offsets].astype(np.int64))
    rows_n = np.flatnonzero(np.diff(labels.offsets) > 0)
    return points.vectors_ND[rows_n], _renumbered(Labels(*take_rows(labels.indices_L, labels.offsets, rows_n)), tags_T)


class Voters:
    """Training images that vote for the tags of images near them.

    Args:
        images: labelled, one at least.
        num_tags: V.
    """

    def __init__(self, images: Images, num_tags: int) -> None:
        self._unit_MD = unit_vectors(images.vectors_ND)
        self._labels, self._num_tags = images.labels, num_tags
        self._lengths_M = np.diff(images.labels.offsets)

    def __len__(self) -> int:
        return len(self._unit_MD)

    def scores(self, vectors_ND: NDArray[np.float32], counts: Sequence[int]) -> list[NDArray[np.float32]]:
        """The votes for every tag, float32 [N, V] for each number of neighbours; relative to the nearest one's vote.

        Args:
            vectors_ND: the images asked about, float32 [N, D].
            counts: numbers of neighbours.
        """
        similarity_NM = unit_vectors(vectors_ND) @ self._unit_MD.T
        scores = [np.zeros((len(vectors_ND), self._num_tags)) for _ in counts]
        for row, columns in enumerate(nearest_columns(similarity_NM, max(counts))):
            cosines_k = similarity_NM[row, columns].astype(np.float64)
            votes_k = np.exp((cosines_k - cosines_k[0]) / VOTE_TEMPERATURE)
            for count, scores_NV in zip(counts, scores, strict=True):
                some = np.array(columns[:count])
                tags_L, _ = take_rows(self._labels.indices_L, self._labels.offsets, some)
                np.add.at(scores_NV[row], tags_L, np.repeat(votes_k[:count], self._lengths_M[some]))
        return [scores_NV.astype(np.float32) for scores_NV in scores]

    def choose(self, validation: Images, batch: int = 256) -> tuple[int, float]:
        """How many neighbours to ask, and the precision@1 on validation images with so many."""
        counts = [count for count in NEIGHBOUR_COUNTS if count <= len(self)]
        hits_k = np.zeros(len(counts), np.int64)
        for start in range(0, len(validation), batch):
            rows = slice(start, min(start + batch, len(validation)))
            indices_L, offsets = validation.labels.rows(rows)
            for index, scores_nV in enumerate(self.scores(validation.vectors_ND[rows], counts)):
                best_L = np.repeat(top_tags(scores_nV, 1)[:, 0], np.diff(offsets))
                hits_k[index] += int((best_L == indices_L).sum())
        best = int(np.argmax(hits_k))
        return counts[best], float(hits_k[best]) / max(1, len(validation))
