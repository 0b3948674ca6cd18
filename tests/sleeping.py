"""Stages of one unit that only sleeps and notes when and where it ran: for what is said of order, slots and GPUs."""

import os
import time
from collections.abc import Generator, Sequence
from pathlib import Path

from hardmoe.artifacts.store import ArtifactStore
from hardmoe.config import Json
from hardmoe.execution.backend import Backend
from hardmoe.execution.plan import make_plan
from hardmoe.execution.progress import Reporter
from hardmoe.execution.runner import Runner, RunnerOptions
from hardmoe.stage import Completion, DriverContext, Finished, Phase, Resources, Stage, Unit, UnitContext
from hardmoe.storage import LocalStorage

_ONE_CPU = Resources()
_PATIENCE_SECONDS = 60.0


class SleepingWork:
    """See the module."""

    def phases(self, context: DriverContext) -> Generator[Phase, list[Completion], Finished]:
        """The unit."""
        seconds = context.stage.config["seconds"]
        (done,) = yield Phase("train", [Unit(context.stage.name.rpartition("/")[2], cost=seconds)])
        return Finished({"ran": done.payload})

    def run(self, context: UnitContext) -> Json:
        """Sleep."""
        import ray

        began, runtime = time.time(), ray.get_runtime_context()
        meeting = context.stage.operational["meeting"]
        if meeting is not None:
            _meet(Path(meeting["place"]), context.unit.name, meeting["count"])
        time.sleep(context.stage.config["seconds"])
        with context.output("model.bin") as out:
            out.write(b"weights" * 1000)
        gpus = [int(gpu) for gpu in runtime.get_accelerator_ids()["GPU"]]
        return {"began": began, "ended": time.time(), "node": runtime.get_node_id(), "gpus": gpus, "use_gpu": context.use_gpu}


def _meet(place: Path, name: str, count: int) -> None:
    """Wait for others, however slowly their workers start; not for ever, as they may never come."""
    (place / name).touch()
    end = time.monotonic() + _PATIENCE_SECONDS
    while len(list(place.iterdir())) < count and time.monotonic() < end:
        time.sleep(0.05)


class NoDisplay:
    """Shows nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def update(self, tracked: object) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class KeptOpen:
    """A backend that outlives a run, so that the next one finds warm workers."""

    def __init__(self, backend: Backend) -> None:
        self.prepare, self.has_room, self.submit, self.wait = backend.prepare, backend.has_room, backend.submit, backend.wait
        self.publish = backend.publish

    def close(self) -> None:
        """Leave the backend as it is."""


def worker_path() -> str:
    """What `PYTHONPATH` must be for workers to find this module."""
    here = Path(__file__).resolve().parent
    return f"{here}{os.pathsep}{here.parent}"


def sleep_through(
    root: Path,
    seconds: Sequence[float],
    backend: Backend,
    *,
    resources: Resources = _ONE_CPU,
    parallel: int | None = None,
    meeting: int | None = None,
) -> list[Json]:
    """What every unit noted, in the order of `seconds`; the backend stays open. `meeting` units wait for one another first."""
    place = root / "meeting"
    place.mkdir(parents=True)
    operational: dict[str, Json] = {"meeting": None if meeting is None else {"place": str(place), "count": meeting}}
    names = [f"experts/expert-{index:04d}" for index in range(len(seconds))]
    stages = [
        Stage(name, "sleeping", 1, {"seconds": each}, "sleeping:SleepingWork", operational=operational, resources=resources)
        for name, each in zip(names, seconds, strict=True)
    ]
    store = ArtifactStore(LocalStorage(root))
    plan = make_plan(store, stages)
    Runner(store, lambda: KeptOpen(backend), Reporter(store.storage, NoDisplay()), RunnerOptions(parallel=parallel)).run(plan)
    return [plan.artifacts[stage.name].payload["ran"] for stage in stages]
