"""Theorem 5: killed at any moment and resumed equals uninterrupted, byte for byte.

A campaign runs a small recipe on Ray again and again in one root, watches the root's files, and kills at chosen moments with
SIGKILL. Two ways of dying take turns by chance: the driver's process group, after which Ray's workers, which lead groups of
their own, finish the unit at hand and only then notice; and the whole session at once, as when a machine loses its power.
Every resume is one more `hardmoe run`, started while orphans may still be writing. What each kill hit is read from the root
afterwards: an artifact counts as hit if it has no record and the lease in it names the driver that was killed.

`HARDMOE_KILL_SEED=…` repeats a campaign's choices (the moments; the scheduler's share of chance is not repeatable).
"""

import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from support import SMALL, command, records, succeed, write_recipe

DEADLINE_SECONDS = 240
ORPHANS_SECONDS = 60


@dataclass(frozen=True)
class Build:
    """What the watcher sees of one artifact in the making."""

    directory: Path

    @property
    def has_record(self) -> bool:
        return (self.directory / "artifact.json").exists()

    @property
    def holder(self) -> int | None:
        """The process that the lease names."""
        try:
            return int(json.loads((self.directory / "_progress/lease.json").read_bytes())["holder"]["pid"])
        except (OSError, ValueError):
            return None

    def completions(self, phase: str) -> int:
        return len(list(self.directory.glob(f"_progress/*/done/{phase}/*.json")))

    def checkpoints(self) -> list[int]:
        return sorted(int(path.parent.name.removeprefix("step-")) for path in self.directory.glob("checkpoints/*/state.json"))

    def describe(self) -> str:
        phases = {path.name: path.stat().st_mtime_ns for path in self.directory.glob("_progress/*/done/*")}
        parts = [f"{self.completions(phase)} of {phase} done" for phase in sorted(phases, key=lambda name: phases[name])[-1:]]
        if steps := self.checkpoints():
            parts.append(f"checkpoint at step {steps[-1]}")
        return f"{self.directory.name} ({', '.join(parts) or 'begun'})"


@dataclass(frozen=True)
class Moment:
    """When to kill: as soon as one of these artifacts, being built by this very driver, has got so far."""

    name: str
    artifacts: tuple[str, ...]
    reached: Callable[[Build], bool]

    def is_reached(self, root: Path) -> bool:
        """Whether an artifact has got so far, built by whomever."""
        return any(self.reached(build) for build in self._builds(root))

    def is_now(self, root: Path, pid: int) -> bool:
        return any(self.reached(build) and build.holder == pid and not build.has_record for build in self._builds(root))

    def _builds(self, root: Path) -> Iterator[Build]:
        return (Build(root / name) for name in self.artifacts)


def _begun(name: str, artifacts: Sequence[str] = ()) -> Moment:
    return Moment(f"{name} begun", tuple(artifacts) or (name,), lambda build: build.holder is not None)


def _unit(name: str, phase: str) -> Moment:
    return Moment(f"{name}, a unit of {phase} done", (name,), lambda build: build.completions(phase) > 0)


def _checkpoint(name: str, artifacts: Sequence[str], steps: Sequence[int]) -> Moment:
    return Moment(name, tuple(artifacts), lambda build: bool(set(steps) & set(build.checkpoints())))


EXPERTS = tuple(f"experts/expert-{expert:04d}" for expert in range(3))
INSIDE_EPOCHS = {("trunk",): (3, 6, 9), ("baselines/dense",): tuple(range(2, 22, 2)), EXPERTS: (2, 4, 6, 12)}
"""Steps of checkpoints after which an epoch is not through, for every one of these networks."""

MOMENTS = (
    _unit("dataset", "ingest"),
    _unit("dataset", "merge"),
    _unit("dataset", "write-copy"),
    _unit("vocabulary", "count"),
    _unit("vocabulary", "label"),
    _begun("trunk"),
    _checkpoint("inside an epoch of the trunk", ("trunk",), INSIDE_EPOCHS["trunk",]),
    _unit("features", "extract"),
    _unit("router", "sample"),
    _unit("router", "pass-0001"),
    _unit("partition", "assign"),
    _unit("partition", "merge"),
    _checkpoint("inside an epoch of the dense baseline", ("baselines/dense",), INSIDE_EPOCHS["baselines/dense",]),
    _begun("an expert", EXPERTS),
    _checkpoint("inside an epoch of an expert", EXPERTS, INSIDE_EPOCHS[EXPERTS]),
    _begun("embeddings"),
    _unit("embeddings", "embed"),
    _begun("decoder"),
    _unit("evaluation", "score"),
    _unit("evaluation", "map"),
    _begun("report"),
)
STAGES = {moment.artifacts[0].partition("/")[0] for moment in MOMENTS}


