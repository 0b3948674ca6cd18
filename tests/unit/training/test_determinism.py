"""The switches are set inside the block and as before outside it."""

import pytest
import torch

from hardmoe.training.determinism import deterministic, seeded_step

CPU = torch.device("cpu")


def switches() -> tuple[object, ...]:
    return (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )


def test_deterministic_sets_the_switches_and_restores_them_even_after_an_error() -> None:
    before = switches()
    with pytest.raises(KeyError), deterministic(2, CPU):
        assert switches() == (2, True, True, False)
        raise KeyError
    assert switches() == before


def test_deterministic_on_a_gpu_sets_the_threads_only() -> None:
    before = switches()
    with deterministic(2, torch.device("cuda")):
        assert switches() == (2, *before[1:])
    assert switches() == before


def test_seeded_step_repeats_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    draws = []
    for seed in (1, 1, 2):
        with seeded_step(seed, CPU):
            draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), before)
