"""The balanced partition as durable work: `balance.find_plan` with its passes as phases, and what they do with a shard.

    balance-sample    draws the sample by hash, and finds how large the features are
    balance-0000 …    a pass each: counts, and the rows near a border (`Found`), in a scratch file per shard

Then the units of `assign` place every training example by the plan (`balance_placement`). A killed run is replayed from the
shards that finished; the driver solves the same excerpts again, which takes seconds. Rejected: the solver as a unit of its
own, which would make it durable, and every pass wait for one more round of files.

Shape letters: N rows, S rows of the sample, K parts, D feature dim, B rows of a block.
"""

from collections.abc import Generator, Sequence

import numpy as np
from numpy.typing import NDArray

from hardmoe.arrays import load_arrays, pack_arrays, save_arrays
from hardmoe.config import Json
from hardmoe.hashing import hash_fractions
from hardmoe.partitioning.balance import capacity_of, find_plan, most_rows
from hardmoe.partitioning.balance_pass import Found, Plan, Scan
from hardmoe.partitioning.balance_placement import Balanced
from hardmoe.partitioning.cost_grid import Batches, CostGrid, row_blocks
from hardmoe.partitioning.fit import read_features
from hardmoe.partitioning.router import Router
from hardmoe.stage import Completion, DriverContext, Phase, Unit, UnitContext

SAMPLE = "balance-sample"


def balance_phases(context: DriverContext, router: Router, units: Sequence[Unit]) -> Generator[Phase, list[Completion], Balanced]:
    """Find where the training examples go; `units` name the shards of the training split."""
    seed, slack = context.stage.config["seed"], context.stage.config["partition"]["slack"]
    num_rows: int = context.input("features").payload["rows"]["train"]
    grid = CostGrid.of(router.centroids_KD, seed)
    fraction = min(1.0, most_rows(router.num_experts) / num_rows)
    sampled = yield Phase(SAMPLE, [_unit(unit, fraction=fraction) for unit in units])
    unit = grid.unit_exponent(max(done.payload["largest_exponent"] for done in sampled))
    samples = [load_arrays(context.storage, done.scratch["sample"]) for done in sampled]
    ids_S16 = np.concatenate([sample["ids"] for sample in samples])
    costs_SK = grid.to_integers(np.concatenate([sample["costs"] for sample in samples]), ids_S16, unit)
    del samples
    capacity = capacity_of(num_rows, router.num_experts, slack)
    plan = yield from _passes(context, units, find_plan(ids_S16, costs_SK, num_rows, capacity, seed), unit)
    path = context.share("balance-plan.safetensors", pack_arrays({**plan.to_arrays(), "unit": np.array([unit])}))
    return Balanced(plan, unit, capacity, slack, path)


def _passes(
    context: DriverContext, units: Sequence[Unit], finding: Generator[Scan, Found, Plan], unit: int
) -> Generator[Phase, list[Completion], Plan]:
    """Drive `find_plan`: each pass that it asks for becomes a phase."""
    try:
        scan = next(finding)
        while True:
            arrays = {"prices": scan.prices_K, "reach": scan.reach_KK, "unit": np.array([unit])}
            path = context.share(f"balance-{scan.number:04d}.safetensors", pack_arrays(arrays))
            wanted = {"scan": path, "number": scan.number, "rate": scan.rate, "most": scan.most}
            done = yield Phase(f"balance-{scan.number:04d}", [_unit(each, **wanted) for each in units])
            scan = finding.send(_join(context, scan, done))
    except StopIteration as stop:
        plan: Plan = stop.value
        return plan


def _unit(unit: Unit, **arguments: Json) -> Unit:
    return Unit(unit.name, {**unit.arguments, **arguments})


def _join(context: DriverContext, scan: Scan, done: Sequence[Completion]) -> Found:
    """All shards' findings; where there are many more than wanted, fewer are kept in memory."""
    share = scan.most / max(1, sum(completion.payload["collected"] for completion in done))
    found = []
    for completion in done:
        shard = Found.from_arrays(load_arrays(context.storage, completion.scratch["found"]))
        found.append(shard if share > 0.5 else shard.thinned(scan, scan.rate * share, context.stage.config["seed"]))
    return Found.joined(found)


def run_balance(context: UnitContext, router: Router) -> Json:
    """One shard of the sample, or of a pass."""
    arguments, seed = context.unit.arguments, context.stage.config["seed"]
    features = context.input("features")
    pieces = read_features(features, features.path(arguments["path"]))
    batches = ((ids_N16, router.transform(features_ND)) for ids_N16, features_ND in pieces)
    grid = CostGrid.of(router.centroids_KD, seed)
    if context.phase == SAMPLE:
        ids_S16, costs_SK, largest = sample_rows(batches, grid, arguments["fraction"])
        save_arrays(context.scratch("sample"), {"ids": ids_S16, "costs": costs_SK})
        return {"rows": len(ids_S16), "largest_exponent": largest}
    shared = load_arrays(context.storage, arguments["scan"])
    scan = Scan(arguments["number"], shared["prices"], shared["reach"], arguments["rate"], arguments["most"])
    found = scan_rows(batches, grid, int(shared["unit"][0]), scan)
    save_arrays(context.scratch("found"), found.to_arrays())
    return {"rows": int(found.counts_K.sum()), "collected": len(found.ids_M16)}


def sample_rows(batches: Batches, grid: CostGrid, fraction: float) -> tuple[NDArray[np.uint8], NDArray[np.float64], int]:
    """The rows whose hash falls under the sample's share: ids, costs before rounding; and the largest exponent of all rows."""
    ids, costs = [np.empty((0, 16), np.uint8)], [np.empty((0, len(grid.norms_K)))]
    largest = np.iinfo(np.int32).min
    for ids_B16, features_BD in row_blocks(batches, grid):
        costs_BK, exponents_B = grid.measure(features_BD)
        largest = max(largest, int(exponents_B.max()))
        chosen_B = hash_fractions(ids_B16, grid.seed, "balance-sample") < fraction
        ids.append(ids_B16[chosen_B])
        costs.append(costs_BK[chosen_B])
    return np.concatenate(ids), np.concatenate(costs), largest


def scan_rows(batches: Batches, grid: CostGrid, unit: int, scan: Scan) -> Found:
    """What a pass finds in some rows."""
    found = [Found.zero(len(grid.norms_K))]
    for ids_B16, features_BD in row_blocks(batches, grid):
        costs_BK = grid.to_integers(grid.measure(features_BD)[0], ids_B16, unit)
        found.append(Found.in_batch(costs_BK, ids_B16, scan, grid.seed))
    return Found.joined(found)
