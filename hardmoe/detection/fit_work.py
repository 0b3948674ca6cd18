"""The code of a detector's stage: one unit that builds it, trains it and writes its weights."""

import json
from collections.abc import Generator
from typing import Any

import safetensors.torch

from hardmoe.config import Json
from hardmoe.detection.canvas_files import read_canvases
from hardmoe.detection.config import BASELINE, HEADS_WITH_EXPERTS, DetectorConfig, FitConfig, HeadsConfig
from hardmoe.detection.fit import Fit, describe, fit_detector
from hardmoe.errors import CorruptFileError
from hardmoe.hashing import derive_seed
from hardmoe.models.moe.config import MoeConfig
from hardmoe.models.moe.networks.retinanet import Detector, DetectorPlan, build_detector, give_experts
from hardmoe.stage import Completion, DriverContext, Finished, InputArtifact, Phase, Unit, UnitContext
from hardmoe.storage import join
from hardmoe.training.checkpoint import Checkpoints, host_copy
from hardmoe.training.determinism import deterministic
from hardmoe.training.network import unit_device

WEIGHTS, LOSSES = "weights.safetensors", "losses.json"


class FitWork:
    """See the module."""

    def phases(self, context: DriverContext) -> Generator[Phase, list[Completion], Finished]:
        """A single unit."""
        (done,) = yield Phase("train", [Unit(context.stage.config["system"])])
        return Finished(done.payload)

    def run(self, context: UnitContext) -> Json:
        """Train."""
        config, system, device = context.stage.config, context.stage.config["system"], unit_device(context)
        plan = plan_of(config["detector"], context.input("set"))
        fit_config: FitConfig
        if system == BASELINE:
            fit_config = context.stage.section(FitConfig, "baseline")
            detector = build_detector(plan, derive_seed(config["seed"], "detector"))
        else:
            heads = context.stage.section(HeadsConfig, "heads")
            fit_config = heads
            detector = load_detector(context.input(BASELINE), context.input("set"))
            give_experts(detector, HEADS_WITH_EXPERTS.get(system, ()), heads.moe, derive_seed(config["seed"], "gate"))
            detector.freeze_backbone()
        fit = Fit(detector, read_canvases(context.input("set"), "train"), fit_config, derive_seed(config["seed"], "fit"), device)
        with deterministic(fit_config.num_threads, device):
            rows = fit_detector(fit, context, Checkpoints(context.storage, join(context.checkpoint_prefix, system)))
        told = {"detector": config["detector"], "system": system, "moe": config.get("heads", {}).get("moe", {})}
        tensors = {name: host_copy(tensor) for name, tensor in detector.state_dict().items()}
        with context.output(WEIGHTS) as sink:
            sink.write(safetensors.torch.save(tensors))
        with context.output(LOSSES) as sink:
            sink.write(json.dumps(rows).encode())
        return {**describe(detector, fit, rows), **told}


def plan_of(detector: Json, canvases: InputArtifact) -> DetectorPlan:
    """The shape of a detector for a set."""
    config: DetectorConfig = DetectorConfig.model_validate(detector)
    drawn = canvases.payload
    return DetectorPlan(len(drawn["classes"]), drawn["size"], config.width, config.channels, config.depth)


def load_detector(artifact: InputArtifact, canvases: InputArtifact) -> Detector:
    """A finished detector, in evaluation mode.

    Raises:
        CorruptFileError: the weights are not of such a detector.
    """
    told: Any = artifact.payload
    detector = build_detector(plan_of(told["detector"], canvases), seed=0)
    give_experts(detector, HEADS_WITH_EXPERTS.get(told["system"], ()), MoeConfig.model_validate(told["moe"]), seed=0)
    path = artifact.path(WEIGHTS)
    try:
        detector.load_state_dict(safetensors.torch.load(artifact.read(WEIGHTS)))
    except RuntimeError as error:
        raise CorruptFileError(
            f"{artifact.storage.where(path)} holds the weights of another detector; delete it and run again"
        ) from error
    detector.eval()
    return detector
