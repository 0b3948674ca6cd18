"""A changed recipe or changed photos: refused by name with the remedies, and a new root that takes over what stayed the same."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support import copied_run, invoke, real_images, refusal, snapshot, succeed, write_photos, write_recipe

KEPT = ["dataset", "vocabulary", "trunk", "features", "baselines/dense", "baselines/dense_embeddings", "baselines/dense_refit"]
"""What does not depend on the number of experts."""


@pytest.mark.parametrize(
    ("change", "artifact", "difference"),
    [
        ("partition.experts=4", "router", "partition.experts: 3 -> 4"),
        ("trunk.epochs=2", "trunk", "trunk.epochs: 1 -> 2"),
        ("hashtags.min_count=6", "vocabulary", "hashtags.min_count: 5 -> 6"),
        ("dataset.test_fraction=0.2", "dataset", "dataset.test_fraction: 0.15 -> 0.2"),
        ("decoder.align=none", "decoder", 'decoder.align: "affine" -> "none"'),
        ("seed=1", "trunk", "seed: 0 -> 1"),
    ],
)
def test_changed_recipe_is_refused_with_the_difference_and_both_remedies(
    finished: Path, change: str, artifact: str, difference: str
) -> None:
    before, root = snapshot(finished), finished / "runs" / "small"
    sentence = refusal(invoke(finished, "run", "--set", change))
    assert sentence.startswith(f"{root}/{artifact} was built from another recipe ({difference})")
    assert "put the recipe back" in sentence
    assert f"a new 'root' with 'reuse: [{root}]'" in sentence
    assert snapshot(finished) == before


def test_every_changed_field_of_an_artifact_is_named(finished: Path) -> None:
    sentence = refusal(invoke(finished, "run", "--set", "trunk.epochs=9", "--set", "trunk.stem=small"))
    assert "trunk.epochs: 1 -> 9" in sentence
    assert 'trunk.stem: "auto" -> "small"' in sentence


@pytest.fixture(scope="module")
def reused(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `runs/old`, three experts, and `runs/new`, two experts and the rest taken over; by the command line."""
    directory = tmp_path_factory.mktemp("reused")
    copied_run(finished, directory).rename(directory / "runs" / "old")
    before = snapshot(directory / "runs" / "old")
    write_recipe(directory, root="runs/new", reuse=["runs/old"], partition={"experts": 2})
    dry = invoke(directory, "run", "--dry-run").stdout
    assert [line.split()[0] for line in dry.splitlines() if line.split()[1:2] == ["reused"]] == KEPT
    assert not (directory / "runs" / "new" / "dataset" / "artifact.json").exists()
    succeed(directory, "run", "--backend", "inline")
    assert snapshot(directory / "runs" / "old") == before, "the old run must not be touched"
    return directory


def test_new_root_takes_over_what_is_the_same_and_builds_the_rest(reused: Path) -> None:
    old, new = reused / "runs" / "old", reused / "runs" / "new"
    rows = {row["artifact"]: row["state"] for row in json.loads(invoke(reused, "status", "--json").stdout)}
    assert {name for name, state in rows.items() if state == "reused"} == set(KEPT)
    assert {name for name, state in rows.items() if state != "reused"} == {
        *("router", "partition", "experts/expert-0000", "experts/expert-0001", "embeddings", "decoder", "evaluation", "report")
    }
    assert set(rows.values()) == {"reused", "done"}
    for name in KEPT:
        theirs, ours = (json.loads((root / name / "artifact.json").read_text()) for root in (old, new))
        assert ours.pop("reused_from") == str(old / name)
        assert ours == theirs, "a record that refers to another root says the same as that root's"
        there = {path.name for path in (new / name).iterdir()}
        assert there <= {"artifact.json", "provenance.json", "_progress"}, f"{name} was copied"


def test_verify_and_show_follow_to_the_other_root(reused: Path, tmp_path: Path) -> None:
    shutil.copytree(reused / "runs", tmp_path / "runs")
    old, new = tmp_path / "runs" / "old", tmp_path / "runs" / "new"
    for name in KEPT:
        record = new / name / "artifact.json"
        record.write_text(record.read_text().replace(str(reused), str(tmp_path)))
    assert "BAD" not in succeed(tmp_path, "verify", "--root", str(new))
    assert str(old / "trunk") in invoke(tmp_path, "show", "trunk", "--root", str(new)).stdout
    damaged = old / "trunk" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    result = invoke(tmp_path, "verify", "--root", str(new))
    assert "1 artifact is damaged" in refusal(result)
    (line,) = [line for line in result.stdout.splitlines() if "BAD" in line]
    assert line.startswith(f"trunk: BAD: {damaged} has other content")


