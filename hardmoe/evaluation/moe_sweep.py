"""Declaration of the sweep over k and capacity: one network, or one mixture's experts, judged with other limits than it has.

A stage per system and setting, beside what the recipe asks for, so that settings once judged are not judged again.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from hardmoe.config import Json
from hardmoe.evaluation.config import EvaluationConfig
from hardmoe.stage import Resources, Stage

MOE_SWEEP = "moe_sweep"


@dataclass(frozen=True)
class Setting:
    """Limits in use; what is None stays as the network has it."""

    k: int | None = None
    capacity_factor: float | None = None
    """0 for no limit."""
    priority: bool | None = None


@dataclass(frozen=True)
class Swept:
    """Networks with layers of experts that are judged together, each with its own decoder."""

    system: str
    networks: tuple[str, ...]
    examples: str
    """The dataset, which one network sees whole, or the partition, of which each network sees its own part."""
    partitioned: bool = False


def moe_sweep_stage(config: EvaluationConfig, swept: Swept, setting: Setting) -> Stage:
    """One system with one setting over the test split."""
    told: Json = {"setting": asdict(setting), "networks": len(swept.networks), "partitioned": swept.partitioned}
    told |= {"replicates": config.bootstrap_replicates}
    key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]
    inputs = {"examples": swept.examples, "vocabulary": "vocabulary"}
    inputs |= {f"network-{index:04d}": name for index, name in enumerate(swept.networks)}
    return Stage(
        name=f"{MOE_SWEEP}/{swept.system}-{key}",
        kind="moe-sweep",
        version=1,
        config=told,
        inputs=inputs,
        work="hardmoe.evaluation.moe_sweep_work:MoeSweepWork",
        resources=Resources(num_cpus=1, num_gpus=None),
    )


def settings_of(counts: Sequence[int], factors: Sequence[float], priority: bool | None) -> list[Setting]:
    """All pairs; of what is empty, the network's own."""
    all_counts: list[int | None] = [*counts] or [None]
    all_factors: list[float | None] = [*factors] or [None]
    return [Setting(k, factor, priority) for k in all_counts for factor in all_factors]
