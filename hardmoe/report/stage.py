"""Declaration of the `report` stage."""

from collections.abc import Mapping, Sequence

from hardmoe.artifacts.names import LIMITS, TRANSFER
from hardmoe.config import Json
from hardmoe.stage import Stage

_LEFT_OUT = (
    "features",
    "baselines/random/partition",
    "topk/nearest",
    "all_experts/nearest",
    "abstention/nearest",
    "probe",
    LIMITS,
)


def report_stage(recipe: Mapping[str, Json], stages: Sequence[Stage]) -> Stage:
    """The data of the report page, from everything that was built; `recipe` is its identity, shown on the page."""
    shown = [stage.name for stage in stages if not stage.name.startswith(TRANSFER)]  # the evaluation says what came of it
    names = [name for name in shown if name not in _LEFT_OUT and not name.endswith("embeddings")]
    return Stage(
        name="report",
        kind="report",
        version=3,
        config={"recipe": dict(recipe)},
        inputs={name: name for name in names},
        work="hardmoe.report.collect:ReportWork",
    )