def test_old_root_gone_is_one_sentence_and_a_finished_run_does_without(reused: Path) -> None:
    project, old, away = reused, reused / "runs" / "old", reused / "runs" / "moved"
    said = succeed(project, "run")
    old.rename(away)
    try:
        assert invoke(project, "run").stdout == said, "nothing is missing, so nothing of the old run is needed"
        shutil.copytree(project / "runs" / "new", project / "runs" / "again")
        shutil.rmtree(project / "runs" / "again" / "decoder")
        arguments = ["run", "--backend", "inline", "--root", "runs/again"]
        assert refusal(invoke(project, *arguments)) == (
            "reuse names 'runs/old', where no run was begun; correct the root or take it out of 'reuse'"
        )
        sentence = refusal(invoke(project, *arguments, "--set", "reuse=[]"))
        assert sentence.startswith(f"{project}/runs/again/vocabulary was taken over from {old}/vocabulary, which is gone")
        assert "bring it back" in sentence
        result = invoke(project, "verify", "dataset", "--root", "runs/again")
        assert "BAD" in result.stdout and refusal(result)
    finally:
        away.rename(old)
        shutil.rmtree(project / "runs" / "again", ignore_errors=True)


def test_old_root_built_anew_with_other_bytes_is_refused(reused: Path) -> None:
    """What was trained on the old trunk must not be continued on a new one, though the recipe be the same."""
    again, record = reused / "runs" / "again", reused / "runs" / "old" / "trunk" / "artifact.json"
    original = record.read_text()
    shutil.copytree(reused / "runs" / "new", again)
    shutil.rmtree(again / "decoder")
    try:
        body = json.loads(original)
        body["payload"]["final_loss"] += 1e-9
        record.write_text(json.dumps(body))
        sentence = refusal(invoke(reused, "run", "--backend", "inline", "--root", "runs/again"))
        assert sentence.startswith(f"{again}/trunk was taken over from {record.parent}, which was built anew since")
    finally:
        record.write_text(original)
        shutil.rmtree(again)


def test_misspelt_root_to_reuse_is_refused_instead_of_training_everything_again(finished: Path) -> None:
    sentence = refusal(invoke(finished, "run", "--root", "runs/b", "--set", "reuse=[runs/smal]"))
    assert sentence.startswith("reuse names 'runs/smal', where no run was begun")
    assert not (finished / "runs" / "b" / "recipe.yaml").exists()
    shutil.rmtree(finished / "runs" / "b", ignore_errors=True)


def test_dataset_is_taken_over_even_where_its_photos_are_gone(finished: Path, tmp_path: Path) -> None:
    """Ten terabytes of photos, ingested once and deleted: the second recipe must not need them."""
    write_recipe(tmp_path, root="runs/b", reuse=[str(finished / "runs" / "small")], partition={"experts": 2})
    plan = invoke(tmp_path, "run", "--dry-run").stdout
    assert f"{len(KEPT)} would be taken over: {', '.join(KEPT)}" in plan
    other = refusal(invoke(tmp_path, "run", "--dry-run", "--set", "dataset.test_fraction=0.2"))
    assert "matches no file" in other, "another dataset cannot be made without photos"


def grown(photos: Path) -> None:
    """One file changed, one renamed, two new ones."""
    table = pq.read_table(photos / "1.parquet")
    pq.write_table(table.slice(1), photos / "1.parquet")
    (photos / "2.parquet").rename(photos / "two.parquet")
    shutil.copy(photos / "0.parquet", photos / "zero.parquet")


def test_changed_photos_are_refused_by_name_with_the_remedies(finished: Path, tmp_path: Path) -> None:
    root = copied_run(finished, tmp_path)
    (tmp_path / "photos").unlink()
    shutil.copytree(finished / "photos", tmp_path / "photos")
    succeed(tmp_path, "run")
    grown(tmp_path / "photos")
    sentence = refusal(invoke(tmp_path, "run"))
    assert sentence.startswith(f"{root}/dataset was built from other files ")
    assert "changed: 1.parquet; appeared: two.parquet, zero.parquet; vanished: 2.parquet" in sentence
    recorded = json.loads((root / "dataset" / "artifact.json").read_text())["config"]["source"]["sha256"]
    assert f"source.sha256: {recorded[:12]}… -> " in sentence
    assert "put the files back" in sentence and "new 'root'" in sentence
    assert refusal(invoke(tmp_path, "run")) == sentence, "the look that finds the change must not make it forgotten"
    shutil.rmtree(tmp_path / "photos")
    shutil.copytree(finished / "photos", tmp_path / "photos")
    assert invoke(tmp_path, "run").returncode == 0


def test_many_changed_photos_are_counted_and_not_all_listed(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", real_images(60), num_files=12)
    write_recipe(tmp_path, hashtags={"min_count": 60})
    assert "hashtags.min_count=60" in refusal(invoke(tmp_path, "run", "--backend", "inline"))
    for path in (tmp_path / "photos").iterdir():
        path.rename(path.with_name(f"new-{path.name}"))
    sentence = refusal(invoke(tmp_path, "run", "--backend", "inline"))
    assert "appeared: new-0.parquet, new-1.parquet, new-10.parquet and 9 more; vanished: 0.parquet" in sentence
    assert len(sentence) < 500


def test_other_columns_and_other_photos_are_told_as_the_difference_of_the_recipes(finished: Path, tmp_path: Path) -> None:
    copied_run(finished, tmp_path)
    (tmp_path / "photos").unlink()
    write_photos(tmp_path / "photos", real_images(50))
    sentence = refusal(invoke(tmp_path, "run", "--set", "dataset.image_column=picture"))
    assert 'dataset.image_column: "image" -> "picture"' in sentence
    assert "source.sha256" in sentence
