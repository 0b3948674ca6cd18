"""From a recipe to stages: what lies outside the root is identified by content, and external features change the graph."""

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hardmoe.artifacts.store import ArtifactStore
from hardmoe.errors import DataError
from hardmoe.experts.origin import Origin
from hardmoe.partitioning.config import default_starts
from hardmoe.pipeline import ExternalInputs, build_stages, identify_inputs
from hardmoe.recipe import parse_recipe
from hardmoe.stage import Stage
from hardmoe.storage import LocalStorage


def stages_of(external: ExternalInputs | None = None, **sections: Any) -> dict[str, Stage]:
    stages = build_stages(parse_recipe(sections, "test"), external or ExternalInputs(""))
    return {stage.name: stage for stage in stages}


def identify(directory: Path, **sections: Any) -> ExternalInputs:
    (directory / "photos").mkdir(exist_ok=True)
    pq.write_table(pa.table({"image": [b"x"], "hashtags": [["a"]]}), directory / "photos" / "0.parquet")
    body = {"dataset": {"path": str(directory / "photos" / "*.parquet")}, **sections}
    return identify_inputs(parse_recipe(body, "test"), ArtifactStore(LocalStorage(directory / "root")))


def test_stages_come_after_their_inputs_with_and_without_external_features() -> None:
    for sections in ({}, {"features": {"path": "f.parquet"}}, GIVEN, {"partition": {"overlap": 1.1}}):
        seen: set[str] = set()
        for name, stage in stages_of(**sections, evaluation={"random_partition": True}).items():
            assert set(stage.inputs.values()) <= seen, name
            seen.add(name)


def test_balanced_parts_take_the_router_of_k_means_whatever_their_slack() -> None:
    """So that a run with balanced parts can take over the router of one without."""
    plain = stages_of(partition={"experts": 4})
    for slack in (0.0, 0.05, 0.3):
        balanced = stages_of(partition={"experts": 4, "method": "balanced", "slack": slack})
        assert balanced["router"] == plain["router"]
        assert balanced["partition"].inputs == plain["partition"].inputs
        assert balanced["partition"].config["partition"] == {"experts": 4, "method": "balanced", "slack": slack}
    assert plain["partition"].config["partition"] == {"experts": 4, "method": "kmeans"}
    assert plain["router"].config["partition"]["method"] == "kmeans"
    assert plain["router"] != stages_of(partition={"experts": 4, "tolerance": 0.1})["router"]


def test_fine_clusters_are_identity_of_the_two_level_router_alone() -> None:
    plain = stages_of(partition={"experts": 4})
    grouped = stages_of(partition={"experts": 4, "method": "two_level"})
    assert "fine_clusters" not in plain["router"].config["partition"]
    assert grouped["router"].config["partition"] == {
        **plain["router"].config["partition"],
        "method": "two_level",
        "fine_clusters": 64,
        "restarts": default_starts(64),
    }
    assert grouped["router"] == stages_of(partition={"experts": 4, "method": "two_level", "fine_clusters": 64})["router"]
    assert grouped["router"] != stages_of(partition={"experts": 4, "method": "two_level", "fine_clusters": 65})["router"]
    assert grouped["partition"].config["partition"] == {"experts": 4, "method": "two_level"}
    assert grouped["partition"].inputs == plain["partition"].inputs


def test_external_features_stand_on_the_dataset_alone_and_are_known_by_content() -> None:
    first = stages_of(ExternalInputs("", features_sha256="1" * 64), features={"path": "here/f.parquet"})["features"]
    moved = stages_of(ExternalInputs("", features_sha256="1" * 64), features={"path": "there/f.parquet"})["features"]
    other = stages_of(ExternalInputs("", features_sha256="2" * 64), features={"path": "here/f.parquet"})["features"]
    keyed = stages_of(
        ExternalInputs("", features_sha256="1" * 64), features={"path": "here/f.parquet"}, dataset={"id_column": "name"}
    )["features"]
    assert set(first.inputs.values()) == {"dataset"}
    assert first.config == moved.config
    assert first.config != other.config
    assert first.config != keyed.config