@dataclass
class Campaign:
    """Kills and resumes a recipe, in one root after another, until every moment was hit."""

    directory: Path
    seed: int
    say: Callable[[str], None]
    moments: list[Moment]
    roots: int = 0
    kills: int = 0
    hit: set[str] = field(default_factory=set)
    """Artifacts that were being built at a kill."""

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        # Ray's sockets lie below it, and the kernel allows their paths 107 bytes.
        self.temporary = Path(tempfile.mkdtemp(prefix="hmk-"))
        self.sessions: list[int] = []
        self.say(f"kill campaign, HARDMOE_KILL_SEED={self.seed}")

    def run(self, expected: dict[str, bytes], most_roots: int) -> None:
        """Hit every moment; compare each root, once finished, with an uninterrupted run."""
        try:
            while self.moments and self.roots < most_roots:
                self.roots += 1
                root = self.directory / "runs" / f"killed-{self.roots}"
                while self._is_killed(root):
                    pass
                assert records(root) == expected
                assert not list(root.rglob("_progress/lease.json"))
                succeed(self.directory, "verify", "--root", str(root))
                self.say(f"root {self.roots} is finished, its {len(expected)} records are the uninterrupted run's")
        finally:
            self._wait_for_orphans()
            shutil.rmtree(self.temporary, ignore_errors=True)

    def _is_killed(self, root: Path) -> bool:
        """One `hardmoe run`, killed at the first of the moments that it reaches; False if it came to its end."""
        # What an earlier attempt has left says nothing of this one.
        awaited = [moment for moment in self.moments if not moment.is_reached(root)]
        log = self.directory / f"attempt-{self.roots}-{self.kills}.log"
        with log.open("wb") as sink:
            driver = subprocess.Popen(
                command("run", "--backend", "ray", "--root", str(root)),
                cwd=self.directory,
                env={**os.environ, "TMPDIR": str(self.temporary)},
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )
        self.sessions.append(driver.pid)
        moment = self._wait_for(awaited, root, driver)
        if moment is None:
            assert driver.returncode == 0, log.read_text()
            return False
        time.sleep(self.random.choice((0.0, 0.0, 0.003, 0.01, 0.03)))  # waits for nothing: chance within the unit
        whole = self.random.random() < 0.5
        self._kill(driver, whole)
        self._note(moment, root, driver.pid, "whole session" if whole else "process group")
        return True

    def _wait_for(self, awaited: Sequence[Moment], root: Path, driver: subprocess.Popen[bytes]) -> Moment | None:
        """The first moment that comes; None if the driver ends before."""
        give_up = time.monotonic() + DEADLINE_SECONDS
        while driver.poll() is None:
            if moment := next((moment for moment in awaited if moment.is_now(root, driver.pid)), None):
                return moment
            assert time.monotonic() < give_up, f"no end after {DEADLINE_SECONDS} s"
            time.sleep(0.002)
        return None

    def _kill(self, driver: subprocess.Popen[bytes], whole_session: bool) -> None:
        others = _in_sessions([driver.pid])
        os.killpg(driver.pid, signal.SIGKILL)
        for process in others if whole_session else ():
            _kill_one(process)
        assert driver.wait(DEADLINE_SECONDS) == -signal.SIGKILL
        self.kills += 1

    def _note(self, moment: Moment, root: Path, pid: int, how: str) -> None:
        """Read from the root what the kill hit."""
        builds = [Build(path.parent.parent) for path in sorted(root.rglob("_progress/lease.json"))]
        found = {str(b.directory.relative_to(root)): b for b in builds if b.holder == pid and not b.has_record}
        self.hit |= found.keys()
        late = not found.keys() & set(moment.artifacts)
        if not late:
            self.moments.remove(moment)
        making = ", ".join(build.describe() for build in found.values()) or "nothing in the making"
        self.say(f"kill {self.kills}, {how}, {'too late for' if late else 'at'} '{moment.name}': {making}")

    def _wait_for_orphans(self) -> None:
        """What outlives its driver must end by itself, and soon."""
        began = time.monotonic()
        while left := _in_sessions(self.sessions):
            if time.monotonic() - began > ORPHANS_SECONDS:
                for process in left:
                    _kill_one(process)
                raise AssertionError(f"{left} outlived their driver by {ORPHANS_SECONDS} s")
            time.sleep(0.1)


def _in_sessions(sessions: Sequence[int]) -> list[psutil.Process]:
    """Living processes of these sessions, whatever their process group."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) in sessions and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def _kill_one(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


def _seed() -> int:
    return int(os.environ.get("HARDMOE_KILL_SEED") or random.SystemRandom().randrange(1_000_000))


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Prints past pytest's capture, so that seed and moments of every campaign can be seen."""

    def write(line: str) -> None:
        with capsys.disabled():
            print(f"\n{line}", end="", flush=True)

    return write


def test_the_campaigns_checkpoints_lie_inside_an_epoch(root: Path) -> None:
    for artifacts, steps in INSIDE_EPOCHS.items():
        for name in artifacts:
            body = json.loads((root / name / "artifact.json").read_bytes())
            steps_per_epoch = body["payload"]["steps"] // SMALL["trunk" if name == "trunk" else "experts"]["epochs"]
            assert all(step % steps_per_epoch for step in steps), name


@pytest.mark.long
def test_three_kills_and_resumes_equal_an_uninterrupted_run(
    root: Path, photos: Path, tmp_path: Path, say: Callable[[str], None]
) -> None:
    (tmp_path / "photos").symlink_to(photos)
    write_recipe(tmp_path)
    seed = _seed()
    # The last moments are short, and another root for one that was missed takes half a minute.
    chosen = random.Random(seed).sample(MOMENTS[:-3], 3)
    campaign = Campaign(tmp_path, seed, say, chosen)
    campaign.run(records(root), most_roots=2)
    assert campaign.kills >= 3


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_twenty_kills_at_least_one_in_every_stage_equal_an_uninterrupted_run(
    root: Path, photos: Path, tmp_path: Path, say: Callable[[str], None]
) -> None:
    (tmp_path / "photos").symlink_to(photos)
    write_recipe(tmp_path)
    campaign = Campaign(tmp_path, _seed(), say, list(MOMENTS))
    campaign.run(records(root), most_roots=6)
    assert campaign.moments == []
    assert campaign.kills >= 20
    assert {name.partition("/")[0] for name in campaign.hit} >= STAGES
