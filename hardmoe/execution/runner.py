"""The durable workflow: from stages to artifacts, through kills, failures and other drivers on the same root.

First everything that exists is held against the recipe, and nothing is started if anything drifted or nothing is missing.
Then one loop: start the stages whose inputs exist and whose lease can be had, keep the backend's slots filled (first what has
the longest chain of stages behind it, then the longest unit), take completions in, commit. A failed unit stops its own
artifact and what stands on it; the others go on, and the failures are told together at the end. Rejected: an executor per
stage, which cannot fill idle slots with another expert's units, and recursion over dependencies, which hides what runs at the
same time.
"""

import contextlib
import heapq
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from hardmoe.artifacts.fingerprint import differences, fingerprint
from hardmoe.artifacts.lease import Holder, Lease, LeaseObserver
from hardmoe.artifacts.provenance import describe, now
from hardmoe.artifacts.store import Artifact, ArtifactStore
from hardmoe.errors import DriftError, HardmoeError, RebuiltInputError, UnitsFailedError
from hardmoe.execution.backend import Backend
from hardmoe.execution.build import Build
from hardmoe.execution.progress import Reporter
from hardmoe.execution.task import UnitOutcome, UnitTask
from hardmoe.stage import Stage

_QUEUED_BEYOND_SLOTS = 1
_WAIT_SECONDS = 0.2
_LEASE_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class RunnerOptions:
    """How to run: limits and other roots to take artifacts from."""

    parallel: int | None = None
    attempts: int = 3
    reuse: Sequence[str] = ()


@dataclass
class Plan:
    """What a recipe's stages look like in a root before anything runs."""

    stages: Sequence[Stage]
    fingerprints: Mapping[str, str]
    artifacts: dict[str, Artifact]

    @property
    def missing(self) -> list[Stage]:
        """Stages without a record, inputs before what stands on them."""
        return [stage for stage in self.stages if stage.name not in self.artifacts]

    def heights(self) -> dict[str, int]:
        """How many stages the longest chain from each stage to the end of the plan has."""
        heights = {stage.name: 1 for stage in self.stages}
        for stage in reversed(self.stages):
            for name in stage.inputs.values():
                heights[name] = max(heights.get(name, 1), heights[stage.name] + 1)
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
    artifacts: dict[str, Artifact] = {}
    for stage in stages:
        fingerprints[stage.name] = fingerprint(stage, {role: fingerprints[name] for role, name in stage.inputs.items()})
        if (artifact := store.find(stage.name)) is not None:
            if artifact.record.fingerprint != fingerprints[stage.name]:
                raise DriftError(_drift(store, stage, artifact, fingerprints))
            artifacts[stage.name] = artifact
    plan = Plan(stages, fingerprints, artifacts)
    check_inputs(store, plan)
    return plan


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
            if there is not None and there.record.digest() != artifact.record.inputs[role].record:
                raise RebuiltInputError(
                    f"{store.storage.uri}/{stage.name} stands on an earlier '{name}' (built anew since, other bytes); "
                    f"delete {store.storage.uri}/{stage.name} and what stands on it, then run again"
                )


def _drift(store: ArtifactStore, stage: Stage, artifact: Artifact, fingerprints: Mapping[str, str]) -> str:
    record = artifact.record
    recorded = {**record.config, "stage version": record.version}
    rows = differences(recorded, {**stage.config, "stage version": stage.version})
    for role, name in stage.inputs.items():
        reference = record.inputs.get(role)
        if not rows and (reference is None or reference.fingerprint != fingerprints[name]):
            rows.append(f"its input '{name}' was built from another recipe")
    changed = "; ".join(rows) or "its inputs differ"
    return (
        f"{store.storage.uri}/{stage.name} was built from another recipe ({changed}); either put the recipe back, or give a new "
        f"'root' with 'reuse: [{store.storage.uri}]', which takes over every artifact that is still the same"
    )


@dataclass(frozen=True)
class Failure:
    """A unit, or the driver's part of a stage, that failed for good."""

    label: str
    sentence: str
    error: HardmoeError | None = None


