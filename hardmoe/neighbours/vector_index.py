"""An index of unit vectors for search by cosine, of a kind that goes by their number; the home of faiss's larger indexes.

    flat     up to 200,000 vectors: every one is compared, which takes some 20 ms and is exact
    ivf      up to 5 million: lists around 4 sqrt(N) centroids, of which a query looks at some
    ivfpq    beyond: the same with vectors in a quarter of a byte a dimension, as 10 million of 512 dimensions would be 20 GB

How many lists a query looks at is chosen by measuring: the fewest, by powers of two, with which the recall that is asked for is
reached on vectors held against exact search. Rejected: graphs (HNSW), which are faster to search and cannot be trained on a
sample, take another 40 % of memory, and ten times as long to build.

Shape letters: N vectors, Z dims, Q queries, C neighbours asked for.
"""

from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from hardmoe.errors import CorruptFileError

FLAT, IVF, IVFPQ = "flat", "ivf", "ivfpq"
_MOST_FLAT, _MOST_IVF = 200_000, 5_000_000
_TRAINED_PER_LIST = 64
"""Vectors for each list that its centroid is fitted to, as many as faiss recommends and some."""
_CODE_DIMS = 4
"""Dimensions that share one byte of a code."""


@dataclass(frozen=True)
class IndexPlan:
    """Which index, and what it is fitted to."""

    kind: str
    num_lists: int
    num_trained: int
    """Vectors to fit it to; none for `flat`."""


def plan_index(num_vectors: int, kind: str | None = None) -> IndexPlan:
    """The index for so many vectors, or of the kind given."""
    if kind is None:
        kind = FLAT if num_vectors <= _MOST_FLAT else IVF if num_vectors <= _MOST_IVF else IVFPQ
    if kind == FLAT:
        return IndexPlan(FLAT, 0, 0)
    num_lists = max(1, min(int(4 * num_vectors**0.5), num_vectors // 39 or 1))
    return IndexPlan(kind, num_lists, min(num_vectors, max(256, _TRAINED_PER_LIST * num_lists)))


class VectorIndex:
    """See the module. Vectors have length 1, or 0."""

    def __init__(self, index: Any) -> None:
        self._index = index

    @classmethod
    def fitted(cls, plan: IndexPlan, sample_NZ: NDArray[np.float32]) -> "VectorIndex":
        """An empty index, fitted to a sample of the vectors that are to come."""
        dim = sample_NZ.shape[1]
        if plan.kind == FLAT:
            return cls(faiss.IndexIDMap2(faiss.IndexFlatIP(dim)))
        index = faiss.index_factory(dim, _factory_text(plan, dim), faiss.METRIC_INNER_PRODUCT)
        ivf = faiss.extract_index_ivf(index)
        ivf.cp.seed, ivf.cp.min_points_per_centroid = 0, 1
        index.train(np.ascontiguousarray(sample_NZ))
        return cls(index)

    def add(self, vectors_NZ: NDArray[np.float32], numbers_N: NDArray[np.int64]) -> None:
        """Put vectors in under their numbers."""
        self._index.add_with_ids(np.ascontiguousarray(vectors_NZ), np.ascontiguousarray(numbers_N))

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def dim(self) -> int:
        """Z."""
        return int(self._index.d)

    @property
    def num_lists(self) -> int:
        """How many lists there are; 0 where every vector is compared."""
        return 0 if isinstance(self._index, faiss.IndexIDMap2) else int(faiss.extract_index_ivf(self._index).nlist)

    def set_probes(self, probes: int) -> None:
        """Let every query look at so many lists."""
        if self.num_lists:
            faiss.extract_index_ivf(self._index).nprobe = min(probes, self.num_lists)

    def search(self, queries_QZ: NDArray[np.float32], count: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The nearest vectors of every query, nearest first.

        Returns:
            Their numbers, int64 [Q, C], -1 where fewer were found; and their cosines, float32 [Q, C].
        """
        cosines_QC, numbers_QC = self._index.search(np.ascontiguousarray(queries_QZ), max(1, min(count, len(self))))
        return numbers_QC, cosines_QC

    def to_bytes(self) -> bytes:
        """As faiss writes it."""
        data: bytes = faiss.serialize_index(self._index).tobytes()
        return data

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "VectorIndex":
        """The inverse.

        Raises:
            CorruptFileError: these bytes are no index.
        """
        try:
            return cls(faiss.deserialize_index(np.frombuffer(data, np.uint8)))
        except RuntimeError as error:
            raise CorruptFileError(f"{where} is no index that faiss can read; delete it and run 'hardmoe index' again") from error


def _factory_text(plan: IndexPlan, dim: int) -> str:
    if plan.kind == IVF:
        return f"IVF{plan.num_lists},Flat"
    codes = max(1, dim // _CODE_DIMS)
    return f"OPQ{codes}_{codes * _CODE_DIMS},IVF{plan.num_lists},PQ{codes}"


def unit_rows(vectors_NZ: NDArray[np.float32]) -> NDArray[np.float32]:
    """Every row at length 1; a zero row stays zero."""
    lengths_N = np.sqrt(np.einsum("nz,nz->n", vectors_NZ, vectors_NZ, dtype=np.float64))
    scaled_NZ: NDArray[np.float32] = (vectors_NZ / np.where(lengths_N == 0.0, 1.0, lengths_N)[:, None]).astype(np.float32)
    return scaled_NZ


def exact_neighbours(
    queries_QZ: NDArray[np.float32],
    best: tuple[NDArray[np.int64], NDArray[np.float32]] | None,
    vectors_NZ: NDArray[np.float32],
    numbers_N: NDArray[np.int64],
    count: int,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The nearest of some vectors and of those that were best before, by comparing all: numbers and cosines, [Q, C]."""
    cosines_QN = queries_QZ @ vectors_NZ.T
    numbers_QN = np.broadcast_to(numbers_N, cosines_QN.shape)
    if best is not None:
        numbers_QN, cosines_QN = np.concatenate([best[0], numbers_QN], axis=1), np.concatenate([best[1], cosines_QN], axis=1)
    order_QC = np.argsort(-cosines_QN, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(numbers_QN, order_QC, axis=1), np.take_along_axis(cosines_QN, order_QC, axis=1)


def choose_probes(
    index: VectorIndex, queries_QZ: NDArray[np.float32], exact_QC: NDArray[np.int64], wanted: float
) -> tuple[int, float]:
    """The fewest lists to look at, by powers of two, that reach a recall; and the recall that is reached.

    Recall is the share of the exact neighbours that are found. All lists are looked at if it takes them.
    """
    probes = 1
    while True:
        index.set_probes(probes)
        found_QC, _ = index.search(queries_QZ, exact_QC.shape[1])
        hits = sum(len(np.intersect1d(a, b)) for a, b in zip(found_QC, exact_QC, strict=True))
        recall = hits / max(1, exact_QC.size)
        if recall >= wanted or probes >= index.num_lists:
            return min(probes, max(1, index.num_lists)), recall
        probes *= 2
