"""What a recipe's stages look like in a root: what exists is held against the recipe before anything is started.

An artifact of another recipe, or one that stands on an input built anew since, is refused by name, with the fields that
differ and the remedies. Rejected: rebuilding such artifacts by themselves, which turns a typing mistake into a lost week.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hardmoe.artifacts.fingerprint import differences, fingerprint
from hardmoe.artifacts.store import Artifact, ArtifactStore
from hardmoe.errors import DriftError, RebuiltInputError
from hardmoe.stage import Stage


@dataclass
class Plan:
    """The stages of a recipe and what a root has of them."""

    stages: Sequence[Stage]
    fingerprints: Mapping[str, str]
    artifacts: dict[str, Artifact]

    @property
    def missing(self) -> list[Stage]:
        """Stages without a record, inputs before what stands on them."""
        return [stage for stage in self.stages if stage.name not in self.artifacts]

    def heights(self) -> dict[str, int]:
        """By name, how many stages the longest chain from a stage to the end of the plan has."""
        heights = {stage.name: 1 for stage in self.stages}
        for stage in reversed(self.stages):
            for name in stage.inputs.values():
                heights[name] = max(heights[name], heights[stage.name] + 1)
        return heights


def make_plan(store: ArtifactStore, stages: Sequence[Stage]) -> Plan:
    """Hold every artifact against its stage.

    Args:
        store: the root.
        stages: all stages of the recipe, inputs first.

    Raises:
        DriftError: an artifact was built from another recipe; names the fields and the remedies.
        RebuiltInputError: an artifact's input was built again since, with other bytes.
    """
    fingerprints: dict[str, str] = {}
    for stage in stages:
        fingerprints[stage.name] = fingerprint(stage, {role: fingerprints[name] for role, name in stage.inputs.items()})
    plan = Plan(stages, fingerprints, {})
    for stage in stages:
        if (artifact := find_built(store, plan, stage)) is not None:
            plan.artifacts[stage.name] = artifact
    check_inputs(store, plan)
    return plan


def find_built(store: ArtifactStore, plan: Plan, stage: Stage) -> Artifact | None:
    """A stage's artifact, if it is there.

    Raises:
        DriftError: it was built from another recipe.
    """
    artifact = store.find(stage.name)
    if artifact is not None and artifact.record.fingerprint != plan.fingerprints[stage.name]:
        raise DriftError(_drift(store, plan, stage, artifact))
    return artifact


def check_inputs(store: ArtifactStore, plan: Plan) -> None:
    """Make sure that every artifact stands on the very inputs that are there now.

    Raises:
        RebuiltInputError: one does not.
    """
    for stage in plan.stages:
        artifact = plan.artifacts.get(stage.name)
        if artifact is None:
            continue
        for role, name in stage.inputs.items():
            there = plan.artifacts.get(name)
            if there is not None and there.record_digest != artifact.record.inputs[role].record:
                raise RebuiltInputError(
                    f"{store.storage.where(stage.name)} stands on an earlier '{name}' (built anew since, other bytes); "
                    f"delete {store.storage.where(stage.name)} and what stands on it, then run again"
                )


def _drift(store: ArtifactStore, plan: Plan, stage: Stage, artifact: Artifact) -> str:
    record = artifact.record
    recorded = {**record.config, "stage version": record.version}
    rows = differences(recorded, {**stage.config, "stage version": stage.version})
    for role, name in stage.inputs.items():
        reference = record.inputs.get(role)
        if not rows and (reference is None or reference.fingerprint != plan.fingerprints[name]):
            rows.append(f"its input '{name}' was built from another recipe")
    changed = "; ".join(rows) or "its inputs differ"
    return (
        f"{store.storage.where(stage.name)} was built from another recipe ({changed}); either put the recipe back, or give a new "
        f"'root' with 'reuse: [{store.storage.uri}]', which takes over every artifact that is still the same"
    )
