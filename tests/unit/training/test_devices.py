"""What a training is given: whole GPUs, shares of one, several; and what it says where they do not suffice."""

from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from hardmoe.errors import HardmoeError
from hardmoe.experts.config import ExpertsConfig
from hardmoe.stage import Resources
from hardmoe.training import network
from hardmoe.training.config import training_resources

CPU = torch.device("cpu")


def unit(gpus: float | None, *, use_gpu: bool = True) -> SimpleNamespace:
    return SimpleNamespace(use_gpu=use_gpu, stage=SimpleNamespace(resources=Resources(1, gpus)))


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """A machine that says it has three GPUs, and what was set for them."""
    told: dict[int, float] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, index: told.update({index: share}))
    return told


@pytest.mark.parametrize(
    ("gpus", "expected"), [(None, {0: 1.0}), (1.0, {0: 1.0}), (0.25, {0: 0.25}), (3.0, {0: 1.0, 1: 1.0, 2: 1.0})]
)
def test_a_share_of_a_gpu_limits_its_memory_and_several_are_all_used(
    limits: dict[int, float], gpus: float | None, expected: dict[int, float]
) -> None:
    assert network.training_devices(unit(gpus)) == [torch.device("cuda", index) for index in expected]
    assert limits == expected


def test_more_gpus_than_there_are_is_refused(limits: dict[int, float]) -> None:
    with pytest.raises(HardmoeError, match="gpus: 4 are asked for, where this process sees 3; lower gpus"):
        network.training_devices(unit(4.0))
    assert limits == {}


@pytest.mark.parametrize(("gpus", "use_gpu", "count"), [(2.0, True, 2), (2.0, False, 1), (0.5, True, 1), (None, False, 1)])
def test_pretended_gpus_are_processes_on_the_cpu(gpus: float | None, use_gpu: bool, count: int) -> None:
    assert network.training_devices(unit(gpus, use_gpu=use_gpu)) == [CPU] * count


def test_every_device_brings_its_threads() -> None:
    assert training_resources(3, "auto") == Resources(3, None)
    assert training_resources(3, 0.5) == Resources(3, 0.5)
    assert training_resources(3, 2.0) == Resources(6, 2.0)


def test_a_share_above_one_is_refused_with_whole_numbers() -> None:
    with pytest.raises(ValidationError, match=r"1\.5 GPUs: a network trains on a share of one or on several .*; set 1 or 2"):
        ExpertsConfig(gpus=1.5)


@pytest.mark.parametrize(("gpus", "end"), [(1.0, "or lower batch_size"), (0.25, "or raise gpus \\(now 0.25\\)")])
def test_memory_that_does_not_suffice_is_said_with_the_remedy(gpus: float, end: str) -> None:
    config = ExpertsConfig(batch_size=512, accumulate=2)
    words = network.remedy_for_memory(unit(gpus), config)
    assert words.startswith("the GPU's memory does not suffice for batches of 512 images; raise accumulate (now 2)")
    assert words.endswith(end.replace("\\", ""))
