"""Which stages can begin: the part of the stage graph between what exists and what cannot be reached any more.

Every event costs as much as the stages it touches and no more, so a thousand experts are not looked at whenever one of ten
thousand feature shards is done. Rejected: going through all stages again after every unit, which was quadratic.
"""

from collections.abc import Collection, Sequence

from hardmoe.stage import Stage


class Frontier:
    """The state of every stage that has no artifact yet."""

    def __init__(self, stages: Sequence[Stage], finished: Collection[str]) -> None:
        missing = [stage for stage in stages if stage.name not in finished]
        self._missing_inputs = {stage.name: {n for n in stage.inputs.values() if n not in finished} for stage in missing}
        self._dependents: dict[str, list[Stage]] = {stage.name: [] for stage in missing}
        for stage in missing:
            for name in self._missing_inputs[stage.name]:
                self._dependents[name].append(stage)
        self._open = set(self._dependents)
        self._failed: set[str] = set()
        self._ready = {stage.name: stage for stage in missing if not self._missing_inputs[stage.name]}

    @property
    def open(self) -> bool:
        """Whether anything can still be finished: a stage neither built, failed, nor standing on a failed one."""
        return bool(self._open)

    @property
    def ready(self) -> Collection[Stage]:
        """Stages whose inputs exist and which were not begun, in the order in which they became so."""
        return self._ready.values()

    def failed(self, name: str) -> bool:
        """Whether the stage itself failed."""
        return name in self._failed

    def begin(self, stage: Stage) -> None:
        """The stage is being built, or waits for a slot."""
        self._ready.pop(stage.name, None)

    def put_back(self, stage: Stage) -> None:
        """The stage was not begun after all."""
        self._ready[stage.name] = stage

    def finish(self, stage: Stage) -> None:
        """The stage's artifact exists."""
        self._ready.pop(stage.name, None)
        self._open.discard(stage.name)
        for dependent in self._dependents[stage.name]:
            waits_for = self._missing_inputs[dependent.name]
            waits_for.discard(stage.name)
            if not waits_for and dependent.name in self._open:
                self._ready[dependent.name] = dependent

    def fail(self, name: str) -> None:
        """The stage failed; neither it nor what stands on it can be finished."""
        self._failed.add(name)
        self._ready.pop(name, None)
        unreachable = [name]
        while unreachable:
            blocked = unreachable.pop()
            if blocked in self._open:
                self._open.remove(blocked)
                unreachable += [stage.name for stage in self._dependents[blocked]]
