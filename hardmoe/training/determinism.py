"""Make a block of torch computations the same bytes every time.

Holds on a CPU for a fixed number of threads; on a GPU only the threads are set, since deterministic kernels there are
slow, partial and warn. Rejected: setting this once at import, which changes the user's process for good.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def deterministic(num_threads: int, device: torch.device) -> Iterator[None]:
    """Run a block with `num_threads` CPU threads and, on a CPU, deterministic algorithms; restore everything after.

    An operation without a deterministic form warns instead of failing, so that a user's own network still trains.
    """
    threads = torch.get_num_threads()
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        torch.set_num_threads(num_threads)
        if device.type == "cpu":
            torch.use_deterministic_algorithms(True, warn_only=True)
            # Filling every fresh tensor with NaN only unmasks reads of uninitialised memory, at a price on every operation.
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


@contextmanager
def seeded_step(seed: int, device: torch.device) -> Iterator[None]:
    """Run a block whose torch randomness (dropout, stochastic depth) depends on `seed` alone; global generators are restored."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
