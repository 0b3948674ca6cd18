"""Theorem 10: whatever is wrong with a root has an error of its own, which names the path and what to do."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import copied_run, hardmoe, records, run_here, succeed

from hardmoe.artifacts.store import ArtifactStore
from hardmoe.data.schemas import FEATURES
from hardmoe.errors import CorruptFileError, MissingRecordError, SchemaError, UnitsFailedError
from hardmoe.storage import open_storage
from hardmoe.tables import read_table

SHARD = "features/split=train/part-00001-of-00004.parquet"


@pytest.fixture
def damaged(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged; the router and what stands on it is gone."""
    return copied_run(finished, tmp_path, keep=("dataset", "vocabulary", "trunk", "features"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def rename_column(path: Path) -> None:
    table = pq.read_table(path, partitioning=None)
    pq.write_table(table.rename_columns(["example_id", "vector"]), path)


def change_type(path: Path) -> None:
    table = pq.read_table(path, partitioning=None)
    whole = pa.array(table.column("feature").to_pylist(), pa.list_(pa.float32()))
    pq.write_table(table.set_column(1, "feature", whole), path)


@pytest.mark.parametrize(
    ("damage", "error", "sentence"),
    [
        (truncate, CorruptFileError, "is truncated or not Parquet"),
        (rename_column, SchemaError, "has no column 'feature'; it has example_id, vector"),
        (change_type, SchemaError, "column 'feature' is list<element: float> where"),
    ],
)
def test_a_damaged_shard_stops_what_reads_it_with_its_own_error_and_path(
    damaged: Path, damage, error: type[Exception], sentence: str
) -> None:
    damage(damaged / SHARD)
    with pytest.raises(error) as caught:
        read_table(open_storage(str(damaged)), SHARD, FEATURES)
    result = hardmoe(damaged.parent.parent, "partition", "--backend", "inline")
    assert result.returncode == 3
    for text in (str(caught.value), result.stderr):
        assert f"{damaged}/{SHARD}" in text
        assert sentence in text
    assert "Traceback" not in result.stderr
    assert not (damaged / "router/artifact.json").exists()


def test_a_missing_image_shard_stops_the_features_and_is_named(damaged: Path) -> None:
    shard = "dataset/split=train/part-00002-of-00004.parquet"
    (damaged / "features/artifact.json").unlink()
    (damaged / shard).unlink()
    with pytest.raises(UnitsFailedError, match=re.escape(f"{damaged}/{shard}: there is no such file")):
        run_here(damaged.parent.parent, "partition")


def test_an_artifact_whose_record_is_missing_does_not_exist_and_is_built_again(
    finished: Path, root: Path, tmp_path: Path
) -> None:
    copy = copied_run(finished, tmp_path)
    (copy / "features/artifact.json").unlink()
    with pytest.raises(MissingRecordError, match=re.escape(f"{copy}/features/artifact.json does not exist")):
        ArtifactStore(open_storage(str(copy))).get("features")
    shown = hardmoe(tmp_path, "show", "features")
    assert shown.returncode == 1
    assert f"{copy}/features/artifact.json does not exist: 'features' was never finished" in shown.stderr
    verified = hardmoe(tmp_path, "verify")
    assert verified.returncode == 1
    assert "features: missing" in verified.stdout
    assert "router: BAD: its input 'features' is missing" in verified.stdout
    run_here(tmp_path, "run")
    assert records(copy) == records(root)


def test_a_record_that_cannot_be_read_is_named(damaged: Path) -> None:
    truncate(damaged / "trunk/artifact.json")
    result = hardmoe(damaged.parent.parent, "run", "--backend", "inline")
    assert result.returncode == 1
    assert f"{damaged}/trunk/artifact.json is not a record" in result.stderr
    assert "delete the artifact's directory and run again" in result.stderr


def test_a_drifted_recipe_is_refused_with_the_field_and_both_remedies(finished: Path, root: Path) -> None:
    before = records(root)
    result = hardmoe(finished, "run", "--backend", "inline", "--set", "trunk.learning_rate=0.3")
    assert result.returncode == 1
    assert f"{root}/trunk was built from another recipe (trunk.learning_rate: 0.1 -> 0.3)" in result.stderr
    assert "either put the recipe back" in result.stderr
    assert f"reuse: [{root}]" in result.stderr
    assert records(root) == before


def test_an_input_that_was_built_anew_is_refused_not_silently_mixed(finished: Path, tmp_path: Path) -> None:
    """As when an expert is trained again on a GPU: the same recipe and other weights."""
    copy = copied_run(finished, tmp_path)
    record = copy / "experts/expert-0002/artifact.json"
    body = json.loads(record.read_bytes())
    body["payload"]["final_loss"] += 0.5
    record.write_text(json.dumps(body))
    result = hardmoe(tmp_path, "run", "--backend", "inline")
    assert result.returncode == 1
    assert f"{copy}/embeddings stands on an earlier 'experts/expert-0002'" in result.stderr
    assert f"delete {copy}/embeddings" in result.stderr


def test_verify_finds_nothing_wrong_with_a_finished_run(finished: Path) -> None:
    lines = succeed(finished, "verify").splitlines()
    assert len(lines) == 16
    assert all(re.fullmatch(r"[a-z/_0-9-]+: ok, \d+ files?", line) for line in lines), lines


def test_verify_finds_truncated_altered_and_missing_files_all_at_once(finished: Path, tmp_path: Path) -> None:
    copy = copied_run(finished, tmp_path)
    truncate(copy / SHARD)
    weights = copy / "experts/expert-0001/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    (copy / "router/centroids.npy").unlink()
    result = hardmoe(tmp_path, "verify")
    assert result.returncode == 1
    bad = dict(line.split(": BAD: ") for line in result.stdout.splitlines() if ": BAD: " in line)
    size = (copy / SHARD).stat().st_size
    assert bad == {
        "features": f"{copy}/{SHARD} has {size} bytes where its record says {size + 100}",
        "experts/expert-0001": f"{weights} has other content than its record says (SHA-256 differs)",
        "router": f"{copy}/router/centroids.npy is missing although a record vouches for it",
    }
    assert "3 artifacts are damaged" in result.stderr
