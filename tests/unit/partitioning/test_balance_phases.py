"""What the balanced partition's driver keeps of the shards' findings."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from balancing import SEED, random_ids

from hardmoe.arrays import save_arrays
from hardmoe.partitioning.balance_pass import Found, Scan
from hardmoe.partitioning.balance_phases import _join
from hardmoe.stage import Completion, DriverContext
from hardmoe.storage import LocalStorage


@dataclass(frozen=True)
class Driver:
    """As much of a driver's context as joining needs."""

    storage: LocalStorage
    stage: SimpleNamespace


def scan_of(rate: float, most: int) -> Scan:
    return Scan(2, np.array([0, 5]), np.full((2, 2), 10**9), rate, most)


def joined(folder: Path, costs: np.ndarray, ids: np.ndarray, scan: Scan) -> Found:
    """Findings in three shards, stored and joined as the driver does it."""
    storage, done = LocalStorage(folder), []
    for number, rows in enumerate((slice(0, 100), slice(100, 120), slice(120, 1000))):
        found = Found.in_batch(costs[rows], ids[rows], scan, SEED)
        save_arrays(storage.open_output(f"{number}"), found.to_arrays())
        done.append(Completion(f"{number}", {"collected": len(found.ids_M16)}, [], {"found": f"{number}"}))
    driver = Driver(storage, SimpleNamespace(config={"seed": SEED}))
    return _join(cast(DriverContext, driver), scan, done)


@pytest.mark.parametrize("rate", [1.0, 0.9])
def test_far_more_near_rows_than_wanted_are_drawn_from_once_more(tmp_path: Path, rate: float) -> None:
    """An excerpt that was guessed a hundred times too small would fill the driver's memory."""
    ids, costs = random_ids(1000), np.random.default_rng(0).integers(0, 1000, (1000, 2))
    whole = Found.in_batch(costs, ids, scan_of(rate, 10**6), SEED)
    few = joined(tmp_path, costs, ids, scan_of(rate, 200))
    np.testing.assert_array_equal(few.counts_K, whole.counts_K)
    np.testing.assert_array_equal(few.near_K, whole.near_K)
    assert 150 < len(few.ids_M16) < 250
    # The same rows as if the lower rate had been asked for in the first place.
    direct = Found.in_batch(costs, ids, scan_of(rate * 200 / len(whole.ids_M16), 200), SEED)
    np.testing.assert_array_equal(few.ids_M16, direct.ids_M16)
    np.testing.assert_array_equal(few.costs_MK, direct.costs_MK)


def test_about_as_many_near_rows_as_wanted_are_all_kept(tmp_path: Path) -> None:
    ids, costs = random_ids(1000), np.random.default_rng(0).integers(0, 1000, (1000, 2))
    found = joined(tmp_path, costs, ids, scan_of(1.0, 600))
    assert len(found.ids_M16) == found.near_K.sum() == 1000
