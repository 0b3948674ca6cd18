"""`hardmoe doctor` on this machine and on a cluster of two nodes that are really only this machine."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from support import invoke, refusal, snapshot, write_recipe

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A running cluster of two nodes, one with more CPUs than this machine has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        cluster.add_node(num_cpus=3, num_gpus=1, include_dashboard=False)
        yield cluster.address
        ray.shutdown()
        cluster.shutdown()


def test_this_machine_is_looked_at_without_a_recipe(tmp_path: Path) -> None:
    result = invoke(tmp_path, "doctor")
    assert result.returncode == 0, result.stderr
    checks = {line.split("  ")[1].strip() for line in result.stdout.splitlines()[1:] if line.startswith("this machine")}
    assert {"versions", "gpu", "memory", "disk", "decode"} <= checks
    assert list(tmp_path.iterdir()) == []


def test_recipe_that_is_named_and_not_there_is_refused(tmp_path: Path) -> None:
    assert "mine.yaml" in refusal(invoke(tmp_path, "doctor", "-f", "mine.yaml"))
    assert "hardmoe.yaml" in refusal(invoke(tmp_path, "doctor", "--set", "seed=1"))


def test_run_begun_with_other_versions_is_told_and_nothing_in_it_changes(tmp_path: Path) -> None:
    (tmp_path / "runs" / "small").mkdir(parents=True)
    (tmp_path / "runs" / "small" / "versions.json").write_text(json.dumps({"torch": "1.0", "hardmoe": "0.0.1"}))
    write_recipe(tmp_path)
    before = snapshot(tmp_path)
    sentence = refusal(invoke(tmp_path, "doctor"))
    assert "those that the run was begun with" in sentence and "instead of 1.0" in sentence
    assert snapshot(tmp_path) == before


def test_root_that_is_not_there_yet_is_left_so(tmp_path: Path) -> None:
    write_recipe(tmp_path, root="runs/new")
    result = invoke(tmp_path, "doctor")
    assert result.returncode == 0 and "can be written" in result.stdout
    assert not (tmp_path / "runs").exists()


def test_root_that_cannot_be_used_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    sentence = refusal(invoke(tmp_path, "doctor", "--root", "file/root"))
    assert "this machine, root" in sentence


def test_every_node_of_a_cluster_is_looked_at_and_a_demand_that_none_meets_is_bad(address: str, tmp_path: Path) -> None:
    write_recipe(tmp_path, root=str(tmp_path / "root"), experts={"gpus": 2})
    result = invoke(tmp_path, "doctor", "--address", address, "--json")
    sentence = refusal(result)
    assert "2 GPUs fit on no node" in sentence and "lower num_threads or gpus" in sentence
    findings = json.loads(result.stdout)
    by_check: dict[str, list[str]] = {}
    for each in findings:
        by_check.setdefault(each["check"], []).append(each["state"])
    for check in ("versions", "memory", "root", "clock", "object store"):
        assert by_check[check] == ["ok", "ok"], findings
    assert sorted(set(by_check["resources"])) == ["bad", "ok"]
    assert not (tmp_path / "root").exists()


def test_address_where_nobody_answers_is_refused_soon(tmp_path: Path) -> None:
    assert "no Ray answers at '127.0.0.1:1'" in refusal(invoke(tmp_path, "doctor", "--address", "127.0.0.1:1"))


def test_environment_is_left_as_it_was(tmp_path: Path) -> None:
    before = dict(os.environ)
    invoke(tmp_path, "doctor")
    assert dict(os.environ) == before
