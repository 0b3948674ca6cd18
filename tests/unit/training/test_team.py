"""One network on two devices: real processes that talk through gloo, held against one process with the whole batch."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from test_step import make_examples
from torch import Tensor, nn

from hardmoe.errors import WorkerLostError
from hardmoe.models.backbones import Backbone, TagClassifier
from hardmoe.storage import LocalStorage
from hardmoe.training.checkpoint import Checkpoints
from hardmoe.training.config import AugmentConfig, TrainingConfig
from hardmoe.training.loop import train
from hardmoe.training.reporting import TrainingProgress, TrainingSinks

CPU = torch.device("cpu")
CONFIG = TrainingConfig(
    epochs=3,
    batch_size=8,
    learning_rate=1.0,
    max_grad_norm=5.0,
    ema_decay=0.9,
    augment=AugmentConfig(crop=0.5, flip=True, mixup=0.4),
    checkpoint_every_steps=3,
    checkpoint_every_seconds=None,
)
"""Of 25 examples: batches of 6 and 7, so that the shares are not all of one size."""


class Doubled(nn.Module):
    """A network in float64 behind float32 images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.double()

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.double())  # type: ignore[no-any-return]


def make_model() -> TagClassifier:
    """Batch normalisation over maps and over features, with and without weights, with a running mean and with an average."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(54, 7),
        nn.BatchNorm1d(7, momentum=None),
        nn.GELU(),
        nn.BatchNorm1d(7, affine=False),
    )
    return TagClassifier(Backbone(Doubled(network), 7), 5, seed=0).double()


def trained(config: TrainingConfig, num_devices: int, sinks: TrainingSinks | None = None) -> tuple[float, dict[str, Tensor]]:
    model = make_model()
    result = train(model, make_examples(25), config, seed=0, devices=[CPU] * num_devices, sinks=sinks)
    assert result.final_loss is not None
    return result.final_loss, model.state_dict()


def helpers() -> list[psutil.Process]:
    """Processes that help this one."""
    found = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if any("spawn_main" in word for word in process.cmdline()):
                found.append(process)
    return found


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    assert helpers() == []


def test_two_devices_train_the_network_of_one_with_the_whole_batch() -> None:
    loss, weights = trained(CONFIG, 1)
    shared_loss, shared_weights = trained(CONFIG, 2)
    assert CONFIG.epochs * 4 >= 10, "steps"
    assert shared_loss == pytest.approx(loss, rel=1e-6)
    for name, tensor in weights.items():
        torch.testing.assert_close(shared_weights[name], tensor, rtol=1e-5, atol=1e-9)


def test_a_batch_smaller_than_the_team_is_the_leaders_alone() -> None:
    """25 examples in batches of one: nobody has a share to give, and batch normalisation has one value."""
    config = CONFIG.model_copy(update={"batch_size": 1, "epochs": 1, "augment": AugmentConfig()})
    _, weights = trained(config, 1)
    _, shared_weights = trained(config, 2)
    for name, tensor in weights.items():
        assert torch.equal(shared_weights[name], tensor), name


def test_a_dead_helper_fails_the_try_and_the_next_one_ends_with_the_same_bits(tmp_path: Path) -> None:
    _, expected = trained(CONFIG, 2)
    first, resumed_at = [], []

    def kill(at: TrainingProgress) -> None:
        first.append(at.step)
        if at.step == 8:
            (helper,) = helpers()
            helper.kill()

    checkpoints = Checkpoints(LocalStorage(tmp_path), "checkpoints")
    with pytest.raises(WorkerLostError, match="the process of device 2 of 2 died with exit code -9"):
        trained(CONFIG, 2, TrainingSinks(checkpoints, progress=kill))
    _, weights = trained(CONFIG, 2, TrainingSinks(checkpoints, progress=lambda at: resumed_at.append(at.step)))
    assert first[-1] == 8
    assert resumed_at[0] == 7, "from the checkpoint of step 6"
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name


class Broken(nn.Module):
    """Fails in helpers only."""

    def forward(self, images: Tensor) -> Tensor:
        if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
            raise LookupError("no such layer")
        return images.mean((2, 3))


def test_an_error_in_a_helper_is_told_with_its_own_words() -> None:
    model = TagClassifier(Backbone(Broken(), 3), 5, seed=0)
    with pytest.raises(RuntimeError, match="on device 2 of 2: LookupError: no such layer"):
        train(model, make_examples(25), CONFIG, seed=0, devices=[CPU] * 2)


def test_a_helper_ends_with_its_leader(tmp_path: Path) -> None:
    """A leader that is killed within a step leaves nobody behind."""
    script = tmp_path / "leader.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_team import CONFIG, helpers, trained\n"
        "from hardmoe.training.reporting import TrainingSinks\n"
        "def tell(at):\n"
        "    if at.step == 2:\n"
        "        print(*(each.pid for each in helpers()), flush=True)\n"
        "if __name__ == '__main__':\n"
        "    trained(CONFIG.model_copy(update={'epochs': 10**6}), 2, TrainingSinks(progress=tell))\n"
    )
    leader = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=os.environ)
    assert leader.stdout is not None
    pid = int(leader.stdout.readline())
    helper = psutil.Process(pid)
    leader.send_signal(signal.SIGKILL)
    leader.wait()
    leader.stdout.close()
    assert psutil.wait_procs([helper], 20)[1] == []