GIVEN: dict[str, Any] = {"dataset": {"part_column": "cluster"}, "partition": {"method": "given", "experts": 4}}


def test_given_parts_need_a_router_of_their_means_that_knows_the_dataset() -> None:
    stages = stages_of(**GIVEN)
    assert stages["router"].inputs == {"dataset": "dataset", "features": "features"}
    assert stages["router"].config == {"partition": {"experts": 4, "method": "given", "transform": "l2"}}
    assert stages["partition"].inputs == {"dataset": "dataset", "features": "features", "router": "router"}
    assert stages["dataset"].operational["experts"] == 4
    assert stages_of(dataset=GIVEN["dataset"])["dataset"].operational["experts"] is None


def test_copies_for_further_experts_change_neither_the_router_nor_anything_before_it() -> None:
    """So that trying out several ratios costs one fit."""
    plain = stages_of(partition={"experts": 4})
    for extra in ({"overlap": 1.1}, {"out_of_part_fraction": 0.02}):
        stages = stages_of(partition={"experts": 4, **extra})
        for name in ("dataset", "vocabulary", "trunk", "features", "router"):
            assert stages[name] == plain[name], name
        assert stages["partition"].config == {"partition": {"experts": 4, "method": "kmeans", **extra}, "seed": 0}
    assert plain["partition"].config == {"partition": {"experts": 4, "method": "kmeans"}, "seed": 0}


def test_rounds_share_the_epochs_out_and_leave_everything_else_as_it_is() -> None:
    recipe = {"experts": {"epochs": 7}, "partition": {"experts": 2}}
    plain, stages = stages_of(**recipe), stages_of(**recipe, decoder={"rounds": 2, "round_epochs": 3})
    experts = [f"{place}/expert-0001" for place in ("rounds/0/experts", "rounds/1/experts", "experts")]
    assert [stages[name].config["experts"]["epochs"] for name in experts] == [1, 3, 3]
    assert [stages[name].config.get("round") for name in experts] == [None, 1, 2]
    assert stages[experts[1]].inputs["before"] == experts[0]
    assert stages[experts[2]].inputs["held"] == "rounds/1/decoder"
    same = {name for name in plain if stages[name] == plain[name]}
    assert same == plain.keys() - {"experts/expert-0000", "experts/expert-0001", "evaluation", "report"}


def test_rounds_of_experts_that_start_from_another_runs_are_matched_once() -> None:
    external = ExternalInputs("", origin=Origin({"run": "x"}, {"run": "x"}))
    recipe = {"experts": {"epochs": 3, "init": "run:elsewhere"}, "partition": {"experts": 2}}
    stages = stages_of(external, **recipe, decoder={"rounds": 1})
    assert stages["rounds/0/experts/expert-0000"].inputs["matches"] == "matches"
    assert "matches" not in stages["experts/expert-0000"].inputs
    assert "start" not in stages["experts/expert-0000"].config


@pytest.mark.parametrize("extra", [{"overlap": 1.0}, {"out_of_part_fraction": 0.02}])
def test_dense_baseline_reads_a_partition_only_where_there_are_copies(extra: dict[str, float]) -> None:
    plain, stages = stages_of()["baselines/dense"], stages_of(partition=extra)["baselines/dense"]
    assert "partition" not in plain.inputs.values()
    assert stages.inputs == {**plain.inputs, "extra_copies": "partition"}
    assert stages.config == plain.config


def test_random_control_draws_from_other_parts_too() -> None:
    partition = {"overlap": 1.1, "out_of_part_fraction": 0.02, "experts": 4}
    stages = stages_of(partition=partition, evaluation={"random_partition": True})
    expected = {"experts": 4, "method": "random", "out_of_part_fraction": 0.02}
    assert stages["baselines/random/partition"].config["partition"] == expected


