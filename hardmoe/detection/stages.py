"""Declaration of a detection run: the set, a training per detector, the judgement. Pure data.

detection_set ──> detectors/baseline ──> detectors/dense, detectors/regression, … ──> detection
"""

from hardmoe.config import Json
from hardmoe.detection.config import BASELINE, DetectionConfig
from hardmoe.stage import Resources, Stage

SET, DETECTION = "detection_set", "detection"


def detector_name(system: str) -> str:
    """The artifact of a system."""
    return f"detectors/{system}"


def detection_stages(config: DetectionConfig, source_sha256: str) -> list[Stage]:
    """All stages of a run, in an order in which they can be built.

    Args:
        config: the file.
        source_sha256: identity of the source's files.
    """
    canvases = config.canvases.identity()
    stages = [
        Stage(
            name=SET,
            kind=SET,
            version=1,
            config={
                "canvases": canvases,
                "dataset": config.dataset.identity(),
                "source": {"sha256": source_sha256},
                "seed": config.seed,
            },
            operational={"dataset": config.dataset.operational_values()},
            work="hardmoe.detection.set_work:SetWork",
        )
    ]
    stages += [_detector(config, system) for system in config.systems]
    stages.append(
        Stage(
            name=DETECTION,
            kind=DETECTION,
            version=1,
            config={"systems": config.systems, "sizes": canvases["sizes"], "replicates": config.bootstrap_replicates},
            inputs={"set": SET, **{system: detector_name(system) for system in config.systems}},
            work="hardmoe.detection.judge_work:JudgeWork",
        )
    )
    return stages


def _detector(config: DetectionConfig, system: str) -> Stage:
    is_first = system == BASELINE
    section, fit = ("baseline", config.baseline) if is_first else ("heads", config.heads)
    identity: dict[str, Json] = fit.identity()
    # What other systems there are is nothing to this one, and a dense one has no experts.
    for key in ("systems", *(["moe"] if system == "dense" else [])):
        identity.pop(key, None)
    return Stage(
        name=detector_name(system),
        kind="detector",
        version=1,
        config={"system": system, section: identity, "detector": config.detector.identity(), "seed": config.seed},
        inputs={"set": SET} if is_first else {"set": SET, BASELINE: detector_name(BASELINE)},
        operational={section: fit.operational_values()},
        work="hardmoe.detection.fit_work:FitWork",
        resources=Resources(num_cpus=fit.num_threads),
    )
