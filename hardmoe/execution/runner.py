"""The durable workflow: from stages to artifacts, through kills, failures and other drivers on the same root.

One loop: look at the stages whose inputs exist, keep the backend's slots filled (longest chain of stages first, then longest
unit, over all of them), take completions in, commit. A failed unit stops its own artifact and what stands on it; the others
go on, and the failures are told together at the end. A stage's lease is taken when its first unit is handed over and not
before, so that any number of drivers on one root divide its experts among them instead of one hoarding them all. Rejected: an
executor per stage, which cannot fill idle slots with another expert's units, and recursion over dependencies, which hides
what runs at the same time.
"""

import contextlib
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from hardmoe.artifacts.lease import Holder, Lease, LeaseObserver
from hardmoe.artifacts.pinned_versions import pin_versions
from hardmoe.artifacts.provenance import describe, now, versions
from hardmoe.artifacts.store import Artifact, ArtifactStore
from hardmoe.errors import HardmoeError, StoppedError, UnitsFailedError
from hardmoe.execution.backend import Backend
from hardmoe.execution.build import Build, sweep_builds
from hardmoe.execution.frontier import Frontier
from hardmoe.execution.plan import Plan, check_inputs, find_built
from hardmoe.execution.progress import Reporter
from hardmoe.execution.queue import WorkQueue
from hardmoe.execution.stopping import STOPPED, StopRequests, present_request
from hardmoe.execution.task import BuildPaths, UnitOutcome, UnitTask
from hardmoe.execution.worker import describe_bug
from hardmoe.stage import Completion, Resources, Stage

_WAIT_SECONDS = 0.2
_LEASE_POLL_SECONDS = 1.0
_TOLD = 10
"""So many different reasons of failures end a run's message; the rest is in the summaries."""


@dataclass(frozen=True)
class RunnerOptions:
    """How to run: limits and other roots to take artifacts from."""

    parallel: int | None = None
    attempts: int = 3
    reuse: Sequence[str] = ()
    accept_versions: bool = False
    """Go on with packages of other versions than those that the run was begun with, here and on the workers."""
    before: Callable[[Stage], None] | None = None
    """Looks at every stage that is about to be begun; raises if it must not be."""


@dataclass(frozen=True)
class Failure:
    """A unit, or the driver's part of a stage, that failed for good."""

    label: str
    sentence: str
    error: HardmoeError | None = None


_Key = tuple[str, str, str]


