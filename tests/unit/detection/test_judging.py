"""Which expert takes which objects, on weights and levels known beforehand."""

import numpy as np
import torch

from hardmoe.detection.canvas_files import CanvasSet
from hardmoe.detection.judging import judge, levels_of, shares_by_level, shares_by_range
from hardmoe.models.moe.config import MoeConfig
from hardmoe.models.moe.networks.retinanet import ANCHOR_SIZES, DetectorPlan, build_detector, give_experts


def canvases() -> CanvasSet:
    boxes = np.array([[0, 0, 16, 16], [30, 30, 62, 62], [0, 0, 64, 64], [8, 8, 24, 24]], np.float32)
    images = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3)).astype(np.uint8)
    return CanvasSet(images, boxes, np.array([0, 1, 0, 1]), np.array([0, 1, 2, 0]), np.array([0, 3, 4]))


def test_objects_lie_on_the_level_whose_anchors_have_their_size() -> None:
    detector = build_detector(DetectorPlan(2, 128, width=4, channels=8, depth=0), seed=0)
    sides = [size for level in ANCHOR_SIZES for size in level]
    # Anchors of a level lie at multiples of its stride, the first at 0.
    boxes = np.array([[64 - side / 2, 64 - side / 2, 64 + side / 2, 64 + side / 2] for side in sides[:-1]], np.float32)
    assert levels_of(detector.anchors(), boxes).tolist() == [0, 0, 0, 1, 1, 1, 2, 2]


def test_shares_are_means_over_the_objects_of_a_range_on_their_maps() -> None:
    weights_NLE = np.zeros((2, 3, 4))
    weights_NLE[0, 0, 0] = weights_NLE[0, 1, 1] = weights_NLE[0, 2, 2] = 1.0
    weights_NLE[1, 0] = [0.5, 0.0, 0.0, 0.5]
    found = shares_by_range(weights_NLE, np.array([0, 1, 2, 0]), canvases())
    assert found == [[0.75, 0, 0, 0.25], [0, 1, 0, 0], [0, 0, 1, 0]]
    assert shares_by_level(weights_NLE)[0] == [0.75, 0, 0, 0.25]


def test_weights_of_maps_are_the_gates_own() -> None:
    detector = build_detector(DetectorPlan(2, 64, width=4, channels=8, depth=0), seed=0)
    give_experts(detector, ("regression", "classification"), MoeConfig(), seed=1)
    judged = judge(detector, canvases(), torch.device("cpu"))
    assert set(judged.weights_NLE) == set(judged.usages) == {"regression", "classification"}
    images = torch.from_numpy(canvases().images_NSS3).permute(0, 3, 1, 2).float() / 255
    levels = detector.backbone(detector.transform(list(images))[0].tensors)
    scores = detector.head.regression_head.bbox_reg.router.scores
    for number, level in enumerate(levels.values()):
        best, experts = scores(level[:, None])[:, 0].topk(2)
        expected = torch.zeros(2, 4).scatter(1, experts, best.softmax(1)).detach().numpy()
        np.testing.assert_allclose(judged.weights_NLE["regression"][:, number], expected, rtol=1e-4, atol=1e-5)
    assert judged.usages["regression"]["living_experts"] >= 2
