"""One layer of experts, forward and backward: milliseconds, peak memory, rows and operations of each dispatch and its peers.

    python tests/benchmarks/moe_dispatch.py            (some minutes on two cores; on a GPU if there is one)

Peers are a dense MLP of as many operations as an item's two experts take, and two packages from PyPI (extra `bench`):
`mixture-of-experts`, a one-hot dispatch to two experts with capacity 1.25, and `soft-moe-pytorch`, with as many slots as there
are choices. Rows and operations are counted, not measured: sorted rows are those that are kept, padded ones all slots. Systems
take turns in every round; times are medians with the least and the most of them.
"""

import argparse
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from hardmoe.models.moe.experts.base import PaddedRows, SortedRows
from hardmoe.models.moe.experts.mlp import MlpExperts
from hardmoe.models.moe.layer import DISPATCHES, MoeLayer, Plan
from hardmoe.models.moe.routers.noisy_topk import NoisyTopKRouter
from hardmoe.models.moe.scores.linear import LinearScores

WIDTH, HIDDEN, K, CAPACITY = 384, 1536, 2, 1.05


@dataclass
class System:
    """Something that is timed."""

    name: str
    network: nn.Module
    run: Callable[[Tensor], Tensor]
    rows: int | None = None
    """Rows that experts compute, where they can be counted."""


def ours(dispatch: str, tokens: int, num_experts: int, device: torch.device) -> System:
    """A layer of ours, and the rows that one pass has."""
    experts = MlpExperts(nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH), num_experts)
    router = NoisyTopKRouter(LinearScores(WIDTH, num_experts), num_experts)
    plan = Plan(K, CAPACITY, CAPACITY, dispatch=dispatch)  # type: ignore[arg-type]
    layer = MoeLayer(router, experts, plan, {"importance": 0.005, "load": 0.005}).to(device).train()
    system = System(f"hardmoe, `{dispatch}`", layer, lambda images: layer(images) + 0 * (layer.auxiliary_loss or 0))
    forward = layer.experts.forward

    def counting(given: PaddedRows | SortedRows) -> Tensor:
        system.rows = given.filled_EN.numel() if isinstance(given, PaddedRows) else int(given.ends_E[-1])
        return forward(given)

    layer.experts.forward = counting
    layer(torch.randn(1, tokens, WIDTH, device=device))
    layer.experts.forward = forward
    return system


def peers(tokens: int, num_experts: int, device: torch.device) -> list[System]:
    """A dense MLP, and the packages that are installed."""
    dense = nn.Sequential(nn.Linear(WIDTH, K * HIDDEN), nn.GELU(), nn.Linear(K * HIDDEN, WIDTH)).to(device)
    found = [System("dense MLP of equal operations", dense, dense, rows=tokens)]
    try:
        from mixture_of_experts import MoE
        from soft_moe_pytorch import SoftMoE
    except ImportError as error:
        print(f"{error.name} is not installed: its rows are left out; pip install 'hardmoe[bench]'", file=sys.stderr)
        return found
    one_hot: Any = MoE(dim=WIDTH, num_experts=num_experts, hidden_dim=HIDDEN, activation=nn.GELU).to(device).train()
    found.append(System("mixture-of-experts", one_hot, lambda images: one_hot(images)[0]))
    slots = -(-K * tokens // num_experts)
    soft: Any = SoftMoE(dim=WIDTH, num_experts=num_experts, num_slots=slots, expert_mult=HIDDEN // WIDTH).to(device).train()
    found.append(System("soft-moe-pytorch", soft, soft, rows=slots * num_experts))
    return found


def step(system: System, images: Tensor) -> None:
    """Forward and backward."""
    system.network.zero_grad()
    given = images.clone().requires_grad_()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        outputs = system.run(given)
    outputs.float().square().sum().backward()
    if images.is_cuda:
        torch.cuda.synchronize()


def peak_memory(system: System, images: Tensor) -> float:
    """MiB that one step takes at most beside weights and their gradients."""
    step(system, images)
    if images.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(system, images)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step(system, images)
    events = [each for each in found.profiler.kineto_results.events() if each.name() == "[memory]"]
    held, most = 0, 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most / 2**20


def operations(system: System, images: Tensor) -> float:
    """Of a forward pass, in thousands of millions."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        system.run(images)
    return float(counter.get_total_flops()) / 1e9


def measure(tokens: int, num_experts: int, rounds: int, device: torch.device) -> list[str]:
    """Lines of the table for one size."""
    torch.manual_seed(0)
    images = torch.randn(1, tokens, WIDTH, device=device)
    systems = [*(ours(name, tokens, num_experts, device) for name in DISPATCHES), *peers(tokens, num_experts, device)]
    times: dict[str, list[float]] = {system.name: [] for system in systems}
    for system in systems:
        step(system, images)
    for _ in range(rounds):
        for system in systems:
            began = time.perf_counter()
            step(system, images)
            times[system.name].append(1000 * (time.perf_counter() - began))
    lines = []
    for system in systems:
        took = times[system.name]
        spread = f"{statistics.median(took):.1f} ({min(took):.1f} to {max(took):.1f})"
        rows = "-" if system.rows is None else f"{system.rows:,}"
        counted = f"{peak_memory(system, images):.0f} | {rows} | {operations(system, images):.2f}"
        lines.append(f"| {tokens:,} | {num_experts} | {system.name} | {spread} | {counted} |")
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, nargs="+", default=None)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens = options.tokens or ([196, 784, 1576, 3152] + ([8192, 16_384, 65_536] if device.type == "cuda" else []))
    place = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, {options.threads} thread(s)"
    print(f"{place}, torch {torch.__version__}; width {WIDTH}, hidden {HIDDEN}, k = {K}, capacity {CAPACITY}\n")
    print("| tokens | experts | system | ms, forward and backward | peak MiB | expert rows | GFLOP, forward |")
    print("|---|---|---|---|---|---|---|")
    warnings.filterwarnings("ignore")
    for count in tokens:
        for num_experts in options.experts:
            for line in measure(count, num_experts, options.rounds, device):
                print(line, flush=True)


if __name__ == "__main__":
    main()
