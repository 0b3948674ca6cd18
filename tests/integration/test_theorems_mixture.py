"""Theorems 6 to 9: an expert knows nothing of the others, one expert is the dense baseline, the decoder leaves the experts
alone, and the numbers of the experts mean nothing.

Shape letters: N examples, D feature dim, V tags.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray
from PIL import Image
from support import PREPARATION, copied_run, hardmoe, metrics, records, run_here

from hardmoe.artifacts.store import Artifact, ArtifactStore
from hardmoe.evaluation.scoring import build_scorer
from hardmoe.models.backbones import TagClassifier
from hardmoe.partitioning.regroup import load_router
from hardmoe.partitioning.router import Router
from hardmoe.storage import Storage, open_storage
from hardmoe.training.inference import predict_features
from hardmoe.training.network import load_network

CPU = torch.device("cpu")
EXPERTS = ("expert-0000", "expert-0001", "expert-0002")


def embeddings(root: Path, name: str) -> dict[bytes, bytes]:
    """The bits of every example's embedding, by id."""
    tables = [pq.read_table(path, partitioning=None) for path in sorted(root.glob(f"{name}/split=*/*.parquet"))]
    found = [row for table in tables for row in table.to_pylist()]
    return {row["example_id"]: np.array(row["embedding"], np.float16).tobytes() for row in found}


def test_expert_trained_alone_is_the_expert_of_the_full_run(finished: Path, root: Path, tmp_path: Path) -> None:
    alone = copied_run(finished, tmp_path, keep=PREPARATION)
    run_here(tmp_path, "train-experts", "--only", "expert-0001")
    built = {name: body for name, body in records(alone).items() if name.startswith("experts/")}
    assert built == {"experts/expert-0001/artifact.json": (root / "experts/expert-0001/artifact.json").read_bytes()}


def test_a_single_expert_has_the_weights_of_the_dense_baseline(root_of_one_expert: Path) -> None:
    expert, dense = root_of_one_expert / "experts/expert-0000", root_of_one_expert / "baselines/dense"
    # The dense baseline was not trained beside it but taken over from the run with three experts.
    reused_from = Path(json.loads((dense / "artifact.json").read_bytes())["reused_from"])
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (expert / name).read_bytes() == (reused_from / name).read_bytes(), name


def test_a_single_experts_embeddings_are_the_dense_baselines(root: Path, root_of_one_expert: Path) -> None:
    """The parts' shards are others than the dataset's, and still every bit is the same."""
    assert embeddings(root_of_one_expert, "embeddings") == embeddings(root, "baselines/dense_embeddings")


def test_the_mixture_of_a_single_expert_is_the_refitted_dense_baseline(root: Path, root_of_one_expert: Path) -> None:
    for name in ("decoder.safetensors", "metrics.jsonl"):
        first, second = root_of_one_expert / "decoder" / name, root / "baselines/dense_refit" / name
        assert first.read_bytes() == second.read_bytes(), name
    results = metrics(root_of_one_expert)
    assert results["systems"]["mixture"] == results["systems"]["dense_refit"]
    assert results["systems"]["experts_own_decoder"] == results["systems"]["dense"]
    assert results["systems"]["dense_refit"] == metrics(root)["systems"]["dense_refit"]
    for metric, difference in results["differences"]["mixture - dense_refit"].items():
        assert (difference["value"], difference["low"], difference["high"]) == (0, 0, 0), metric


def test_fitting_the_decoder_leaves_every_bit_of_the_experts(finished: Path, tmp_path: Path) -> None:
    root = copied_run(finished, tmp_path, keep=(*PREPARATION, "experts"))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (root / "experts").rglob("*") if path.is_file()}
    run_here(tmp_path, "fit-decoder")
    assert (root / "decoder/decoder.safetensors").exists()
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before


def test_the_decoder_is_the_same_where_the_embeddings_do_not_fit_in_memory(finished: Path, root: Path, tmp_path: Path) -> None:
    again = copied_run(finished, tmp_path, keep=(*PREPARATION, "experts", "embeddings"))
    run_here(tmp_path, "fit-decoder", "--set", "decoder.memory_gib=0.00001")
    for name in ("decoder.safetensors", "metrics.jsonl", "artifact.json"):
        assert (again / "decoder" / name).read_bytes() == (root / "decoder" / name).read_bytes(), name


def test_the_decoder_does_not_even_read_the_experts(root: Path) -> None:
    inputs = json.loads((root / "decoder/artifact.json").read_bytes())["inputs"]
    assert {reference["artifact"] for reference in inputs.values()} == {"embeddings", "vocabulary", "trunk"}
    cached = json.loads((root / "embeddings/artifact.json").read_bytes())["inputs"]
    assert {reference["artifact"] for reference in cached.values()} == {"partition", *(f"experts/{e}" for e in EXPERTS)}


@dataclass(frozen=True)
class _File:
    """An artifact that is one directory of files, for pieces that are to be read from elsewhere."""

    storage: Storage
    payload: None = None

    def path(self, relative: str) -> str:
        return relative

    def files(self, prefix: str = "", suffix: str = "") -> list[str]:
        return self.storage.list("")

    def read(self, relative: str) -> bytes:
        return self.storage.read_bytes(relative)


