"""Theorem 4 and its neighbours: neither backend, parallelism nor the order of commands shows in a byte; the seed does, and
not where it must not; and a worker that outlives its driver disturbs nobody.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from support import PREPARATION, copied_run, records, run_here, succeed

from hardmoe.artifacts.lease import Lease, LeaseObserver
from hardmoe.artifacts.store import ArtifactStore
from hardmoe.execution.build import Build
from hardmoe.execution.plan import make_plan
from hardmoe.execution.task import UnitOutcome, UnitTask
from hardmoe.execution.worker import RunningUnit, execute_unit
from hardmoe.pipeline import build_stages, identify_inputs
from hardmoe.recipe import parse_recipe
from hardmoe.storage import open_storage


@pytest.mark.long
def test_ray_with_four_workers_equals_inline_byte_for_byte(root: Path, root_on_ray: Path) -> None:
    assert records(root_on_ray) == records(root)
    assert len(records(root)) == 16


@pytest.mark.long
def test_the_files_are_what_their_records_say_on_either_backend(root: Path, root_on_ray: Path) -> None:
    for top in (root, root_on_ray):
        store = ArtifactStore(open_storage(str(top)))
        for name in records(top):
            assert store.get(name.removesuffix("/artifact.json")).verify() > 0


@pytest.mark.long
def test_experts_on_one_ray_worker_equal_those_on_four(finished: Path, root_on_ray: Path, tmp_path: Path) -> None:
    one_worker = copied_run(finished, tmp_path, keep=PREPARATION)
    succeed(tmp_path, "train-experts", "--backend", "ray", "--parallel", "1")
    names = [f"experts/expert-{expert:04d}/artifact.json" for expert in range(3)]
    assert {name: (one_worker / name).read_bytes() for name in names} == {
        name: (root_on_ray / name).read_bytes() for name in names
    }


@pytest.mark.slow
def test_ray_with_one_worker_equals_inline_byte_for_byte(finished: Path, root: Path, tmp_path: Path) -> None:
    one_worker = copied_run(finished, tmp_path, keep=())
    succeed(tmp_path, "run", "--backend", "ray", "--parallel", "1")
    assert records(one_worker) == records(root)


def test_commands_one_by_one_equal_run_byte_for_byte(finished: Path, root: Path, tmp_path: Path) -> None:
    one_by_one = copied_run(finished, tmp_path, keep=())
    commands = (
        ("partition",),
        ("train-experts", "--parallel", "4"),
        ("fit-decoder",),
        ("evaluate",),
        ("report",),
    )
    built: set[str] = set()
    new = []
    for arguments in commands:
        run_here(tmp_path, *arguments)
        new.append({name.partition("/")[0] for name in records(one_by_one).keys() - built})
        built |= records(one_by_one).keys()
    assert new == [set(PREPARATION), {"experts"}, {"embeddings", "decoder"}, {"baselines", "evaluation"}, {"report"}]
    assert records(one_by_one) == records(root)


def test_another_seed_gives_another_trunk_and_the_same_test_split(finished: Path, root: Path, tmp_path: Path) -> None:
    other = copied_run(finished, tmp_path, keep=())
    run_here(tmp_path, "partition", "--set", "seed=1")
    for name in ("dataset", "vocabulary"):
        assert (other / name / "artifact.json").read_bytes() == (root / name / "artifact.json").read_bytes()
    ids = [
        [pq.read_table(path, partitioning=None).column("example_id").to_pylist() for path in top.glob("dataset/split=test/*")]
        for top in (other, root)
    ]
    assert ids[0] == ids[1]
    assert (other / "trunk/model.safetensors").read_bytes() != (root / "trunk/model.safetensors").read_bytes()


class Cut(BaseException):
    """Stands for the death of a worker: nothing catches it, nothing is tidied up."""


@dataclass
class Worker:
    """An attempt at a unit in a thread of its own, which stops and goes on, or dies, at chosen steps of its training."""

    task: UnitTask
    stops: tuple[int, ...] = ()
    dies_at: int | None = None
    outcome: UnitOutcome | None = None
    first_step: int | None = None
    at: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        assert self.at.acquire(timeout=60)

    def _run(self) -> None:
        _workers[threading.get_ident()] = self
        try:
            self.outcome = execute_unit(self.task)
        except Cut:
            pass
        finally:
            self.at.release()

    def step(self, number: int) -> None:
        self.first_step = self.first_step or number
        if number == self.dies_at:
            raise Cut
        if number in self.stops:
            self.at.release()
            assert self.go.acquire(timeout=60)

    def go_on(self) -> None:
        """Let it run to its next stop or its end."""
        self.go.release()
        assert self.at.acquire(timeout=60)


_workers: dict[int, Worker] = {}


@pytest.fixture
def steps_seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tell each worker of the steps of its training."""

    def progress(unit: RunningUnit, done: float, total: float, **values: float | int | str) -> None:
        _workers[threading.get_ident()].step(int(done))

    monkeypatch.setattr(RunningUnit, "progress", progress)
    yield
    _workers.clear()