def test_own_features_have_an_identity_without_files_and_threads() -> None:
    stage = stages_of(features={"num_threads": 3})["features"]
    assert (stage.kind, stage.version, stage.config) == ("features", 3, {})
    assert stage.inputs == {"dataset": "dataset", "trunk": "trunk"}
    assert stage.resources.num_cpus == 3


def test_trunk_is_no_system_of_its_own_where_its_features_do_not_exist() -> None:
    own, theirs = (stages_of(features=features)["evaluation"].config["systems"] for features in ({}, {"path": "f.parquet"}))
    assert own.keys() - theirs.keys() == {"trunk"}


def test_files_of_hashtags_count_by_content_and_not_by_path(tmp_path: Path) -> None:
    first, second = tmp_path / "a.csv", tmp_path / "b.csv"
    for path in (first, second):
        path.write_text("alias,tag\nx,y\n")
    (tmp_path / "deny.txt").write_text("z\n")
    found = identify(tmp_path, hashtags={"aliases": str(first), "deny": str(tmp_path / "deny.txt")}).hashtags_sha256
    assert found == {
        "aliases": hashlib.sha256(b"alias,tag\nx,y\n").hexdigest(),
        "allow": None,
        "deny": hashlib.sha256(b"z\n").hexdigest(),
    }
    again = identify(tmp_path, hashtags={"aliases": str(second), "deny": str(tmp_path / "deny.txt")})
    assert again.hashtags_sha256 == found
    stages = [stages_of(ExternalInputs("", digests))["vocabulary"].config for digests in (found, {**found, "allow": "1" * 64})]
    assert stages[0] != stages[1]


@pytest.mark.parametrize("key", ["aliases", "allow", "deny"])
def test_missing_file_of_hashtags_is_refused_naming_its_key(tmp_path: Path, key: str) -> None:
    with pytest.raises(DataError, match=rf"nowhere cannot be read \(No such file or directory\); correct hashtags\.{key}"):
        identify(tmp_path, hashtags={key: str(tmp_path / "nowhere")})


def test_contradiction_in_the_files_is_found_before_anything_is_built(tmp_path: Path) -> None:
    (tmp_path / "allow.txt").write_text("a\n")
    (tmp_path / "deny.txt").write_text("A\n")
    with pytest.raises(DataError, match=r"'a' is in .*allow\.txt \(hashtags\.allow\) and in .*deny\.txt"):
        identify(tmp_path, hashtags={"allow": str(tmp_path / "allow.txt"), "deny": str(tmp_path / "deny.txt")})


def test_files_of_features_count_by_name_and_content(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "1.parquet").write_bytes(b"one")
    pattern = {"path": str(tmp_path / "f" / "*.parquet")}
    first = identify(tmp_path, features=pattern).features_sha256
    assert first is not None
    assert identify(tmp_path, features=pattern).features_sha256 == first
    (tmp_path / "f").rename(tmp_path / "g")
    moved = {"path": [str(tmp_path / "g" / "1.parquet")]}
    assert identify(tmp_path, features=moved).features_sha256 == first
    (tmp_path / "g" / "2.parquet").write_bytes(b"two")
    both = {"path": str(tmp_path / "g" / "*.parquet")}
    assert identify(tmp_path, features=both).features_sha256 != first
    assert identify(tmp_path).features_sha256 is None
    with pytest.raises(DataError, match=r"features\.path .*matches no file"):
        identify(tmp_path, features=pattern)


def test_digests_of_features_are_remembered_apart_from_the_dataset_s(tmp_path: Path) -> None:
    """One cache for both would forget the digests of a terabyte of images whenever the features are looked at."""
    (tmp_path / "f.parquet").write_bytes(b"one")
    identify(tmp_path, features={"path": str(tmp_path / "f.parquet")})
    caches = sorted(str(path.relative_to(tmp_path / "root")) for path in (tmp_path / "root").rglob("inventory.json"))
    assert caches == ["dataset/_progress/inventory.json", "features/_progress/inventory.json"]
