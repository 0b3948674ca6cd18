"""What a monitoring system is told of a run: a few numbers for each family of artifacts, told by the driver alone.

The driver knows all of it anyway (completions it takes in, and what running units leave in the root), so workers need no
connection of their own, and a run has a few dozen series however many units and experts it has. The backend says where they
go: Ray's exporter, under these names with `ray_` before them. Rejected: a label for every artifact, which is a thousand series
each for a thousand experts, most of them of artifacts that ended long ago; a second exporter beside Ray's.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from hardmoe.config import Json

TOTAL = "_total"
"""How a counter's name ends; the others are gauges."""
DESCRIPTIONS = {
    "hardmoe_units_done_total": "Units completed by this driver.",
    "hardmoe_units_again_total": "Units handed over again after a lost worker, or from a checkpoint after making room.",
    "hardmoe_units_failed_total": "Units, or the driver's part of an artifact, that failed for good.",
    "hardmoe_bytes_stored_total": "Bytes of the files of completed units.",
    "hardmoe_units_running": "Units handed over and not yet complete.",
    "hardmoe_examples_per_second": "Images per second of all running units together, as they say it themselves.",
    "hardmoe_progress_lag_seconds": "Seconds since the running unit that has been silent longest was last heard of.",
}


@dataclass(frozen=True)
class Measure:
    """A name of `DESCRIPTIONS`, and the family of artifacts: `dataset`, `experts`, `baselines`."""

    name: str
    family: str


class Measures:
    """Collects them; counters since this driver began, gauges as they are now."""

    def __init__(self) -> None:
        self._values: dict[Measure, float] = defaultdict(float)

    def count(self, name: str, artifact: str, by: float = 1.0) -> None:
        """Add to a counter."""
        self._values[Measure(name, family_of(artifact))] += by

    def look(self, running: Iterable[tuple[str, Mapping[str, Json] | None]]) -> None:
        """Set all gauges.

        Args:
            running: of every unit at work its artifact, and what it last said, if it has said anything.
        """
        for measure in self._values:
            if not measure.name.endswith(TOTAL):
                self._values[measure] = 0.0
        moment = datetime.now(UTC)
        for artifact, said in running:
            family = family_of(artifact)
            self._values[Measure("hardmoe_units_running", family)] += 1
            if said is None:
                continue
            rate, lag = Measure("hardmoe_examples_per_second", family), Measure("hardmoe_progress_lag_seconds", family)
            self._values[rate] += float(said["values"].get("examples/s", 0.0))
            silent = (moment - datetime.fromisoformat(said["updated"])).total_seconds()
            self._values[lag] = max(self._values[lag], silent)

    def values(self) -> Mapping[Measure, float]:
        """All of them as they are now."""
        return dict(self._values)


def family_of(artifact: str) -> str:
    """`experts` of `experts/expert-0007`."""
    return artifact.partition("/")[0]
