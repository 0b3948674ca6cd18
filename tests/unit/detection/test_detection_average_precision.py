"""Average precision against a definition by loops over plain lists, and against cases worked out by hand."""

import numpy as np
import pytest

from hardmoe.detection.average_precision import Detections, bounds_of, mean_average_precision, overlaps

EVERYTHING = (0.0, float("inf"))


def iou(a: list[float], b: list[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    inside = max(width, 0.0) * max(height, 0.0)
    return inside / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inside)


def longer(box: list[float]) -> float:
    return max(box[2] - box[0], box[3] - box[1])


def by_loops(found: Detections, there: Detections, within: tuple[float, float], copies: list[int]) -> float:
    """The definition: canvases drawn several times are there several times; at each rank count anew from the start."""
    values = []
    objects = list(zip(there.boxes_D4.tolist(), there.classes_D.tolist(), there.canvases_D.tolist(), strict=True))
    for tag in sorted(set(there.classes_D.tolist())):
        ranked = sorted(
            (row for row in range(len(found.classes_D)) if found.classes_D[row] == tag), key=lambda row: -found.scores_D[row]
        )
        mine = [number for number, each in enumerate(objects) if each[1] == tag]
        inside = {number for number in mine if within[0] <= longer(objects[number][0]) < within[1]}
        total = sum(copies[objects[number][2]] for number in inside)
        if not total:
            continue
        taken: set[int] = set()
        outcomes: list[tuple[bool, int]] = []
        for row in ranked:
            box, canvas = found.boxes_D4[row].tolist(), int(found.canvases_D[row])
            fits = [n for n in mine if objects[n][2] == canvas and n not in taken and iou(box, objects[n][0]) >= 0.5]
            pick = max(fits, key=lambda n: (n in inside, iou(box, objects[n][0])), default=None)
            if pick is not None:
                taken.add(pick)
            if pick in inside or (pick is None and within[0] <= longer(box) < within[1]):
                outcomes.append((pick is not None, copies[canvas]))
        points = []
        for rank in range(1, len(outcomes) + 1):
            right = sum(weight for is_right, weight in outcomes[:rank] if is_right)
            seen = sum(weight for _, weight in outcomes[:rank])
            points.append((right / total, right / seen if seen else 0.0))
        area, before = 0.0, 0.0
        for rank, (recall, _) in enumerate(points):
            area += (recall - before) * max(precision for _, precision in points[rank:])
            before = recall
        values.append(area)
    return float(np.mean(values)) if values else float("nan")


def scene(seed: int) -> tuple[Detections, Detections]:
    """Objects on six canvases; detections near them, doubled, moved, of other classes, and out of nowhere."""
    generator = np.random.default_rng(seed)
    corners = generator.uniform(0, 80, (20, 2))
    boxes = np.concatenate([corners, corners + generator.uniform(8, 60, (20, 2))], axis=1).astype(np.float32)
    there = Detections(boxes, generator.integers(0, 3, 20), generator.integers(0, 6, 20), np.zeros(20, np.float32))
    which = generator.integers(0, 20, 60)
    moved = boxes[which] + generator.normal(0, 3, (60, 4)).astype(np.float32)
    moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
    classes = np.where(generator.random(60) < 0.8, there.classes_D[which], generator.integers(0, 3, 60))
    canvases = np.where(generator.random(60) < 0.9, there.canvases_D[which], generator.integers(0, 6, 60))
    return Detections(moved, classes, canvases, generator.random(60).astype(np.float32)), there


@pytest.mark.parametrize("seed", range(12))
def test_value_and_every_draw_are_those_of_the_definition(seed: int) -> None:
    found, there = scene(seed)
    draws = np.random.default_rng(seed + 100).poisson(1.0, (6, 5)).astype(float)
    weights = np.concatenate([np.ones((6, 1)), draws], axis=1)
    for within in (EVERYTHING, (0.0, 25.0), (25.0, 45.0), (45.0, float("inf"))):
        values = mean_average_precision(found, there, within, weights)
        expected = [by_loops(found, there, within, weights[:, column].astype(int).tolist()) for column in range(6)]
        np.testing.assert_allclose(values, expected, atol=1e-12)


def one(box: list[float], score: float = 0.9, tag: int = 0, canvas: int = 0) -> tuple[list[float], int, int, float]:
    return box, tag, canvas, score


def rows(*each: tuple[list[float], int, int, float]) -> Detections:
    boxes, classes, canvases, scores = zip(*each, strict=True) if each else ((), (), (), ())
    return Detections(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(classes, np.int64),
        np.array(canvases, np.int64),
        np.array(scores, np.float32),
    )


def precision(found: Detections, there: Detections, within: tuple[float, float] = EVERYTHING) -> float:
    return float(mean_average_precision(found, there, within, np.ones((3, 1)))[0])


def test_cases_by_hand() -> None:
    small, large = [0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 80.0, 80.0]
    there = rows(one(small), one(large))
    assert precision(there, there) == 1.0
    assert precision(rows(), there) == 0.0
    assert precision(rows(one(small)), there) == 0.5
    assert precision(rows(one(small), one(small, 0.8), one(large, 0.7)), there) == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert precision(rows(one(small, canvas=1)), there) == 0.0
    assert precision(rows(one(small, tag=1)), there) == 0.0
    # A large object is no mistake among the small ones, and neither is what was found of it.
    assert precision(rows(one(large), one(small, 0.5)), there, (0.0, 30.0)) == 1.0
    assert np.isnan(precision(there, there, (100.0, 200.0)))


def test_overlap_is_intersection_over_union() -> None:
    boxes = np.array([[0, 0, 10, 10], [5, 0, 15, 10], [10, 0, 20, 10], [2, 2, 4, 4]], np.float32)
    np.testing.assert_allclose(overlaps(boxes[0], boxes), [1, 1 / 3, 0, 0.04])


def test_ranges_are_stretched_to_cover_all_sizes() -> None:
    assert bounds_of([[14, 22], [28, 44], [56, 88]]) == [(0.0, 25.0), (25.0, 50.0), (50.0, float("inf"))]
