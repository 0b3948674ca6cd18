"""Eight experts on a cluster of three raylets, killed thirty times over one training: what it costs, and that nothing shows.

Workers, raylets and the driver die by SIGKILL at random times; raylets are started anew and the driver's command is given again.
The experts' network notes every step that it takes (see `watched`), so what was done twice is counted and not guessed.
`HARDMOE_KILL_SEED=…` repeats the choices.
"""

import contextlib
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from sleeping import worker_path
from support import PREPARATION, command, copied_run, payload, records, run_here

NODES = 3
EXPERTS = tuple(f"experts/expert-{number:04d}" for number in range(8))
INTERVAL = 15
KILLS = 30
RECIPE = (
    *("--set", "partition.experts=8", "--set", "experts.backbone=watched:network", "--set", "experts.init=random"),
    *("--set", "experts.epochs=100", "--set", f"experts.checkpoint_every_steps={INTERVAL}"),
    *("--set", "experts.checkpoint_every_seconds=null", "--set", "execution.attempts=10"),
)
DEADLINE_SECONDS = 1800


@dataclass
class Campaign:
    """A training that is killed again and again."""

    directory: Path
    cluster: Cluster
    log: Path
    chance: random.Random
    say: Callable[[str], None]
    driver: subprocess.Popen[bytes] | None = None
    nodes: list[object] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)

    def start_driver(self) -> None:
        with (self.directory / "driver.log").open("ab") as sink:
            self.driver = subprocess.Popen(
                command("train-experts", *RECIPE, "--backend", "ray", "--address", self.cluster.address),
                cwd=self.directory,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )

    def run(self) -> None:
        """Kill until there were as many as wanted, then let it come to its end."""
        for _ in range(NODES):
            self.add_node()
        self.start_driver()
        deadline = time.monotonic() + DEADLINE_SECONDS
        while sum(self.kinds.values()) < KILLS:
            pause = time.monotonic() + self.chance.uniform(0.5, 4.0)
            while time.monotonic() < pause or not self.at_work():
                self.check_driver()
                assert time.monotonic() < deadline, self.told()
                time.sleep(0.2)
            kind = self.chance.choice(("worker", "worker", "raylet", "driver"))
            {"worker": self.kill_worker, "raylet": self.kill_raylet, "driver": self.kill_driver}[kind]()
            self.kinds[kind] += 1
            self.say(f"kill {sum(self.kinds.values())}: {kind}")
        assert self.driver is not None
        assert self.driver.wait(DEADLINE_SECONDS) == 0, self.told()

    def check_driver(self) -> None:
        assert self.driver is not None
        assert self.driver.poll() is None, f"it ended after {sum(self.kinds.values())} kills:\n{self.told()}"

    def told(self) -> str:
        return (self.directory / "driver.log").read_text()[-5000:]

    def at_work(self) -> dict[str, psutil.Process]:
        """Workers that train an expert and have taken a step."""
        stepped = set(self.log.read_text().split("\n")) if self.log.exists() else set()
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                label = (process.cmdline() or [""])[0].removeprefix("ray::")
                if label in EXPERTS and f"{label} {process.pid}" in stepped:
                    found[label] = process
        return found

    def kill_worker(self) -> None:
        _, process = self.chance.choice(sorted(self.at_work().items()))
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()

    def kill_raylet(self) -> None:
        """A machine that goes: its workers die with its raylet, and another one comes."""
        node = self.nodes.pop(self.chance.randrange(NODES))
        raylet = node.all_processes["raylet"][0].process.pid  # type: ignore[attr-defined]
        os.kill(raylet, signal.SIGKILL)
        self.cluster.remove_node(node, allow_graceful=False)
        self.add_node()

    def kill_driver(self) -> None:
        assert self.driver is not None
        os.killpg(self.driver.pid, signal.SIGKILL)
        self.driver.wait()
        self.start_driver()

    def add_node(self) -> None:
        self.nodes.append(self.cluster.add_node(num_cpus=1, include_dashboard=False))


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("PYTHONPATH", worker_path())
    monkeypatch.setenv("WATCHED_LOG", str(tmp_path / "steps.log"))
    monkeypatch.setenv("WATCHED_SECONDS", "0.05")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_thirty_kills_cost_an_interval_each_and_leave_no_trace(
    finished: Path, tmp_path: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    def say(line: str) -> None:
        with capsys.disabled():
            print(f"\n{line}", end="", flush=True)

    seed = int(os.environ.get("HARDMOE_KILL_SEED") or random.SystemRandom().randrange(1_000_000))
    say(f"kills of experts, HARDMOE_KILL_SEED={seed}")
    for name in ("undisturbed", "killed"):
        (tmp_path / name).mkdir()
        (copied_run(finished, tmp_path / name, keep=PREPARATION[:4]) / "recipe.yaml").unlink()
        run_here(tmp_path / name, "partition", *RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WATCHED_LOG")
        run_here(tmp_path / "undisturbed", "train-experts", *RECIPE)
    campaign = Campaign(tmp_path / "killed", cluster, tmp_path / "steps.log", random.Random(seed), say)
    try:
        campaign.run()
    finally:
        if campaign.driver is not None and campaign.driver.poll() is None:
            os.killpg(campaign.driver.pid, signal.SIGKILL)
            campaign.driver.wait()
    root, expected = tmp_path / "killed/runs/small", tmp_path / "undisturbed/runs/small"
    assert records(root) == records(expected)
    steps = campaign.log.read_text().splitlines()
    taken = Counter(line.split()[0] for line in steps)
    attempts = Counter(line.split()[0] for line in set(steps))
    for name in EXPERTS:
        assert (root / name / "model.safetensors").read_bytes() == (expected / name / "model.safetensors").read_bytes()
        repeated = taken[name] - payload(root, name)["steps"]
        say(f"{name}: {payload(root, name)['steps']} steps by {attempts[name]} attempts, {repeated} of them repeated")
        # And the step beside which a checkpoint is being written.
        assert 0 <= repeated <= (attempts[name] - 1) * (INTERVAL + 1)
    assert sum(attempts.values()) > len(EXPERTS) + KILLS / 2
    assert campaign.kinds.keys() == {"worker", "raylet", "driver"}
    say(f"{dict(campaign.kinds)}")
