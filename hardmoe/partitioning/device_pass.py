"""One pass of k-means over features on a device: the assignment, the distances and the sums that `scan` gives, to the bit.

Three searches, each for the rows that the one before could not decide: all rows by float32 products, the few whose nearest two
are closer than float32 can tell by float64 products, both on the device, and the ties that are left by definition on the host,
where rows that are not finite, or too long to be summed in 63 bits, end as well. Only integers are summed, so neither the tiles
nor the order of a device's atomic additions show in the result.

Rejected: searching on the device and summing on the host, which copies every row back; one precision for all rows (float64 is
slow for all of them, and float32's near-ties, a row in some hundreds, would make the host the slowest part).

Shape letters: N rows, D feature dim, K clusters, T rows of a tile, R rows that float32 did not decide, H rows for the host.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from hardmoe.neighbours.assignment import Assignment, exact_nearest, non_finite, squared_distances
from hardmoe.neighbours.torch_engine import full_float32
from hardmoe.partitioning import device_kernel
from hardmoe.partitioning.device_tiles import (
    GRID_BITS,
    DeviceCentroids,
    add_rows,
    measure,
    objective_parts,
    objective_units,
    search,
)
from hardmoe.partitioning.exact_sums import ClusterSums

_TILE_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}  # of features plus scores: 0.3 GB of float64 at a time on a GPU
_MOST_TILE_ROWS = 2**17
_ROOM = 2.0**29
"""Of the sum of a tile's norms: a quarter of what 63 bits hold in steps of 2^-32, as norms are float32 sums."""


def scan_on(
    device: torch.device, features_ND: NDArray[np.float32], centroids_KD: NDArray[np.float32]
) -> tuple[Assignment, ClusterSums]:
    """What `scan.scan` gives, from a device."""
    this_pass = DevicePass(centroids_KD, device)
    primary_N, squared_N = this_pass.take(torch.tensor(features_ND, device=device))
    nowhere_N = np.full(len(features_ND), -1, np.int32)
    return Assignment(primary_N.cpu().numpy(), nowhere_N, squared_N.cpu().numpy()), this_pass.sums()


class DevicePass:
    """A pass against some centroids: `take` chunks of features, then `sums`."""

    def __init__(self, centroids_KD: NDArray[np.float32], device: torch.device) -> None:
        """Of finite centroids, float32 [K, D]."""
        self._centroids = DeviceCentroids.of(centroids_KD, device)
        num_clusters, dim = centroids_KD.shape
        elements = _TILE_ELEMENTS.get(device.type, _TILE_ELEMENTS["cpu"])
        self._tile = max(1, min(_MOST_TILE_ROWS, elements // (dim + num_clusters)))
        self._longest = _ROOM / self._tile
        self._kernel = device_kernel.Kernel(self._centroids) if device_kernel.suits(self._centroids) else None
        self._units_XD = torch.zeros((num_clusters + 1, dim), dtype=torch.int64, device=device)
        self._high_XD, self._low_XD = self._units_XD.clone(), self._units_XD.clone()
        self._counts_X = torch.zeros(num_clusters + 1, dtype=torch.int64, device=device)
        self._parts: list[torch.Tensor] = []
        self._on_host = ClusterSums.zero(num_clusters, dim)

    def take(self, features_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Assign and add rows.

        Args:
            features_ND: float16 or float32 [N, D], on the pass's device.

        Returns:
            Nearest centroids int32 [N] and squared distances float64 [N], on the device.

        Raises:
            DataError: a feature is NaN, infinite or too large to be summed exactly.
        """
        with full_float32(features_ND.device.type):
            primary_N, squared_N = self._search_all(features_ND)
            undecided_R = torch.nonzero(primary_N < 0).squeeze(1)
            num_bad = 0
            for rows_T in torch.split(undecided_R, self._tile):
                features_TD = features_ND[rows_T]
                primary_T, squared_T = self._tile_of(features_TD, torch.float64)
                num_bad += self._by_definition(features_TD, primary_T, squared_T)
                primary_N[rows_T], squared_N[rows_T] = primary_T, squared_T
                self._parts.append(objective_parts(squared_T))
        if num_bad:
            raise non_finite(num_bad, len(features_ND))
        return primary_N, squared_N

    def sums(self) -> ClusterSums:
        """Of all rows taken."""
        high_KD, low_KD = (each[:-1].cpu().numpy() for each in (self._high_XD, self._low_XD))
        units = sum(objective_units(parts) for parts in self._parts)
        # Adding brings the low parts, sums of up to 2^31 tiles, into their range.
        return self._on_host + ClusterSums(self._counts_X[:-1].cpu().numpy(), high_KD, low_KD, units)

    def _search_all(self, features_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The first search of all rows, and the sums of those that it decides."""
        num_clusters, dim = self._centroids.host_KD.shape
        if self._kernel and device_kernel.works(features_ND.device, num_clusters, dim, features_ND.dtype):
            found = self._kernel.run(features_ND)
            self._high_XD[:-1] += found.high_KD
            self._low_XD[:-1] += found.low_KD
            self._counts_X[:-1] += found.counts_K
            self._parts.append(found.objective)
            return found.primary_N, found.squared_N
        primary_N = torch.empty(len(features_ND), dtype=torch.int32, device=features_ND.device)
        squared_N = torch.empty(len(features_ND), dtype=torch.float64, device=features_ND.device)
        for start in range(0, len(features_ND), self._tile):
            rows = slice(start, start + self._tile)
            primary_N[rows], squared_N[rows] = self._tile_of(features_ND[rows], torch.float32)
        self._parts.append(objective_parts(squared_N))
        return primary_N, squared_N

    def _tile_of(self, features_TD: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Search, measure and add the rows that the precision decides; -1 and 0 for the others."""
        primary_T = search(features_TD, self._centroids, dtype, self._longest)
        add_rows(features_TD, primary_T, self._units_XD, self._counts_X)
        self._high_XD += self._units_XD >> GRID_BITS
        self._low_XD += self._units_XD & (2**GRID_BITS - 1)
        self._units_XD.zero_()
        return primary_T, measure(features_TD, self._centroids, primary_T)

    def _by_definition(self, features_TD: torch.Tensor, primary_T: torch.Tensor, squared_T: torch.Tensor) -> int:
        """Decide, measure and add on the host what is still -1, in place; returns how many rows are not finite."""
        rows_H = torch.nonzero(primary_T < 0).squeeze(1)
        if not len(rows_H):
            return 0
        features_HD = features_TD[rows_H].float().cpu().numpy()
        num_bad = int((~np.isfinite(features_HD).all(axis=1)).sum())
        if num_bad:
            return num_bad
        centroids_KD, every_H = self._centroids.host_KD, np.arange(len(features_HD))
        nearest_H = np.zeros(len(features_HD), np.int32)
        if len(centroids_KD) > 1:
            nearest_H = exact_nearest(features_HD, centroids_KD, every_H).astype(np.int32)
        found = Assignment(nearest_H, nearest_H, np.zeros(len(nearest_H)))
        self._on_host += ClusterSums.from_batch(features_HD, found, len(centroids_KD))
        distances_H = squared_distances(features_HD, centroids_KD, every_H, nearest_H)
        primary_T[rows_H] = torch.from_numpy(nearest_H).to(primary_T.device)
        squared_T[rows_H] = torch.from_numpy(distances_H).to(squared_T.device)
        return 0
