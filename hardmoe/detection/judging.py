"""What a detector is worth on the test canvases, and which experts take objects of which size.

An object belongs to the level of the pyramid with the anchor that overlaps it most; the experts that take it are those of
that map, with the weights that the gate gave them. Rejected: the level whose detection was right, which leaves out what was
missed.

Shape letters: N canvases, M objects, L levels, E experts, B canvases of a batch, k experts of a map.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import box_iou

from hardmoe.config import Json
from hardmoe.detection.average_precision import Detections
from hardmoe.detection.canvas_files import CanvasSet
from hardmoe.detection.config import RANGES
from hardmoe.detection.fit import images_of
from hardmoe.models.moe.layer import moe_layers
from hardmoe.models.moe.networks.retinanet import HEADS, Detector
from hardmoe.models.moe.routing import Routing
from hardmoe.models.moe.statistics import observed

_BATCH = 25


@dataclass(frozen=True)
class Judged:
    """What a detector did on a set."""

    detections: Detections
    weights_NLE: Mapping[str, NDArray[np.float64]]
    """By head: how every map's experts were weighed."""
    usages: Mapping[str, Json]
    """By head: how evenly the experts were used."""


def judge(detector: Detector, canvases: CanvasSet, device: torch.device) -> Judged:
    """Run a detector over all canvases."""
    detector = detector.to(device).eval()
    layers = {_head_of(name): layer for name, layer in moe_layers(detector)}
    maps: dict[str, list[Tensor]] = {head: [] for head in layers}
    for head, layer in layers.items():
        layer.observers.append(lambda routing, head=head: maps[head].append(expert_weights(routing)))  # type: ignore[misc]
    boxes, scores, classes, numbers = [], [], [], []
    weights: dict[str, list[Tensor]] = {head: [] for head in layers}
    with torch.no_grad(), observed(detector) as usages:
        for start in range(0, len(canvases), _BATCH):
            some = np.arange(start, min(len(canvases), start + _BATCH))
            for number, found in zip(some, detector(images_of(canvases, some, device)), strict=True):
                boxes.append(found["boxes"].cpu())
                scores.append(found["scores"].cpu())
                classes.append(found["labels"].cpu())
                numbers.append(torch.full((len(found["labels"]),), int(number)))
            for head, levels in maps.items():
                weights[head].append(torch.stack([level[: len(some)] for level in levels], dim=1))
                levels.clear()
    for layer in layers.values():
        layer.observers.clear()
    joined = (torch.cat(each).numpy() for each in (boxes, classes, numbers, scores))
    return Judged(
        Detections(*joined),
        {head: torch.cat(each).numpy() for head, each in weights.items()},
        {_head_of(name): usage.summary() for name, usage in usages.items()},
    )


def _head_of(layer: str) -> str:
    """The name in `HEADS` of the head that a layer is in."""
    return next(name for name, attribute in HEADS.items() if f"{attribute}." in f"{layer}.")


def expert_weights(routing: Routing) -> Tensor:
    """What every item's experts are weighed with, float64 [items, E]; a row sums to 1 where nothing is dropped."""
    kept_GSk = torch.where(routing.kept_GSk, routing.weights_GSk, 0).double()
    return routing.by_expert(kept_GSk).flatten(0, 1).cpu()


def levels_of(anchors: list[Tensor], boxes_M4: NDArray[np.float32]) -> NDArray[np.int64]:
    """Of every object the level with the anchor that overlaps it most; the finest of equals."""
    best_LM = torch.stack([box_iou(torch.from_numpy(boxes_M4), level_A4).amax(dim=1) for level_A4 in anchors])
    levels_M: NDArray[np.int64] = best_LM.argmax(dim=0).numpy()
    return levels_M


def shares_by_range(weights_NLE: NDArray[np.float64], levels_M: NDArray[np.int64], canvases: CanvasSet) -> list[list[float]]:
    """Of the objects of every range, the mean weight of each expert, [3][E]; zeros for a range without objects."""
    weights_ME = weights_NLE[canvases.canvases_M, levels_M]
    rows = [weights_ME[canvases.ranges_M == number] for number in range(len(RANGES))]
    return [(row.mean(axis=0) if len(row) else np.zeros(weights_ME.shape[1])).tolist() for row in rows]


def shares_by_level(weights_NLE: NDArray[np.float64]) -> list[list[float]]:
    """Of the maps of every level, the mean weight of each expert, [L][E]."""
    shares: list[list[float]] = weights_NLE.mean(axis=0).tolist()
    return shares
