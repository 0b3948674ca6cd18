"""Declarations of the stages that advise and build nothing that others stand on: the sweep over K, the check for drift.

Each number of parts is an artifact of its own, named after everything else that decides it. So a sweep over other numbers
does only those that are new, other settings lie beside the first ones, and neither is ever refused as drifted. Rejected: one
artifact for a whole list, which fits every K again for one more, and a fixed name, which can hold one setting.
"""

from collections.abc import Mapping, Sequence

from hardmoe.artifacts.fingerprint import digest
from hardmoe.config import Json
from hardmoe.partitioning.config import PartitionConfig
from hardmoe.stage import Stage

SWEEP = "sweep"
"""Directory of the sweeps' artifacts, and of their page."""
CHECKS = "checks"
"""Directory of the checks' artifacts: a directory of them for each dataset checked."""

_SAMPLE_VERSION = 1
_SWEEP_VERSION = 2
_KEY_LENGTH = 8

_OF_THE_SAMPLE = ("sample_size", "transform", "components")
"""Keys that decide what is drawn."""
_OF_THE_FITS = (*_OF_THE_SAMPLE, "restarts", "max_passes", "tolerance", "spherical")
"""Keys that decide what is fitted to it."""


def sweep_stages(config: PartitionConfig, counts: Sequence[int], num_seeds: int, seed: int) -> list[Stage]:
    """The sample, then a stage for every number of parts.

    Args:
        config: the recipe's section; how many experts it asks for, and by which method, does not matter.
        counts: the numbers of parts.
        num_seeds: so many fits of each.
        seed: the recipe's seed.
    """
    drawn = {"partition": _settings(config, _OF_THE_SAMPLE), "seed": seed}
    sample = Stage(
        name=f"{SWEEP}/sample-{_key(drawn, _SAMPLE_VERSION)}",
        kind="sweep-sample",
        version=_SAMPLE_VERSION,
        config=drawn,
        operational={"largest": max(counts)},
        inputs={"features": "features", "vocabulary": "vocabulary"},
        work="hardmoe.partitioning.sweep_sample:SampleWork",
    )
    common = {"partition": _settings(config, _OF_THE_FITS), "seeds": num_seeds, "seed": seed}
    key = _key(common, _SWEEP_VERSION)
    return [sample, *(_sweep_stage(f"{SWEEP}/k-{count:04d}-{key}", count, common, sample.name) for count in counts)]


def _settings(config: PartitionConfig, names: Sequence[str]) -> dict[str, Json]:
    """What the recipe says of these keys; of those that came later, nothing while they have their default."""
    return {name: value for name, value in config.identity().items() if name in names}


def _sweep_stage(name: str, count: int, common: Mapping[str, Json], sample: str) -> Stage:
    return Stage(
        name=name,
        kind="sweep",
        version=_SWEEP_VERSION,
        config={**common, "parts": count},
        inputs={"sample": sample, "vocabulary": "vocabulary"},
        work="hardmoe.partitioning.sweep:SweepWork",
    )


def drift_stage(place: str) -> Stage:
    """Another dataset, whose features are in `place`, routed and held against this run's training examples."""
    return Stage(
        name=f"{place}/drift",
        kind="drift",
        version=1,
        config={},
        inputs={"features": f"{place}/features", "router": "router", "partition": "partition"},
        work="hardmoe.partitioning.drift:DriftWork",
    )


def _key(config: Mapping[str, Json], version: int) -> str:
    return digest({"config": dict(config), "version": version})[:_KEY_LENGTH]
