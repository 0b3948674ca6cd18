"""When the mixture had better say nothing: of images far from every centroid, or those that it is not sure of.

Two rules are held against each other. One refuses the images farthest from their nearest centroid in the router's space, which is
known before any expert is asked and says whether an image is like those that were trained on; the other those whose best tag has
the smallest probability (Hendrycks and Gimpel 2017, arXiv 1610.02136). For every coverage, the share of images that is to be
answered, each rule's limit is fitted on the validation split and then applied to the test split: the curve shows what was asked
for, what share of test images was answered, and the precision@1 of those (a risk-coverage curve, El-Yaniv and Wiener 2010). The
area is the mean over the coverages of 1 - precision@1: the smaller, the better a rule finds the images that the mixture is wrong
about. A rule that refuses at random has the risk of full coverage everywhere.

In use only the first rule is offered, which asks the gate alone. Rejected: limits fitted on test images, which make a curve
that no use reaches; a limit for each part, which refuses as many images in a part of clean images as in one of noise.

Shape letters: N images, V tags, B replicates, R = 1 + B rows, L coverages of the curve, Q quantiles.
"""

import json
from collections.abc import Generator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from hardmoe.artifacts.names import LIMITS
from hardmoe.artifacts.store import ArtifactStore
from hardmoe.config import Json
from hardmoe.data.ids import order_of_distinct, sortable
from hardmoe.data.reading import Labels, labels_of
from hardmoe.data.schemas import NEAREST
from hardmoe.errors import CorruptFileError, DataError
from hardmoe.evaluation.bootstrap import BOOTSTRAP_SEED, interval_result, null_result, paired_result, poisson_weights
from hardmoe.evaluation.config import EvaluationConfig
from hardmoe.evaluation.metrics import top_tags
from hardmoe.evaluation.scoring import build_scorer
from hardmoe.evaluation.spaces import joined, sampled_rows
from hardmoe.evaluation.stage import COMPARED
from hardmoe.hashing import hash_fractions
from hardmoe.stage import Completion, DriverContext, Finished, Phase, Unit, UnitContext
from hardmoe.tables import ids_to_array, read_table
from hardmoe.training.determinism import deterministic

RESULTS_FILE = "results.json"
COVERAGES_L = np.arange(5, 101, 5) / 100
"""Of the curve; 1 refuses nothing."""
QUANTILES_Q = np.arange(1, 1000) / 1000
"""Of the distances that are kept for use."""
RULES = ("distance", "probability")
MOST_IMAGES = 200_000
"""Of a split, drawn by hash: a limit is then within a tenth of a per cent of coverage."""
_NOTHING = null_result("no test image is answered")
_BATCH = 1024
_CHUNK = 2048


def limits_of(doubts_N: NDArray[np.float64], coverages_L: NDArray[np.float64]) -> NDArray[np.float64]:
    """The smallest limits that leave at least such a share of the images within, float64 [L]; infinity for a share of 1.

    Args:
        doubts_N: what a rule goes by, more of it the sooner an image is refused.
        coverages_L: in (0, 1].
    """
    limits_L = np.quantile(doubts_N, coverages_L, method="inverted_cdf")
    return np.asarray(np.where(coverages_L < 1.0, limits_L, np.inf))


def curve_sums(
    doubts_N: NDArray[np.float64],
    right_N: NDArray[np.bool_],
    ids_N16: NDArray[np.uint8],
    limits_L: NDArray[np.float64],
    num_replicates: int,
) -> NDArray[np.float64]:
    """How many images are answered, and how many of them rightly, under every limit, float64 [R, L, 2], whole numbers."""
    sums_RL2 = np.zeros((1 + num_replicates, len(limits_L), 2))
    for start in range(0, len(doubts_N), _CHUNK):
        rows = slice(start, start + _CHUNK)
        answered_nL = doubts_N[rows, None] <= limits_L
        counts_nL2 = np.stack([answered_nL, answered_nL & right_N[rows, None]], axis=2).astype(np.float64)
        sums_RL2[0] += counts_nL2.sum(axis=0)
        weights_Bn = poisson_weights(ids_N16[rows], num_replicates, BOOTSTRAP_SEED).astype(np.float64)
        sums_RL2[1:] += np.tensordot(weights_Bn, counts_nL2, axes=1)
    return sums_RL2


