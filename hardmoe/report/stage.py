"""Declaration of the `report` stage."""

from collections.abc import Mapping, Sequence

from hardmoe.config import Json
from hardmoe.stage import Stage

_LEFT_OUT = (
    "features",
    "embeddings",
    "baselines/dense_embeddings",
    "baselines/random/embeddings",
    "baselines/random/partition",
    "topk/nearest",
    "topk/embeddings",
)


def report_stage(recipe: Mapping[str, Json], stages: Sequence[Stage]) -> Stage:
    """The data of the report page, from everything that was built; `recipe` is its identity, shown on the page."""
    inputs = {stage.name: stage.name for stage in stages if stage.name not in _LEFT_OUT}
    return Stage(
        name="report",
        kind="report",
        version=2,
        config={"recipe": dict(recipe)},
        inputs=inputs,
        work="hardmoe.report.collect:ReportWork",
    )
