"""The run's directory as others' scripts read it: which files there are, and the columns of every table."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

PATHS = """
    recipe.yaml
    versions.json
    dataset/split=train/part-00000-of-*.parquet
    dataset/split=validation/part-00000-of-*.parquet
    dataset/split=test/part-00000-of-*.parquet
    dataset/origin/part-*.parquet
    vocabulary/tags.parquet
    vocabulary/dropped.parquet
    vocabulary/labels/part-*.parquet
    vocabulary/ranges.parquet
    trunk/model.safetensors
    trunk/trunk.json
    features/split=train/part-00000-of-*.parquet
    router/centroids.npy
    router/transform.safetensors
    router/router.json
    partition/split=train/expert=0000/part-*.parquet
    partition/split=test/expert=0002/part-*.parquet
    partition/assignments/part-*.parquet
    experts/expert-0000/model.safetensors
    experts/expert-0000/metrics.jsonl
    experts/expert-0002/artifact.json
    embeddings/split=train/part-*.parquet
    decoder/decoder.safetensors
    evaluation/metrics.json
    report/index.html
"""

SCHEMAS = {
    "dataset/split=*/part-*.parquet": "example_id: fixed_size_binary[16], image: binary, tags: list<string>",
    "dataset/origin/part-*.parquet": "example_id: fixed_size_binary[16], source_uri: string, license: string",
    "vocabulary/tags.parquet": "index: int32, tag: string, count: int64",
    "vocabulary/dropped.parquet": "tag: string, count: int64, reason: string",
    "vocabulary/labels/part-*.parquet": "example_id: fixed_size_binary[16], tags: list<int32>",
    "vocabulary/ranges.parquet": "file: string, split: string, first: fixed_size_binary[16], last: fixed_size_binary[16]",
    "features/split=*/part-*.parquet": "example_id: fixed_size_binary[16], feature: fixed_size_list<halffloat>",
    "partition/split=*/expert=*/part-*.parquet": (
        "example_id: fixed_size_binary[16], image: binary, tags: list<string>, distance: float"
    ),
    "partition/assignments/part-*.parquet": (
        "example_id: fixed_size_binary[16], split: string, expert: int32, distance: float, second: int32, "
        "second_distance: float, primary: bool"
    ),
    "embeddings/split=*/part-*.parquet": (
        "example_id: fixed_size_binary[16], expert: int32, embedding: fixed_size_list<halffloat>"
    ),
}

SYSTEMS = {"trunk", "dense", "dense_refit", "experts_own_decoder", "mixture"}
METRICS = {"precision@1", "precision@5", "precision@10", "recall@10", "hit@1", "hit@5", "map"}
ARTIFACTS = """
    dataset vocabulary trunk features router partition experts/expert-0000 embeddings decoder evaluation report
"""


def _type(type_: pa.DataType) -> str:
    """A type's name without what differs from run to run: the length of a vector, the name of a list's items."""
    if pa.types.is_fixed_size_list(type_):
        return f"fixed_size_list<{type_.value_type}>"
    return f"list<{type_.value_type}>" if pa.types.is_list(type_) else str(type_)


@pytest.fixture
def root(finished: Path) -> Path:
    """A finished run's root."""
    return finished / "runs" / "small"


@pytest.mark.parametrize("pattern", PATHS.split())
def test_path_of_the_contract_exists_in_a_finished_run(root: Path, pattern: str) -> None:
    assert list(root.glob(pattern)), f"no {pattern}"


@pytest.mark.parametrize("pattern", SCHEMAS)
def test_table_has_the_columns_of_the_contract(root: Path, pattern: str) -> None:
    paths = sorted(root.glob(pattern))
    assert paths
    for path in paths:
        schema = pq.read_schema(path)
        assert ", ".join(f"{field.name}: {_type(field.type)}" for field in schema) == SCHEMAS[pattern], path


def test_every_parquet_file_of_a_run_is_vouched_for_by_a_record(root: Path) -> None:
    vouched = {
        record.parent / entry["path"]
        for record in root.rglob("artifact.json")
        for entry in json.loads(record.read_text())["files"]
    }
    stray = [path for path in root.rglob("*.parquet") if path not in vouched and "_progress" not in path.parts]
    assert stray == []


@pytest.mark.parametrize("artifact", ARTIFACTS.split())
def test_artifact_has_a_record_of_what_and_a_provenance_of_when(root: Path, artifact: str) -> None:
    record = json.loads((root / artifact / "artifact.json").read_text())
    provenance = json.loads((root / artifact / "provenance.json").read_text())
    assert set(record) == {"format", "kind", "version", "fingerprint", "config", "inputs", "files", "payload"}
    assert {"argv", "host", "started", "finished", "seconds"} <= set(provenance)
    assert not set(provenance) & {"config", "fingerprint"}


def test_metrics_have_the_systems_names_and_intervals_of_the_contract(root: Path) -> None:
    systems = json.loads((root / "evaluation" / "metrics.json").read_text())["systems"]
    assert set(systems) == SYSTEMS
    for name, metrics in systems.items():
        assert set(metrics) == METRICS, name
        for metric, body in metrics.items():
            assert {"value", "low", "high"} <= set(body), f"{name} {metric}"
            assert 0 <= body["low"] <= body["value"] <= body["high"] <= 1, f"{name} {metric}"