def curve_results(sums: dict[str, NDArray[np.float64]]) -> dict[str, Json]:
    """The points of both rules' curves with intervals, their areas, and the paired differences of the first to the second.

    Args:
        sums: by rule, from `curve_sums` over the same images, the last limit refusing nothing.
    """
    precision = {rule: _shares(sums_RL2[..., 1], sums_RL2[..., 0]) for rule, sums_RL2 in sums.items()}
    answered = {rule: _shares(sums_RL2[..., 0], sums_RL2[:, -1:, 0]) for rule, sums_RL2 in sums.items()}
    # A replicate without an image under the smallest limit has no area.
    areas = {rule: (1.0 - values_RL).mean(axis=1) for rule, values_RL in precision.items()}
    first, second = RULES
    points = []
    for at, coverage in enumerate(COVERAGES_L.tolist()):
        point: dict[str, Json] = {"coverage": coverage}
        for rule in RULES:
            value = interval_result(precision[rule][:, at]) if sums[rule][0, at, 0] else _NOTHING
            point[rule] = {"answered": interval_result(answered[rule][:, at]), "precision@1": value}
        both = all(sums[rule][0, at, 0] for rule in RULES)
        point["difference"] = paired_result(precision[first][:, at], precision[second][:, at]) if both else _NOTHING
        points.append(point)
    area: dict[str, Json] = {
        rule: interval_result(values_R) if np.isfinite(values_R[0]) else _NOTHING for rule, values_R in areas.items()
    }
    difference_R = areas[first] - areas[second]
    area["difference"] = interval_result(difference_R) if np.isfinite(difference_R[0]) else _NOTHING
    return {"curve": points, "area": area}


def _shares(some: NDArray[np.float64], of: NDArray[np.float64]) -> NDArray[np.float64]:
    some, of = np.broadcast_arrays(some, of)
    return np.asarray(np.divide(some, of, out=np.full(some.shape, np.nan), where=of > 0))


class AbstentionWork:
    """See the module."""

    def phases(self, context: DriverContext) -> Generator[Phase, list[Completion], Finished]:
        """Limits on validation, then the curve on test."""
        (fitted,) = yield Phase("fit", [Unit("validation", _fraction(context, "validation"))])
        limits = fitted.payload["limits"]
        if limits is None:
            nothing = null_result("no validation image to fit a limit on")
            results: dict[str, Json] = {"area": dict.fromkeys((*RULES, "difference"), nothing)}
        else:
            judged = yield Phase("judge", [Unit("test", {"limits": limits, **_fraction(context, "test")})])
            results = judged[0].payload
        files = {RESULTS_FILE: (json.dumps(results, indent=1) + "\n").encode()}
        return Finished({"examples": fitted.payload["examples"], "distances": fitted.payload["distances"]}, files)

    def run(self, context: UnitContext) -> Json:
        """One split."""
        with deterministic(context.stage.resources.num_cpus, torch.device("cpu")):
            return _fit(context) if context.phase == "fit" else _judge(context)


def _fraction(context: DriverContext, split: str) -> dict[str, float]:
    """The share of a split's images that is looked at."""
    size = context.input("dataset").payload["sizes"][split]
    return {"fraction": MOST_IMAGES / max(1, size)}


def _fit(context: UnitContext) -> Json:
    """Limits for the curve by rule, and quantiles of the distances for use; None of no images."""
    _, doubts, _ = _looked_at(context, "validation")
    count = len(doubts["distance"])
    if not count:
        return {"examples": 0, "limits": None, "distances": None}
    limits = {rule: limits_of(values_N, COVERAGES_L)[:-1].tolist() for rule, values_N in doubts.items()}
    return {"examples": count, "limits": limits, "distances": limits_of(doubts["distance"], QUANTILES_Q).tolist()}


def _judge(context: UnitContext) -> Json:
    ids_N16, doubts, best_N = _looked_at(context, "test")
    replicates = context.stage.section(EvaluationConfig, "evaluation").bootstrap_replicates
    labels = labels_of(context.input("vocabulary"), ids_N16, split="test")
    lengths_N = np.diff(labels.offsets)
    labelled_N = lengths_N > 0
    right_N = _is_among(best_N, labels)
    limits = context.unit.arguments["limits"]
    sums = {
        rule: curve_sums(
            values_N[labelled_N], right_N[labelled_N], ids_N16[labelled_N], np.array([*limits[rule], np.inf]), replicates
        )
        for rule, values_N in doubts.items()
    }
    return {"examples": int(labelled_N.sum()), **curve_results(sums)}


