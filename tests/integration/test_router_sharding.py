"""The same features give the same router, byte for byte: from 1, 7 and 64 shards, from 1 and 4 workers, inline and on Ray.

The router's stage alone, on features that were made up here, so that all of it is fitted in one go in three roots: for every
number of shards, with plain unit features, with whitened ones, on the sphere, and with groups of fine clusters on it.
"""

from collections.abc import Generator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score
from sklearn.preprocessing import normalize

from hardmoe.artifacts.lease import LeaseObserver
from hardmoe.artifacts.store import ArtifactStore
from hardmoe.config import Json
from hardmoe.execution.backend import Backend
from hardmoe.execution.display import LogDisplay
from hardmoe.execution.inline import InlineBackend
from hardmoe.execution.plan import make_plan
from hardmoe.execution.progress import Reporter
from hardmoe.execution.ray.backend import RayBackend
from hardmoe.execution.runner import Runner, RunnerOptions
from hardmoe.neighbours.engine import choose_engine
from hardmoe.partitioning.config import PartitionConfig
from hardmoe.partitioning.router import Router
from hardmoe.partitioning.stages import router_stage
from hardmoe.stage import Completion, DriverContext, Finished, Phase, Stage, Unit, UnitContext
from hardmoe.storage import LocalStorage
from hardmoe.tables import ID_TYPE, build_table, ids_from_array, vector_type, vectors_from_array, write_table

SHARDS = (1, 7, 64)
ROWS, DIM, EXPERTS, SEED = 3000, 24, 5, 7
FILES = ("centroids.npy", "router.json", "transform.safetensors")
SETTINGS: dict[str, dict[str, Any]] = {
    "l2": {"transform": "l2"},
    "whiten": {"transform": "whiten", "components": 6},
    "sphere": {"transform": "pca", "spherical": True},
    "groups": {"method": "two_level", "fine_clusters": 20, "transform": "whiten", "components": 6, "spherical": True},
}


def features() -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.int64]]:
    """Ids, features and the cluster that each was made in: five directions from a mean far away, and much else that varies."""
    rng = np.random.default_rng(SEED)
    cluster = rng.integers(0, EXPERTS, ROWS)
    mixing = np.linalg.qr(rng.standard_normal((DIM, DIM)))[0] * np.geomspace(0.1, 1e-3, DIM)[:, None]
    mixing[:EXPERTS] *= 20.0
    points = rng.standard_normal((ROWS, DIM))
    points[np.arange(ROWS), cluster] += 8.0
    vectors = (points @ mixing + rng.standard_normal(DIM) * 3.0).astype(np.float16)
    return rng.integers(0, 256, (ROWS, 16), dtype=np.uint8), vectors, cluster


class MadeUpFeatures:
    """A `features` artifact in so many shards, of very different sizes, each in an order of its own."""

    def phases(self, context: DriverContext) -> Generator[Phase, list[Completion], Finished]:
        """One unit writes everything."""
        yield Phase("write", [Unit("all")])
        return Finished({"rows": {"train": ROWS}, "dim": DIM})

    def run(self, context: UnitContext) -> Json:
        """Cut the shuffled rows at random."""
        number: int = context.stage.config["shards"]
        rng = np.random.default_rng(number)
        ids, vectors, _ = features()
        order, schema = rng.permutation(ROWS), pa.schema([("example_id", ID_TYPE), ("feature", vector_type(DIM))])
        bounds = [0, *sorted(rng.choice(np.arange(1, ROWS), number - 1, replace=False).tolist()), ROWS]
        for index, (low, high) in enumerate(pairwise(bounds)):
            rows = order[low:high]
            columns = {"example_id": ids_from_array(ids[rows]), "feature": vectors_from_array(vectors[rows])}
            name = f"split=train/part-{index:05d}-of-{number:05d}.parquet"
            write_table(context.output(name), build_table(schema, columns))
        return {}


def stages() -> list[Stage]:
    """The features in every sharding, then every router on each of them."""
    made = [
        Stage(f"features-{number}", "made-up", 1, {"shards": number}, "test_router_sharding:MadeUpFeatures") for number in SHARDS
    ]
    for name, settings in SETTINGS.items():
        config = PartitionConfig(experts=EXPERTS, max_passes=2, restarts=1, tolerance=0.0, sample_size=2000, **settings)
        stage = router_stage(config, SEED)
        made += [replace(stage, name=f"{name}-{number}", inputs={"features": f"features-{number}"}) for number in SHARDS]
    return made


def build(root: Path, wanted: list[Stage], backend: Backend, parallel: int | None = None) -> None:
    store = ArtifactStore(LocalStorage(root))
    observer = LeaseObserver(store.storage, heartbeat=3600)
    reporter = Reporter(store.storage, LogDisplay())
    Runner(store, lambda: backend, reporter, RunnerOptions(parallel), observer).run(make_plan(store, wanted))


def files(root: Path, name: str) -> dict[str, bytes]:
    return {file: (root / name / file).read_bytes() for file in FILES}


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inline")
    build(root, stages(), InlineBackend())
    return root


@pytest.mark.parametrize("name", SETTINGS)
def test_router_s_files_are_the_same_from_1_7_and_64_shards(inline: Path, name: str) -> None:
    store = ArtifactStore(LocalStorage(inline))
    expected, told = files(inline, f"{name}-1"), store.get(f"{name}-1").payload
    for number in SHARDS:
        assert len(list(inline.glob(f"features-{number}/split=train/*.parquet"))) == number
        assert files(inline, f"{name}-{number}") == expected
        assert store.get(f"{name}-{number}").payload == told


@pytest.mark.parametrize("workers", [1, 4])
def test_router_s_files_are_the_same_on_ray(inline: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    made = [stage for stage in stages() if stage.kind == "made-up"]
    build(tmp_path, made, InlineBackend())  # workers know nothing of this module
    routers = [stage for stage in stages() if stage.name.startswith(("l2", "whiten"))]
    build(tmp_path, [*made, *routers], RayBackend("local"), workers)
    for stage in routers:
        assert files(tmp_path, stage.name) == files(inline, stage.name), stage.name
        record = f"{stage.name}/artifact.json"
        assert (tmp_path / record).read_bytes() == (inline / record).read_bytes()


def test_routers_are_those_of_scikit_learn(inline: Path) -> None:
    """So that it is not the same nonsense everywhere."""
    _, vectors, cluster = features()
    pca = PCA(6, whiten=True, svd_solver="full").fit(vectors.astype(np.float64))
    whitened = normalize(pca.transform(vectors.astype(np.float64)))
    theirs = KMeans(EXPERTS, n_init=10, random_state=0).fit_predict(whitened)
    router = Router.from_files(files(inline, "whiten-7"))
    ours = router.route(vectors.astype(np.float32), choose_engine()).primary_N
    assert adjusted_rand_score(theirs, ours) > 0.98
    assert adjusted_rand_score(cluster, ours) > 0.9
    told = ArtifactStore(LocalStorage(inline)).get("whiten-7").payload["transform"]
    assert told["explained"] == pytest.approx(pca.explained_variance_ratio_.sum(), rel=1e-6)
    assert (told["kind"], told["components"], told["of"]) == ("whiten", 6, DIM)
    on_sphere = Router.from_files(files(inline, "sphere-7"))
    assert on_sphere.centroids_KD.shape == (EXPERTS, DIM)
    np.testing.assert_allclose(np.linalg.norm(on_sphere.centroids_KD.astype(np.float64), axis=1), 1.0, atol=1e-7)