class Runner:
    """Builds the missing artifacts of a plan; for one `run` only."""

    def __init__(
        self,
        store: ArtifactStore,
        make_backend: Callable[[], Backend],
        reporter: Reporter,
        options: RunnerOptions,
        observer: LeaseObserver | None = None,
    ) -> None:
        self._store = store
        self._make_backend = make_backend
        self._reporter = reporter
        self._options = options
        self._observer = observer or LeaseObserver(store.storage)
        self._backend: Backend | None = None
        self._builds: dict[str, Build] = {}
        self._waiting: set[str] = set()
        self._told: set[str] = set()
        self._failures: list[Failure] = []
        self._queue = WorkQueue()
        self._in_flight: dict[_Key, UnitTask] = {}
        self._running: Counter[Resources] = Counter()
        self._losses: dict[_Key, tuple[int, str]] = {}
        self._next_poll = 0.0
        self._requests = StopRequests(store.storage, "")

    def run(self, plan: Plan) -> None:
        """Build what is missing.

        Raises:
            UnitsFailedError: some units failed for good; the rest was built.
            StoppedError: `hardmoe stop` asked for it; what ran has come to its end or to a checkpoint.
            DriftError: the run was begun with other versions of what its bytes depend on.
        HardmoeError: the driver's part of a stage failed (bad data, a full disk, a lost lease).
        """
        if (others := pin_versions(self._store.storage, accept=self._options.accept_versions)) is not None:
            self._reporter.say(f"going on with other versions than the run was begun with ({others})")
        self._plan = plan
        self._frontier = Frontier(plan.stages, plan.artifacts)
        self._queue = WorkQueue(plan.heights())
        self._requests = StopRequests(self._store.storage, present_request(self._store.storage))
        with self._reporter:
            try:
                self._sweep_after_kills()
                # A failed artifact's other units go on to their completions, so that the next run does only what is missing.
                while self._frontier.open or self._in_flight or self._queue:
                    self._reporter.tell_failures()
                    if not self._requests.arrived():
                        self._start_ready()
                        self._submit()
                    elif not self._in_flight:
                        raise StoppedError(f"{STOPPED}; the same command resumes")
                    self._receive()
                    self._commit_finished()
                    self._tick()
            finally:
                self._close()
        if self._failures:
            raise self._summary()
        check_inputs(self._store, plan)

    def _sweep_after_kills(self) -> None:
        """Clean up where a driver was killed between its record and the end of its lease."""
        for name in self._plan.artifacts:
            if not self._store.storage.exists(BuildPaths(name, "").lease):
                continue
            if isinstance(lease := self._observer.acquire(name), Lease):
                sweep_builds(self._store.storage, name)
                lease.release()

    def _start_ready(self) -> None:
        poll = time.monotonic() >= self._next_poll
        # With nothing else to choose from, a stage begins at once; among several, each is looked at for the cost of its units
        # and put into the queue, so that the longest over all of them comes first.
        alone = len(self._frontier.ready) == 1 and not self._queue
        for stage in list(self._frontier.ready):
            if stage.name not in self._waiting or poll:
                self._guarded(stage.name, partial(self._begin, stage, keep=alone))
        if poll:
            self._next_poll = time.monotonic() + _LEASE_POLL_SECONDS

    def _begin(self, stage: Stage, *, keep: bool) -> None:
        """Find the artifact, take it over from another root, or begin to build it; or wait for whoever is building it."""
        if (found := find_built(self._store, self._plan, stage)) is not None:
            self._have(stage, found)
            return
        lease = self._observer.acquire(stage.name)
        if not isinstance(lease, Lease):
            self._wait_for(stage, lease)
            return
        self._waiting.discard(stage.name)
        with contextlib.ExitStack() as undo:
            undo.callback(lease.release)
            # Between our look and the lease the other driver may have committed and released.
            found = find_built(self._store, self._plan, stage) or self._reused(stage)
            if found is not None:
                self._have(stage, found)
                return
            build = Build(self._store, stage, self._plan.fingerprints[stage.name], self._inputs(stage), lease)
            if self._options.before is not None:
                self._options.before(stage)
            tasks = build.start()
            self._frontier.begin(stage)
            if tasks and not keep:
                self._queue.push(stage, max(task.unit.cost for task in tasks))
                return
            self._builds[stage.name] = build
            undo.pop_all()
        self._reporter.started(build)
        self._enqueue(tasks)

    def _reused(self, stage: Stage) -> Artifact | None:
        if not self._options.reuse:
            return None
        provenance = describe(now(), 0.0, reused=True)
        fingerprint = self._plan.fingerprints[stage.name]
        found = self._store.reuse(stage.name, fingerprint, self._inputs(stage), self._options.reuse, provenance)
        if found is not None:
            self._reporter.say(f"{stage.name}: taken over from {found.record.reused_from}")
        return found

    def _submit(self) -> None:
        """Hand over the most costly of what waits, as long as there is room."""
        if self._queue and self._backend is None:
            self._backend = self._make_backend()
            self._backend.prepare([stage.resources for stage in self._plan.missing])
        while (item := self._queue.pop(self._has_room)) is not None:
            if isinstance(item, Stage):
                self._guarded(item.name, partial(self._begin, item, keep=True))
                continue
            assert self._backend is not None
            self._in_flight[_key(item)] = item
            self._running[item.stage.resources] += 1
            self._reporter.submitted(item)
            wanted = {} if self._options.accept_versions else versions()
            self._backend.submit(replace(item, stop_request=self._requests.known, versions=wanted))

    def _has_room(self, demand: Resources) -> bool:
        assert self._backend is not None
        total = len(self._in_flight)
        return total < (self._options.parallel or total + 1) and self._backend.has_room(demand, self._running)

    def _receive(self) -> None:
        if self._backend is None or not self._in_flight:
            time.sleep(_WAIT_SECONDS if self._waiting else 0.0)
            return
        for outcome in self._backend.wait(_WAIT_SECONDS, self._tick):
            self._handle(outcome)

    def _handle(self, outcome: UnitOutcome) -> None:
        task = outcome.task
        name = task.stage.name
        del self._in_flight[_key(task)]
        self._running[task.stage.resources] -= 1
        if outcome.infrastructure is not None:
            words = outcome.infrastructure if outcome.preempted else self._reporter.preempted(task)
            if words is None:
                self._lost(task, outcome.infrastructure, store_away=outcome.store_away)
            else:
                self._made_room(task, words)
        elif outcome.error is not None:
            self._fail(name, Failure(task.label, outcome.error))
        elif outcome.completion is not None and not self._frontier.failed(name):
            self._guarded(name, partial(self._complete, self._builds[name], task, outcome.completion))

    def _complete(self, build: Build, task: UnitTask, completion: Completion) -> None:
        self._reporter.unit_done(task, completion)
        self._enqueue(build.complete(completion))
        self._reporter.advanced(build)

    def _made_room(self, task: UnitTask, words: str) -> None:
        """A unit ended at a new checkpoint: it goes on from there, and none of its tries is used up."""
        # The unit may have found a request to stop before this driver did.
        stopping = self._requests.arrived(look_now=True)
        self._reporter.say(f"{task.label}: {words}" + ("" if stopping else "; going on from there"))
        self._losses.pop(_key(task), None)
        self._enqueue([task])

    def _lost(self, task: UnitTask, reason: str, *, store_away: bool) -> None:
        """Give a unit whose worker died, or lost the store, another try, unless that goes on without getting any further.

        A unit that can isolate what kills it is given one more; an image on which a decoder dies is found so.
        """
        checkpoint = self._reporter.last_checkpoint(task)
        count, at = self._losses.get(_key(task), (0, ""))
        count = 1 if checkpoint != at else count + 1
        self._losses[_key(task)] = (count, checkpoint)
        what = "the store was away for it" if store_away else "lost its worker"
        if count >= self._options.attempts and task.unit.can_isolate and not task.is_isolated and not store_away:
            how = "trying once more, with what may have killed it in a process of its own"
            self._reporter.say(f"{task.label}: {what} ({reason}); {how}")
            self._enqueue([replace(task, is_isolated=True)])
            return
        if count >= self._options.attempts:
            times = f"{count} times without a new checkpoint in between, the last time so" if count > 1 else "so"
            ended = "the store was away for it" if store_away else "its worker died"
            self._fail(task.stage.name, Failure(task.label, f"{ended} {times}: {reason}"))
            return
        self._reporter.say(f"{task.label}: {what} ({reason}); trying again ({count} of {self._options.attempts})")
        self._enqueue([task])

    def _commit_finished(self) -> None:
        for name, build in list(self._builds.items()):
            if build.finished is not None and not self._frontier.failed(name):
                self._guarded(name, partial(self._commit, build))

    def _commit(self, build: Build) -> None:
        artifact = build.commit()
        del self._builds[build.stage.name]
        self._have(build.stage, artifact)
        self._reporter.finished(build.stage.name, len(self._plan.artifacts), len(self._plan.stages))
        build.lease.release()

    def _guarded(self, name: str, step: Callable[[], None]) -> None:
        """Do a driver's part of a stage; whatever it raises fails this stage and no other."""
        try:
            step()
        except HardmoeError as error:
            self._fail(name, Failure(name, str(error), error))
        except Exception as error:  # noqa: BLE001 - the units of other stages must not be lost to an error in this one
            with contextlib.suppress(HardmoeError):
                self._store.storage.write_bytes(BuildPaths(name, "").driver_log, traceback.format_exc().encode())
            self._fail(name, Failure(name, describe_bug(error, name)))

    def _fail(self, name: str, failure: Failure) -> None:
        self._failures.append(failure)
        self._frontier.fail(name)
        self._waiting.discard(name)
        self._reporter.failed(name, failure.label, failure.sentence)

    def _have(self, stage: Stage, artifact: Artifact) -> None:
        self._plan.artifacts[stage.name] = artifact
        self._waiting.discard(stage.name)
        self._frontier.finish(stage)

    def _wait_for(self, stage: Stage, holder: Holder) -> None:
        self._frontier.put_back(stage)
        # Of interest only to somebody who sees nothing else going on, and from the second look on: at the first the other
        # driver, too, may just be looking.
        idle = not (self._in_flight or self._queue)
        if idle and stage.name in self._waiting and stage.name not in self._told:
            self._told.add(stage.name)
            self._reporter.say(f"{stage.name}: being built by {holder}; waiting for it")
        self._waiting.add(stage.name)

    def _enqueue(self, tasks: Sequence[UnitTask]) -> None:
        for task in tasks:
            self._queue.push(task, task.unit.cost)

    def _inputs(self, stage: Stage) -> dict[str, Artifact]:
        return {role: self._plan.artifacts[name] for role, name in stage.inputs.items()}

    def _tick(self) -> None:
        looked = self._reporter.tick(self._builds, self._in_flight.values())
        if looked and self._backend is not None:
            self._backend.publish(self._reporter.measures.values())

    def _summary(self) -> HardmoeError:
        if len(self._failures) == 1 and self._failures[0].error is not None:
            return self._failures[0].error
        by_sentence: dict[str, list[str]] = {}
        for failure in self._failures:
            by_sentence.setdefault(failure.sentence, []).append(failure.label)
        # One reason may have failed a thousand units.
        lines = [f"{_listed(labels)}: {sentence}" for sentence, labels in by_sentence.items()]
        if len(lines) == 1:
            return UnitsFailedError(f"{lines[0]} (everything else is kept; running again does only what is missing)")
        told = "\n".join(f"  {line}" for line in lines[:_TOLD])
        if len(lines) > _TOLD:
            told += f"\n  … and {len(lines) - _TOLD} more reasons; see them all with 'hardmoe logs --failed'"
        return UnitsFailedError(f"{len(self._failures)} failed, everything else is kept; running again does only these:\n{told}")

    def _close(self) -> None:
        """Stop the workers first, then say how things stand and give the leases back; each whatever became of the others."""
        with contextlib.ExitStack() as steps:
            for build in self._builds.values():
                steps.callback(_release_quietly, build)
            steps.callback(self._reporter.stopped, self._builds)
            if self._backend is not None:
                steps.callback(self._backend.close)


def _release_quietly(build: Build) -> None:
    # What made the run end is already being told; a lease that cannot be given back ends with this process.
    with contextlib.suppress(HardmoeError):
        build.lease.release()


def _listed(labels: Sequence[str]) -> str:
    return labels[0] if len(labels) == 1 else f"{labels[0]} and {len(labels) - 1} more"


def _key(task: UnitTask) -> _Key:
    return (task.stage.name, task.phase, task.unit.name)