def _is_among(best_N: NDArray[np.int64], labels: Labels) -> NDArray[np.bool_]:
    """Whether each image's tag is one of its own, bool [N]."""
    rows_L = np.repeat(np.arange(len(best_N)), np.diff(labels.offsets))
    return np.bincount(rows_L, best_N[rows_L] == labels.indices_L, minlength=len(best_N)) > 0


def _looked_at(context: UnitContext, split: str) -> tuple[NDArray[np.uint8], dict[str, NDArray[np.float64]], NDArray[np.int64]]:
    """Of a split's images: ids in ascending order [N, 16], by rule the doubts float64 [N], and the best tags int64 [N]."""
    fraction = context.unit.arguments["fraction"]
    paths = context.input(f"{COMPARED}:embeddings").files(f"split={split}/")
    if not paths:
        nothing = np.zeros(0)
        return np.zeros((0, 16), np.uint8), dict.fromkeys(RULES, nothing), nothing.astype(np.int64)
    ids_N16, features_ND, experts_N = joined([sampled_rows(context, COMPARED, path, fraction, "abstention") for path in paths])
    order_N = order_of_distinct(ids_N16)
    ids_N16, features_ND, experts_N = ids_N16[order_N], features_ND[order_N], experts_N[order_N]
    score = build_scorer([context.input(f"{COMPARED}:decoder-0000")], shared=True)
    best, sure = [np.zeros(0, np.int64)], [np.zeros(0)]
    for start in range(0, len(ids_N16), _BATCH):
        scores_nV = score(features_ND[start : start + _BATCH], experts_N[start : start + _BATCH])
        best_n1 = top_tags(scores_nV, 1)
        best.append(best_n1[:, 0])
        sure.append(np.exp(np.take_along_axis(scores_nV, best_n1, axis=1)[:, 0].astype(np.float64)))
        context.progress(min(start + _BATCH, len(ids_N16)), len(ids_N16))
    doubts = {"distance": _distances(context, split, ids_N16, fraction), "probability": 1.0 - np.concatenate(sure)}
    return ids_N16, doubts, np.concatenate(best)


def _distances(context: UnitContext, split: str, ids_N16: NDArray[np.uint8], fraction: float) -> NDArray[np.float64]:
    """From each image to its nearest centroid, float64 [N].

    Raises:
        CorruptFileError: the tables are of other images.
    """
    nearest = context.input("nearest")
    ids, squared = [np.zeros((0, 16), np.uint8)], [np.zeros(0)]
    for path in nearest.files(f"split={split}/"):
        table = read_table(nearest.storage, path, NEAREST)
        of_N16 = ids_to_array(table.column("example_id"))
        kept_N = hash_fractions(of_N16, BOOTSTRAP_SEED, "abstention") < fraction
        ids.append(of_N16[kept_N])
        squared.append(table.column("squared_distance").to_numpy()[kept_N])
    found_N16, squared_N = np.concatenate(ids), np.concatenate(squared)
    order_N = order_of_distinct(found_N16)
    if not np.array_equal(sortable(found_N16[order_N]), sortable(ids_N16)):
        raise CorruptFileError(f"{nearest.storage.where(nearest.path(''))} is of other images than the embeddings; delete both")
    return np.sqrt(squared_N[order_N])


def kept_limit(store: ArtifactStore, coverage: float | None) -> float | None:
    """The distance beyond which a run's mixture refuses an image, so that such a share of images like its validation images is
    answered; None to answer all. Between two of `QUANTILES_Q` it is interpolated.

    Raises:
        DataError: the run has not kept how far an image may be from every centroid, or the share is none.
    """
    if coverage is None:
        return None
    if not QUANTILES_Q[0] <= coverage <= QUANTILES_Q[-1]:
        raise DataError(f"coverage {coverage:g} is no share of images to answer; give one from 0.001 to 0.999, or none for all")
    limits = store.find(LIMITS)
    if limits is None:
        raise DataError(
            f"coverage {coverage:g} needs the distances of validation images, which {store.storage.where()} has not kept; "
            "run `hardmoe evaluate` with evaluation.abstention: true"
        )
    if limits.payload["distances"] is None:
        raise DataError(f"{store.storage.where(LIMITS)} is of a run without validation images; take one that has some")
    return interpolated(limits.payload["distances"], coverage)


def interpolated(distances: Sequence[float], coverage: float) -> float:
    """Of distances at `QUANTILES_Q`, the one at a share in between."""
    return float(np.interp(coverage, QUANTILES_Q, np.array(distances)))
