"""The run's measures through Ray's own exporter, which every node of a cluster runs for Prometheus."""

from collections.abc import Mapping
from typing import Any

from hardmoe.execution.measures import DESCRIPTIONS, TOTAL, Measure

_LABEL = "artifacts"


class Exporter:
    """Hands measures over to Ray; needs a Ray that is up."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter, Gauge

        kinds = {name: Counter if name.endswith(TOTAL) else Gauge for name in DESCRIPTIONS}
        self._metrics: dict[str, Any] = {
            name: kind(name, description=DESCRIPTIONS[name], tag_keys=(_LABEL,)) for name, kind in kinds.items()
        }
        self._told: dict[Measure, float] = {}

    def publish(self, measures: Mapping[Measure, float]) -> None:
        """Gauges as they are; of counters, which Ray adds up itself, what came since the last time."""
        for measure, value in measures.items():
            metric, labels = self._metrics[measure.name], {_LABEL: measure.family}
            if not measure.name.endswith(TOTAL):
                metric.set(value, tags=labels)
            elif (more := value - self._told.get(measure, 0.0)) > 0:
                metric.inc(more, tags=labels)
            self._told[measure] = value