@pytest.fixture
def build_of(finished: Path, tmp_path: Path) -> Iterator[Callable[[str], Build]]:
    """Begins the build of one artifact, as a driver does, in a root that holds what it stands on."""
    root = copied_run(finished, tmp_path, keep=(*PREPARATION, "embeddings"))
    recipe = parse_recipe(yaml.safe_load((root / "recipe.yaml").read_text()), "recipe")
    recipe = recipe.model_copy(update={"dataset": recipe.dataset.model_copy(update={"path": str(tmp_path / "photos/*.parquet")})})
    store = ArtifactStore(open_storage(str(root)))
    plan = make_plan(store, build_stages(recipe, identify_inputs(recipe, store)))
    leases: list[Lease] = []

    def begin(name: str) -> Build:
        stage = next(stage for stage in plan.stages if stage.name == name)
        lease = LeaseObserver(store.storage).acquire(name)
        assert isinstance(lease, Lease)
        leases.append(lease)
        inputs = {role: plan.artifacts[name] for role, name in stage.inputs.items()}
        return Build(store, stage, plan.fingerprints[name], inputs, lease)

    yield begin
    for lease in leases:
        lease.release()


@pytest.mark.parametrize("name", ["experts/expert-0001", "decoder"])
def test_a_worker_that_outlives_its_driver_and_the_commit_alters_nothing(
    steps_seen: None, build_of: Callable[[str], Build], root: Path, name: str
) -> None:
    """The metrics log used to be written at its final name, where a late worker replaced it after it was vouched for, and
    left it so if it died before its own end.
    """
    build = build_of(name)
    (task,) = build.start()
    orphan = Worker(task, stops=(4,), dies_at=7)
    winner = Worker(task)
    assert winner.outcome is not None
    assert winner.outcome.completion is not None, winner.outcome.error
    build.complete(winner.outcome.completion)
    artifact = build.commit()
    orphan.go_on()
    assert orphan.outcome is None
    assert artifact.verify() > 0
    assert artifact.record.to_bytes() == (root / name / "artifact.json").read_bytes()


@pytest.mark.parametrize(("name", "resumes_at"), [("experts/expert-0001", 9), ("decoder", 10)])
def test_a_worker_resumed_beside_a_slower_one_loses_no_step_and_ends_with_the_same_bytes(
    steps_seen: None, build_of: Callable[[str], Build], root: Path, name: str, resumes_at: int
) -> None:
    """A slower orphan used to delete the checkpoints that lay ahead of it."""
    build = build_of(name)
    (task,) = build.start()
    orphan = Worker(task, stops=(2, 6))
    Worker(task, dies_at=9)
    orphan.go_on()
    resumed = Worker(task)
    assert resumed.first_step == resumes_at
    orphan.go_on()
    assert resumed.outcome is not None
    assert resumed.outcome.completion is not None, resumed.outcome.error
    build.complete(resumed.outcome.completion)
    assert build.commit().record.to_bytes() == (root / name / "artifact.json").read_bytes()
