"""Average precision of detections at one overlap, in all and by size, with every draw of the bootstrap.

Per class, detections from the surest down; each takes, of the objects of its canvas and class that nobody took, the one that it
overlaps most, by at least the threshold. Average precision is the area below the precision that is made to fall (the envelope of
VOC 2010); the mean is over classes with an object. For a range of sizes, as COCO does, objects of other ranges are ignored:
a detection that takes one counts for nothing, and one that takes none counts only if its own longer side is in the range. Ranges
are stretched to the middle between them, so that they cover all sizes.

A draw changes weights of canvases, never who takes whom, so the matching is done once. Rejected: pycocotools, a dependency for a
hundred lines that has no intervals.

Shape letters: D detections, M objects, N canvases, R rows of the bootstrap, the point estimate first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Detections:
    """What was found, or what is there; rows of all canvases."""

    boxes_D4: NDArray[np.float32]
    """xyxy."""
    classes_D: NDArray[np.int64]
    canvases_D: NDArray[np.int64]
    scores_D: NDArray[np.float32]
    """Of objects that are there, anything."""

    @property
    def longer_D(self) -> NDArray[np.float32]:
        """Longer sides."""
        sides_D2: NDArray[np.float32] = self.boxes_D4[:, 2:] - self.boxes_D4[:, :2]
        return sides_D2.max(axis=1) if len(sides_D2) else np.zeros(0, np.float32)


def overlaps(box_4: NDArray[np.float32], boxes_M4: NDArray[np.float32]) -> NDArray[np.float64]:
    """Intersection over union of a box with others, float64 [M]."""
    box, boxes = box_4.astype(np.float64), boxes_M4.astype(np.float64)
    inside_M2 = np.clip(np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2]), 0, None)
    area_M = inside_M2.prod(axis=1)
    both_M = (box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) - area_M
    result: NDArray[np.float64] = area_M / np.maximum(both_M, 1e-12)
    return result


def bounds_of(sizes: Sequence[Sequence[int]]) -> list[tuple[float, float]]:
    """The ranges of longer sides, stretched to cover all: from, to (not included)."""
    middles = [(first[1] + second[0]) / 2 for first, second in pairwise(sizes)]
    return list(zip([0.0, *middles], [*middles, float("inf")], strict=True))


def mean_average_precision(
    found: Detections, there: Detections, within: tuple[float, float], weights_NR: NDArray[np.float64], overlap: float = 0.5
) -> NDArray[np.float64]:
    """The mean over classes in every row, float64 [R]; NaN where no class has an object.

    Args:
        found: detections.
        there: the objects.
        within: longer sides that count, from and to (not included).
        weights_NR: of every canvas in every row.
        overlap: what a detection must overlap an object by.
    """
    counted_M = (there.longer_D >= within[0]) & (there.longer_D < within[1])
    total_R, number_R = np.zeros(weights_NR.shape[1]), np.zeros(weights_NR.shape[1])
    for tag in np.unique(there.classes_D[counted_M]):
        of_class_M = there.classes_D == tag
        order_D = np.flatnonzero(found.classes_D == tag)
        order_D = order_D[np.argsort(-found.scores_D[order_D], kind="stable")]
        taken_D = _matches(found, order_D, there, np.flatnonzero(of_class_M), counted_M, overlap)
        right_D = (taken_D >= 0) & counted_M[taken_D]
        own_D = (found.longer_D[order_D] >= within[0]) & (found.longer_D[order_D] < within[1])
        counts_D = right_D | ((taken_D < 0) & own_D)
        objects_R = weights_NR[there.canvases_D[of_class_M & counted_M]].sum(axis=0)
        weights_DR = weights_NR[found.canvases_D[order_D[counts_D]]]
        total_R += np.where(objects_R > 0, _area(right_D[counts_D], weights_DR, objects_R), 0.0)
        number_R += objects_R > 0
    return np.divide(total_R, number_R, out=np.full_like(total_R, np.nan), where=number_R > 0)


def _matches(
    found: Detections,
    order_D: NDArray[np.int64],
    there: Detections,
    of_class: NDArray[np.int64],
    counted_M: NDArray[np.bool_],
    overlap: float,
) -> NDArray[np.int64]:
    """Of every detection in this order the object that it takes, -1 for none; objects that count come before those ignored."""
    taken_D = np.full(len(order_D), -1)
    by_canvas = {int(canvas): of_class[there.canvases_D[of_class] == canvas] for canvas in np.unique(there.canvases_D[of_class])}
    free_M = np.ones(len(there.classes_D), bool)
    for place, row in enumerate(order_D):
        some = by_canvas.get(int(found.canvases_D[row]))
        if some is None:
            continue
        shared = overlaps(found.boxes_D4[row], there.boxes_D4[some])
        for counts in (True, False):
            open_m = free_M[some] & (counted_M[some] == counts) & (shared >= overlap)
            if open_m.any():
                taken_D[place] = some[np.flatnonzero(open_m)[np.argmax(shared[open_m])]]
                free_M[taken_D[place]] = False
                break
    return taken_D


def _area(right_D: NDArray[np.bool_], weights_DR: NDArray[np.float64], objects_R: NDArray[np.float64]) -> NDArray[np.float64]:
    """Below the falling envelope of precision over recall, float64 [R]."""
    if not len(right_D):
        return np.zeros(len(objects_R))
    seen_DR = weights_DR.cumsum(axis=0)
    true_DR = weights_DR * right_D[:, None]
    precision_DR = np.divide(true_DR.cumsum(axis=0), seen_DR, out=np.zeros_like(seen_DR), where=seen_DR > 0)
    envelope_DR = np.maximum.accumulate(precision_DR[::-1], axis=0)[::-1]
    summed_R: NDArray[np.float64] = (envelope_DR * true_DR).sum(axis=0)
    return np.divide(summed_R, objects_R, out=np.zeros_like(summed_R), where=objects_R > 0)
