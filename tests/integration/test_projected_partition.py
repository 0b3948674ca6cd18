"""Principal directions and spherical k-means through the command line: the same bytes whatever happens, and what is said."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.preprocessing import normalize
from support import copied_run, invoke, partition, records, refusal, write_recipe
from test_theorems_partition import by_id, payload

from hardmoe.arrays import load_arrays
from hardmoe.mixture import Mixture
from hardmoe.storage import open_storage

KEPT = ("dataset", "vocabulary", "trunk", "features")
PROJECTED = {"experts": 3, "max_passes": 5, "transform": "whiten", "components": 4, "spherical": True}
ROUTER = ("centroids.npy", "transform.safetensors", "router.json")


def project(directory: Path, finished: Path, **partition: Any) -> Path:
    """A directory with a copy of a run up to its features, to be partitioned by other settings; returns the root."""
    root = copied_run(finished, directory, keep=KEPT)
    write_recipe(directory, partition={**PROJECTED, **partition})
    return root


def features(root: Path, pattern: str = "features/split=train/*.parquet") -> tuple[list[bytes], NDArray[np.float64]]:
    """Ids and features, read without hardmoe."""
    found = by_id(root.glob(pattern))
    return list(found), np.array([row["feature"] for row in found.values()], np.float64)


@pytest.fixture(scope="module")
def projected_root(tmp_path_factory: pytest.TempPathFactory, finished: Path) -> Path:
    """Whitened and spherical, inline and uninterrupted."""
    directory = tmp_path_factory.mktemp("projected")
    made = project(directory, finished)
    result = partition(directory)
    assert result.returncode == 0, result.stderr
    share = payload(made, "router")["transform"]["explained"]
    dim = payload(made, "features")["dim"]
    said = f"by distances along 4 principal directions of {dim}, whitened: {100 * share:.1f} % of the features' variance"
    assert said in result.stdout
    return made


def test_assignments_equal_a_brute_force_over_scikit_learns_directions(projected_root: Path) -> None:
    _, training = features(projected_root)
    ids, vectors = features(projected_root, "features/split=*/*.parquet")
    pca = PCA(4, whiten=True, svd_solver="full").fit(training)
    arrays = load_arrays(open_storage(str(projected_root)), "router/transform.safetensors")
    signs = np.sign((pca.components_ * arrays["directions"]).sum(axis=1))
    unit = normalize(pca.transform(vectors) * signs)
    centroids = np.load(projected_root / "router" / "centroids.npy", allow_pickle=False).astype(np.float64)
    assert centroids.shape == (3, 4)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1.0, atol=1e-7)
    distances = np.linalg.norm(unit[:, None] - centroids, axis=2)
    assigned = by_id(projected_root.glob("partition/assignments/*.parquet"))
    clear = np.diff(np.sort(distances, axis=1)[:, :2]).ravel() > 1e-3
    assert clear.mean() > 0.95
    found = np.array([assigned[key]["expert"] for key in ids])
    np.testing.assert_array_equal(distances.argmin(axis=1)[clear], found[clear])
    np.testing.assert_allclose(
        distances.min(axis=1)[clear], np.array([assigned[key]["distance"] for key in ids])[clear], atol=1e-3
    )
    told = payload(projected_root, "router")
    assert told["transform"]["explained"] == pytest.approx(pca.explained_variance_ratio_.sum(), rel=1e-5)
    assert (told["dim"], told["transform"]["of"]) == (vectors.shape[1], vectors.shape[1])
    assert "zero_vectors" not in told


def test_four_ray_workers_give_the_same_bytes(projected_root: Path, finished: Path, tmp_path: Path) -> None:
    other = project(tmp_path, finished)
    result = partition(tmp_path, "ray")
    assert result.returncode == 0, result.stderr
    assert records(other) == records(projected_root)


def test_another_sharding_gives_the_same_router_and_parts(projected_root: Path, resharded_root: Path, tmp_path: Path) -> None:
    other = copied_run(resharded_root.parents[1], tmp_path, keep=KEPT)
    write_recipe(tmp_path, dataset={"shard_rows": 47}, partition=PROJECTED)
    result = partition(tmp_path)
    assert result.returncode == 0, result.stderr
    for name in ROUTER:
        assert (other / "router" / name).read_bytes() == (projected_root / "router" / name).read_bytes(), name
    assert payload(other, "router") == payload(projected_root, "router")
    pattern = "partition/assignments/*.parquet"
    assert by_id(other.glob(pattern)) == by_id(projected_root.glob(pattern))


def test_killed_in_every_phase_and_resumed_equals_uninterrupted(projected_root: Path, finished: Path, tmp_path: Path) -> None:
    other = project(tmp_path, finished)
    for moment in ("moments/00001", "directions/all", "sample/00001", "start/01", "pass-0000/00002", "pass-0001/00000"):
        result = partition(tmp_path, die_at=moment)
        assert result.returncode == -signal.SIGKILL, f"{moment}: {result.stdout}{result.stderr}"
        assert not (other / "router" / "artifact.json").exists()
    result = partition(tmp_path)
    assert result.returncode == 0, result.stderr
    assert records(other) == records(projected_root)


def test_resumed_fit_goes_on_with_the_directions_it_has_and_asks_lapack_no_more(
    projected_root: Path, finished: Path, tmp_path: Path
) -> None:
    """On a machine whose LAPACK errs by other bits, half of the passes would otherwise look at other features."""
    other = project(tmp_path, finished)
    assert partition(tmp_path, die_at="sample/00000").returncode == -signal.SIGKILL
    result = partition(tmp_path, patch="from hardmoe.partitioning import transform_fit; del transform_fit.fit_transform")
    assert result.returncode == 0, result.stderr
    assert records(other) == records(projected_root)


def test_new_images_are_projected_the_same_way_and_the_report_says_so(finished: Path, tmp_path: Path) -> None:
    other = project(tmp_path, finished)
    write_recipe(tmp_path, partition=PROJECTED, experts={"epochs": 1}, evaluation={"dense_baseline": False})
    result = invoke(tmp_path, "run", "--backend", "inline")
    assert result.returncode == 0, result.stderr
    rows = [row for path in other.glob("dataset/split=train/*.parquet") for row in pq.read_table(path).to_pylist()]
    assigned = by_id(other.glob("partition/assignments/*.parquet"))
    mixture = Mixture.load(str(other))
    wanted = [assigned[row["example_id"]]["expert"] for row in rows]
    np.testing.assert_array_equal(mixture.route([row["image"] for row in rows]), wanted)
    np.testing.assert_array_equal(mixture.route([rows[0]["image"]]), wanted[:1])
    page = (other / "report" / "index.html").read_text()
    share = payload(other, "router")["transform"]["explained"]
    assert re.search(rf"4 of \d+, {100 * share:.1f}\N{{NO-BREAK SPACE}}% of the variance", page)
    shown = invoke(tmp_path, "show", "router")
    assert '"explained"' in shown.stdout
    write_recipe(tmp_path, "other.yaml", root="runs/other")
    checked = invoke(tmp_path, "partition", "--check", "other.yaml", "--backend", "inline", "--json")
    assert checked.returncode == 0, checked.stderr
    assert json.loads(checked.stdout)["sets"]["training"]["sizes"] == payload(other, "partition")["sizes"]["train"]


def test_balanced_parts_and_copies_go_by_projected_distances(finished: Path, tmp_path: Path) -> None:
    other = project(tmp_path, finished, method="balanced", slack=0.02, overlap=1.1)
    result = invoke(tmp_path, "partition", "--backend", "inline")
    assert result.returncode == 0, result.stderr
    told = payload(other, "partition")
    assert max(told["sizes"]["train"]) <= told["balance"]["capacity"]
    assert sum(told["extra"]["overlap"]) > 0


def test_given_parts_have_their_means_in_projected_space(finished: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for path in sorted(photos.iterdir()):
        table = pq.read_table(path)
        parts = [image[-20] % 3 for image in table.column("image").to_pylist()]
        pq.write_table(table.append_column("cluster", pa.array(parts, pa.int64())), tmp_path / "photos" / path.name)
    settings = {"method": "given", "experts": 3, "transform": "pca", "spherical": False, "components": 5}
    write_recipe(tmp_path, dataset={"part_column": "cluster"}, partition=settings)
    result = invoke(tmp_path, "partition", "--backend", "inline")
    assert result.returncode == 0, result.stderr
    root = tmp_path / "runs" / "small"
    ids, vectors = features(root)
    assigned = by_id(root.glob("partition/assignments/*.parquet"))
    parts = np.array([assigned[key]["expert"] for key in ids])
    pca = PCA(5, svd_solver="full").fit(vectors)
    arrays = load_arrays(open_storage(str(root)), "router/transform.safetensors")
    unit = normalize(pca.transform(vectors) * np.sign((pca.components_ * arrays["directions"]).sum(axis=1)))
    expected = np.stack([unit[parts == part].mean(axis=0) for part in range(3)])
    np.testing.assert_allclose(np.load(root / "router" / "centroids.npy", allow_pickle=False), expected, atol=1e-4)
    assert payload(root, "router")["transform"]["components"] == 5


def test_sweep_fits_its_own_directions_on_the_sample_and_keeps_them(finished: Path, tmp_path: Path) -> None:
    root = project(tmp_path, finished)
    sweep = ("partition", "--sweep", "2,3", "--seeds", "2", "--backend", "inline", "--json")
    told = json.loads(invoke(tmp_path, *sweep).stdout)
    assert told["partition"]["components"] == 4 and told["partition"]["spherical"] is True
    # The whole training split is the sample here, so its directions are those of the router.
    (sample,) = root.glob("sweep/sample-*/transform.safetensors")
    assert invoke(tmp_path, "partition", "--backend", "inline").returncode == 0
    assert sample.read_bytes() == (root / "router" / "transform.safetensors").read_bytes()
    plain = json.loads(invoke(tmp_path, *sweep, "--set", "partition.spherical=false").stdout)
    assert plain["sample"] == told["sample"]
    # A mean is nearer to its rows than any point of the sphere.
    assert plain["sweep"][0]["objective"]["mean"] < told["sweep"][0]["objective"]["mean"]


def test_more_directions_than_there_are_is_refused_before_anything_is_built(project_dir: Path, finished: Path) -> None:
    dim = payload(finished / "runs" / "small", "features")["dim"]
    asked = ("--set", "partition.transform=pca", "--set", f"partition.components={dim + 1}")
    sentence = f"partition.components is {dim + 1}, but the features have {dim} dimensions; set it to {dim} or less"
    for arguments in (("partition",), ("partition", "--sweep", "2")):
        assert refusal(invoke(project_dir, *arguments, *asked, "--backend", "inline")).startswith(sentence)
        assert list(project_dir.glob("runs/small/*/_progress/*/*")) == [], "something was begun"
    (with_features := project_dir / "again").mkdir()
    root = project(with_features, finished)
    assert refusal(invoke(with_features, "partition", *asked, "--backend", "inline")).startswith(sentence)
    assert not (root / "router").exists()


@pytest.fixture
def project_dir(project: Path) -> Path:
    """Nothing was run in it yet; this module has another function of the fixture's name."""
    return project