@dataclass(order=True)
class _Queued:
    """A task in the queue: those with the longest chain of stages behind them first, then the most costly, then in order."""

    rank: tuple[int, float, int]
    task: UnitTask = field(compare=False)


class Runner:
    """Builds the missing artifacts of a plan."""

    def __init__(
        self, store: ArtifactStore, make_backend: Callable[[], Backend], reporter: Reporter, options: RunnerOptions
    ) -> None:
        self._store = store
        self._make_backend = make_backend
        self._reporter = reporter
        self._options = options
        self._observer = LeaseObserver(store.storage)
        self._backend: Backend | None = None
        self._builds: dict[str, Build] = {}
        self._waiting: dict[str, Holder] = {}
        self._failed: dict[str, Failure] = {}
        self._failures: list[Failure] = []
        self._queue: list[_Queued] = []
        self._in_flight: dict[tuple[str, str, str], UnitTask] = {}
        self._losses: dict[tuple[str, str, str], tuple[int, str]] = {}
        self._order = itertools.count()
        self._heights: Mapping[str, int] = {}
        self._next_poll = 0.0

    def run(self, plan: Plan) -> None:
        """Build what is missing.

        Raises:
            UnitsFailedError: some units failed for good; the rest was built.
            HardmoeError: the driver's part of a stage failed (bad data, a full disk, a lost lease).
        """
        self._heights = plan.heights()
        with self._reporter:
            try:
                while self._open_stages(plan):
                    self._start_ready(plan)
                    self._submit(plan)
                    self._receive()
                    self._commit_finished(plan)
                    self._reporter.tick(self._builds, self._in_flight.values())
            finally:
                self._close()
        if self._failures:
            raise self._summary()
        check_inputs(self._store, plan)

    def _open_stages(self, plan: Plan) -> bool:
        """Whether anything can still happen: a stage neither built, failed, nor standing on a failed one."""
        blocked = set(self._failed)
        for stage in plan.stages:
            if any(name in blocked for name in stage.inputs.values()):
                blocked.add(stage.name)
        # A failed artifact's other units go on to their completions, so that the next run does only what is missing.
        return bool(self._in_flight or self._queue) or any(stage.name not in blocked for stage in plan.missing)

    def _start_ready(self, plan: Plan) -> None:
        poll = time.monotonic() >= self._next_poll
        for stage in plan.missing:
            ready = all(name in plan.artifacts for name in stage.inputs.values())
            if (
                not ready
                or stage.name in self._builds
                or stage.name in self._failed
                or (stage.name in self._waiting and not poll)
            ):
                continue
            inputs = {role: plan.artifacts[name] for role, name in stage.inputs.items()}
            # Another driver may have finished it since, here or in a root that this run may take from.
            found = self._store.find(stage.name) or self._reused(stage, plan, inputs)
            if found is not None:
                plan.artifacts[stage.name] = found
                self._waiting.pop(stage.name, None)
                continue
            lease = self._observer.acquire(stage.name)
            if isinstance(lease, Lease):
                self._waiting.pop(stage.name, None)
                self._start(stage, plan, inputs, lease)
            elif stage.name not in self._waiting:
                self._waiting[stage.name] = lease
                self._reporter.say(f"{stage.name}: being built by {lease}; waiting for it")
        if poll:
            self._next_poll = time.monotonic() + _LEASE_POLL_SECONDS

    def _reused(self, stage: Stage, plan: Plan, inputs: Mapping[str, Artifact]) -> Artifact | None:
        provenance = describe(now(), 0.0, reused=True)
        found = self._store.reuse(stage.name, plan.fingerprints[stage.name], inputs, self._options.reuse, provenance)
        if found is not None:
            self._reporter.say(f"{stage.name}: taken over from {found.record.reused_from}")
        return found

    def _start(self, stage: Stage, plan: Plan, inputs: Mapping[str, Artifact], lease: Lease) -> None:
        # Between our look and the lease the other driver may have committed and released.
        if (found := self._store.find(stage.name)) is not None:
            lease.release()
            plan.artifacts[stage.name] = found
            return
        build = Build(self._store, stage, plan.fingerprints[stage.name], inputs, lease)
        self._builds[stage.name] = build
        self._reporter.started(stage.name)
        self._drive(build, build.start)

    def _drive(self, build: Build, step: Callable[[], list[UnitTask]]) -> None:
        """Run the driver's part of a stage and queue the tasks that it gives."""
        try:
            tasks = step()
        except HardmoeError as error:
            self._fail(build.stage.name, Failure(build.stage.name, str(error), error))
            return
        for task in tasks:
            self._enqueue(task)

    def _enqueue(self, task: UnitTask) -> None:
        rank = (-self._heights.get(task.stage.name, 0), -task.unit.cost, next(self._order))
        heapq.heappush(self._queue, _Queued(rank, task))

    def _submit(self, plan: Plan) -> None:
        if not self._queue:
            return
        if self._backend is None:
            backend = self._make_backend()
            self._backend = backend
            backend.prepare([stage.resources for stage in plan.missing])
        while self._queue:
            task = self._queue[0].task
            slots = self._backend.slots(task.stage.resources)
            limit = min(slots + _QUEUED_BEYOND_SLOTS, self._options.parallel or slots + _QUEUED_BEYOND_SLOTS)
            if len(self._in_flight) >= limit:
                return
            heapq.heappop(self._queue)
            self._in_flight[_key(task)] = task
            self._backend.submit(task)

    def _receive(self) -> None:
        if self._backend is None or not self._in_flight:
            time.sleep(_WAIT_SECONDS if self._waiting else 0.0)
            return
        for outcome in self._backend.wait(_WAIT_SECONDS):
            self._handle(outcome)

    def _handle(self, outcome: UnitOutcome) -> None:
        task = outcome.task
        del self._in_flight[_key(task)]
        build = self._builds.get(task.stage.name)
        if outcome.infrastructure is not None:
            self._lost(task, outcome.infrastructure)
        elif outcome.error is not None:
            self._fail(task.stage.name, Failure(task.label, outcome.error))
        elif build is not None and outcome.completion is not None:
            completion = outcome.completion
            self._reporter.unit_done(task, outcome.seconds)
            if task.stage.name not in self._failed:
                self._drive(build, lambda: build.complete(completion))

    def _lost(self, task: UnitTask, reason: str) -> None:
        """Give a unit whose worker died another try, unless it keeps dying without getting any further."""
        checkpoint = self._reporter.last_checkpoint(task)
        count, at = self._losses.get(_key(task), (0, ""))
        count = 1 if checkpoint != at else count + 1
        self._losses[_key(task)] = (count, checkpoint)
        if count >= self._options.attempts:
            sentence = f"its worker died {count} times without a new checkpoint in between, the last time so: {reason}"
            self._fail(task.stage.name, Failure(task.label, sentence))
            return
        self._reporter.say(f"{task.label}: lost its worker ({reason}); trying again ({count} of {self._options.attempts})")
        self._enqueue(task)

    def _commit_finished(self, plan: Plan) -> None:
        for name, build in list(self._builds.items()):
            if build.finished is None or name in self._failed:
                continue
            try:
                plan.artifacts[name] = build.commit()
            except HardmoeError as error:
                self._fail(name, Failure(name, str(error), error))
                continue
            del self._builds[name]
            self._reporter.finished(name)
            build.lease.release()

    def _fail(self, stage_name: str, failure: Failure) -> None:
        self._failures.append(failure)
        self._failed.setdefault(stage_name, failure)
        self._reporter.failed(stage_name, failure.label, failure.sentence)

    def _summary(self) -> HardmoeError:
        if len(self._failures) == 1 and self._failures[0].error is not None:
            return self._failures[0].error
        lines = "\n".join(f"  {failure.label}: {failure.sentence}" for failure in self._failures)
        return UnitsFailedError(f"{len(self._failures)} failed, everything else is kept; running again does only these:\n{lines}")

    def _close(self) -> None:
        self._reporter.stopped(self._builds)
        if self._backend is not None:
            self._backend.close()
        for build in self._builds.values():
            with contextlib.suppress(HardmoeError):
                build.lease.release()


def _key(task: UnitTask) -> tuple[str, str, str]:
    return (task.stage.name, task.phase, task.unit.name)