@dataclass(frozen=True)
class _Mixture:
    """The public pieces of a mixture, put together by hand."""

    trunk: TagClassifier
    router: Router
    experts: Sequence[TagClassifier]
    decoder: Artifact | _File

    def scores(self, images_N3SS: NDArray[np.uint8]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Every image's expert, and its scores float32 [N, V], by one pass of the trunk and one of the expert."""
        experts_N = self.router.route(_features(self.trunk, images_N3SS)).primary_N
        embeddings_ND = np.zeros((len(images_N3SS), self.trunk.backbone.num_features), np.float32)
        for number, expert in enumerate(self.experts):
            embeddings_ND[experts_N == number] = _features(expert, images_N3SS[experts_N == number])
        scorer = build_scorer([self.decoder], shared=True)  # type: ignore[list-item]
        return experts_N, scorer(embeddings_ND, experts_N.astype(np.int64))

    def renumbered(self, order: Sequence[int], directory: Path) -> "_Mixture":
        """The same mixture with expert `order[k]` as number k."""
        tensors = safetensors.torch.load(self.decoder.storage.read_bytes(self.decoder.path("decoder.safetensors")))
        for name in ("alignment.weight", "alignment.bias"):
            tensors[name] = tensors[name][list(order)].contiguous()
        (directory / "decoder.safetensors").write_bytes(safetensors.torch.save(tensors))
        router = Router(self.router.transform, self.router.centroids_KD[list(order)])
        if self.router.group_F is not None:  # the centroids stay, each is another number's
            numbers = np.argsort(order).astype(np.int32)
            router = Router(self.router.transform, self.router.centroids_KD, numbers[self.router.group_F])
        return _Mixture(self.trunk, router, [self.experts[k] for k in order], _File(open_storage(str(directory))))


def _features(network: TagClassifier, images_N3SS: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Features as they are cached: rounded to float16."""
    batches = [batch.numpy() for batch in predict_features(network.backbone, [images_N3SS], 256, CPU)]
    return np.concatenate(batches).astype(np.float16).astype(np.float32)


def mixture_of(root: Path) -> _Mixture:
    store = ArtifactStore(open_storage(str(root)))
    experts = [load_network(store.get(f"experts/{name}")) for name in EXPERTS]
    return _Mixture(load_network(store.get("trunk")), load_router(store.get("router")), experts, store.get("decoder"))


@pytest.fixture(scope="module")
def mixture(root: Path) -> _Mixture:
    return mixture_of(root)


@pytest.fixture(scope="module")
def test_images(root: Path) -> tuple[list[bytes], NDArray[np.uint8]]:
    rows = [
        row for p in sorted(root.glob("dataset/split=test/*.parquet")) for row in pq.read_table(p, partitioning=None).to_pylist()
    ]
    images = [np.array(Image.open(io.BytesIO(row["image"])).convert("RGB")).transpose(2, 0, 1) for row in rows]
    return [row["example_id"] for row in rows], np.stack(images)


@pytest.mark.parametrize("order", [(1, 2, 0), (2, 1, 0)])
def test_renumbering_the_experts_changes_no_prediction(
    mixture: _Mixture, test_images: tuple[list[bytes], NDArray[np.uint8]], order: tuple[int, ...], tmp_path: Path
) -> None:
    assert_renumbering_changes_nothing(mixture, test_images[1], order, tmp_path)


def test_renumbering_the_experts_of_grouped_clusters_changes_no_prediction(
    two_level_root: Path, test_images: tuple[list[bytes], NDArray[np.uint8]], tmp_path: Path
) -> None:
    mixture = mixture_of(two_level_root)
    assert mixture.router.group_F is not None
    assert_renumbering_changes_nothing(mixture, test_images[1], (1, 2, 0), tmp_path)


def assert_renumbering_changes_nothing(
    mixture: _Mixture, images_N3SS: NDArray[np.uint8], order: tuple[int, ...], directory: Path
) -> None:
    experts_N, scores_NV = mixture.scores(images_N3SS)
    renumbered_N, again_NV = mixture.renumbered(order, directory).scores(images_N3SS)
    assert len(np.unique(experts_N)) == 3
    np.testing.assert_array_equal(np.array(order)[renumbered_N], experts_N)
    np.testing.assert_array_equal(again_NV, scores_NV)


def test_a_prediction_by_hand_is_the_one_that_was_evaluated(
    root: Path, mixture: _Mixture, test_images: tuple[list[bytes], NDArray[np.uint8]]
) -> None:
    """Precision@1 counted from images by the pieces equals what the evaluation counted from cached embeddings."""
    labels = {
        row["example_id"]: row["tags"]
        for path in root.glob("vocabulary/labels/*.parquet")
        for row in pq.read_table(path).to_pylist()
    }
    ids, images_N3SS = test_images
    _, scores_NV = mixture.scores(images_N3SS)
    top_N5 = np.argsort(-scores_NV, axis=1, kind="stable")[:, :5]
    judged = [(top, labels[key]) for key, top in zip(ids, top_N5.tolist(), strict=True) if labels[key]]
    results = metrics(root)
    assert len(judged) == results["num_test_examples"]
    expected = results["systems"]["mixture"]["precision@5"]["value"]
    assert np.mean([len(set(top) & set(tags)) / 5 for top, tags in judged]) == pytest.approx(expected, abs=1e-12)


def test_an_expert_that_does_not_exist_is_refused_by_name(finished: Path) -> None:
    result = hardmoe(finished, "train-experts", "--only", "expert-0003", "--backend", "inline")
    assert result.returncode == 1
    assert result.stderr == "error: --only expert-0003: the recipe's experts are expert-0000 to expert-0002\n"
