"""The code of the last stage: a unit per detector judges it; the finish compares them, and keeps what the page shows.

Shape letters: N canvases, R rows of the bootstrap.
"""

import base64
import io
import json
from collections.abc import Generator, Mapping

import numpy as np
from numpy.typing import NDArray

from hardmoe.config import Json
from hardmoe.data.images import encode_png
from hardmoe.detection.average_precision import Detections, bounds_of, mean_average_precision
from hardmoe.detection.canvas_files import CanvasSet, read_canvases
from hardmoe.detection.config import BASELINE, DENSE, RANGES
from hardmoe.detection.fit_work import load_detector
from hardmoe.detection.judging import Judged, judge, levels_of, shares_by_level, shares_by_range
from hardmoe.evaluation.bootstrap import interval_result, paired_result, poisson_weights
from hardmoe.hashing import number_ids
from hardmoe.models.moe.networks.retinanet import Detector
from hardmoe.stage import Completion, Context, DriverContext, Finished, Phase, Unit, UnitContext
from hardmoe.training.determinism import deterministic
from hardmoe.training.network import unit_device

RESULTS = "results.json"
ALL = "all"
NUM_SHOWN = 12
SURE = 0.4
"""Detections are drawn on the page from this score on."""
_SEED = 0


class JudgeWork:
    """See the module."""

    def phases(self, context: DriverContext) -> Generator[Phase, list[Completion], Finished]:
        """Every detector."""
        systems = context.stage.config["systems"]
        done = yield Phase("judge", [Unit(system) for system in systems])
        found = {system: each.payload for system, each in zip(systems, done, strict=True)}
        values = {system: _stored(context, each) for system, each in zip(systems, done, strict=True)}
        differences = {
            f"{system} - {DENSE}": {
                name: paired_result(values[system][name], values[DENSE][name], centred=True) for name in names()
            }
            for system in systems
            if system not in (BASELINE, DENSE)
        }
        results = {
            "set": context.input("set").payload,
            "sizes": context.stage.config["sizes"],
            "systems": {system: {key: told[key] for key in ("ap", "experts", "training")} for system, told in found.items()},
            "differences": differences,
            "shown": {system: told["shown"] for system, told in found.items()},
            "canvases": found[BASELINE]["canvases"],
        }
        ap = {system: told["ap"][ALL]["value"] for system, told in found.items()}
        return Finished({"ap50": ap}, {RESULTS: json.dumps(results, indent=1).encode()})

    def run(self, context: UnitContext) -> Json:
        """One detector."""
        system, canvases, device = context.unit.name, read_canvases(context.input("set"), "test"), unit_device(context)
        with deterministic(1, device):
            detector = load_detector(context.input(system), context.input("set"))
            judged = judge(detector, canvases, device)
        values = precision_values(judged.detections, canvases, context.stage.config["sizes"], context.stage.config["replicates"])
        buffer = io.BytesIO()
        np.save(buffer, np.stack([values[name] for name in names()]), allow_pickle=False)
        with context.scratch("values") as sink:
            sink.write(buffer.getvalue())
        training = {
            key: context.input(system).payload[key] for key in ("steps", "canvases_seen", "parameters", "trained_parameters")
        }
        return {
            "ap": {name: interval_result(each, centred=True) for name, each in values.items()},
            "experts": _expert_facts(detector, judged, canvases),
            "training": training,
            "shown": _shown_detections(judged.detections),
            "canvases": _shown_canvases(canvases) if system == BASELINE else [],
        }


def names() -> tuple[str, ...]:
    """What average precision is told for."""
    return (ALL, *RANGES)


def precision_values(
    found: Detections, canvases: CanvasSet, sizes: list[list[int]], num_replicates: int
) -> Mapping[str, NDArray[np.float64]]:
    """Average precision at an overlap of 0.5 in every row of the bootstrap, by `names()`, float64 [R] each."""
    there = Detections(canvases.boxes_M4, canvases.classes_M, canvases.canvases_M, np.zeros(len(canvases.classes_M), np.float32))
    weights_NR = np.ones((len(canvases), 1 + num_replicates))
    weights_NR[:, 1:] = poisson_weights(number_ids(len(canvases)), num_replicates, _SEED).T
    ranges = [(0.0, float("inf")), *bounds_of(sizes)]
    return {name: mean_average_precision(found, there, within, weights_NR) for name, within in zip(names(), ranges, strict=True)}


def _stored(context: Context, done: Completion) -> dict[str, NDArray[np.float64]]:
    rows = np.load(io.BytesIO(context.storage.read_bytes(done.scratch["values"])), allow_pickle=False)
    return dict(zip(names(), rows, strict=True))


def _expert_facts(detector: Detector, judged: Judged, canvases: CanvasSet) -> dict[str, Json]:
    levels_M = levels_of(detector.cpu().anchors(), canvases.boxes_M4)
    return {
        head: {
            "by_range": shares_by_range(weights_NLE, levels_M, canvases),
            "by_level": shares_by_level(weights_NLE),
            "usage": judged.usages[head],
        }
        for head, weights_NLE in judged.weights_NLE.items()
    }


def _shown_detections(found: Detections) -> list[list[Json]]:
    """Of the first canvases the sure detections: box, class, score."""
    shown: list[list[Json]] = []
    for number in range(NUM_SHOWN):
        rows = np.flatnonzero((found.canvases_D == number) & (found.scores_D >= SURE))
        shown.append(
            [
                {
                    "box": [round(float(x), 1) for x in found.boxes_D4[row]],
                    "class": int(found.classes_D[row]),
                    "score": round(float(found.scores_D[row]), 3),
                }
                for row in rows
            ]
        )
    return shown


def _shown_canvases(canvases: CanvasSet) -> list[Json]:
    """The first canvases with their objects."""
    shown = []
    for number in range(min(NUM_SHOWN, len(canvases))):
        rows = canvases.objects(number)
        encoded = base64.b64encode(encode_png(canvases.images_NSS3[number])).decode()
        objects = zip(canvases.boxes_M4[rows].tolist(), canvases.classes_M[rows].tolist(), strict=True)
        shown.append(
            {"image": f"data:image/png;base64,{encoded}", "objects": [{"box": box, "class": tag} for box, tag in objects]}
        )
    return shown
