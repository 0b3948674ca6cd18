"""Declaration of the bulk stages: `predictions` and `embeddings`, artifacts of a root of their own. Pure data.

The mixture is no input but a digest and a place: it lies in another root, which may be read-only and is used for many outputs.
Rejected: artifacts in the run's own root, where the predictions of every collection would stay for ever.
"""

from dataclasses import dataclass
from typing import Literal

from hardmoe.config import Json
from hardmoe.data.config import DatasetConfig
from hardmoe.stage import Resources, Stage

PREDICTIONS, EMBEDDINGS = "predictions", "embeddings"
Format = Literal["parquet", "jsonl"]
FORMATS: tuple[Format, ...] = ("parquet", "jsonl")


@dataclass(frozen=True)
class BulkRequest:
    """What is asked of which mixture."""

    root: str
    """Of the mixture's run."""
    mixture: str
    """`Mixture.identity()`."""
    k: int | None
    """How many tags; None for embeddings."""
    format: Format = "parquet"
    coverage: float | None = None
    """As `UseOptions.coverage`."""
    memory_gib: float | None = None
    """What experts may take in each worker."""

    @property
    def name(self) -> str:
        """The artifact's."""
        return EMBEDDINGS if self.k is None else PREDICTIONS


def bulk_stage(request: BulkRequest, dataset: DatasetConfig, source_sha256: str, num_threads: int = 1) -> Stage:
    """The stage that answers a request for every image of a source."""
    asked: dict[str, Json] = {"format": request.format} | ({} if request.k is None else {"k": request.k})
    asked |= {} if request.coverage is None else {"coverage": request.coverage}
    return Stage(
        name=request.name,
        kind=request.name,
        version=1,
        config={"asked": asked, "mixture": request.mixture, "dataset": dataset.identity(), "source": {"sha256": source_sha256}},
        operational={"dataset": dataset.operational_values(), "root": request.root, "memory_gib": request.memory_gib},
        work="hardmoe.bulk.work:BulkWork",
        resources=Resources(num_cpus=num_threads, num_gpus=None),
    )
