"""The files of `cluster/` before anybody pays for a machine: Ray's own validation, one version of everything, no surprise."""

import os
import re
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from support import invoke

from hardmoe.cli.main import cli
from hardmoe.recipe import parse_recipe

REPOSITORY = Path(__file__).resolve().parents[2]
CLUSTER = REPOSITORY / "cluster"
KUBERNETES = ("kuberay-cluster.yaml", "kuberay-job.yaml")
LAUNCHED = ("aws.yaml", "machines.yaml")


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def spec_of(name: str) -> dict[str, Any]:
    """The specification of the RayCluster."""
    spec: dict[str, Any] = documents(name)[0]["spec"]
    found: dict[str, Any] = spec.get("rayClusterSpec", spec)
    return found


@pytest.mark.parametrize("name", LAUNCHED)
def test_file_for_ray_up_passes_rays_own_validation(name: str) -> None:
    (config,) = documents(name)
    validate_config(prepare_config(config))
    config["max_wrokers"] = 3
    with pytest.raises(Exception, match="max_wrokers"):
        validate_config(prepare_config(config))


@pytest.mark.parametrize("name", KUBERNETES)
def test_file_for_kubernetes_is_understood_by_rays_autoscaler(name: str) -> None:
    config = _derive_autoscaling_config_from_ray_cr({"metadata": {"name": "x", "namespace": "y"}, "spec": spec_of(name)})
    validate_config(config)
    types = config["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0, "units keep off the head"
    assert {kind for kind, each in types.items() if each["resources"].get("GPU") == 1} == {"gpu", "gpu-spot"}
    assert all(each["min_workers"] == 0 for each in types.values()), "nothing costs money before a unit asks for it"


def test_spot_machines_are_workers_and_the_head_is_none() -> None:
    types = documents("aws.yaml")[0]["available_node_types"]
    spot = {name for name, each in types.items() if each["node_config"].get("InstanceMarketOptions") == {"MarketType": "spot"}}
    assert spot == {"spot_gpu", "spot_cpu"} and types["head"]["resources"] == {"CPU": 0}
    for name in spot:
        assert types[name]["min_workers"] == 0


def test_kubernetes_files_have_the_locked_version_of_ray() -> None:
    lines = (REPOSITORY / "requirements.lock").read_text().splitlines()
    locked = next(Requirement(line) for line in lines if re.match(r"ray==", line))
    assert {f"=={spec_of(name)['rayVersion']}" for name in KUBERNETES} == {str(locked.specifier)}


def test_job_on_kubernetes_mounts_a_recipe_that_is_one() -> None:
    job, recipe = documents("kuberay-job.yaml")
    parse_recipe(yaml.safe_load(recipe["data"]["hardmoe.yaml"]), "the ConfigMap")
    head = spec_of("kuberay-job.yaml")["headGroupSpec"]["template"]["spec"]
    (volume,) = head["volumes"]
    (mount,) = head["containers"][0]["volumeMounts"]
    assert volume["configMap"]["name"] == recipe["metadata"]["name"] and volume["name"] == mount["name"]
    words = job["spec"]["entrypoint"].split()
    assert words[words.index("-f") + 1].startswith(mount["mountPath"] + "/")
    cli.commands[words[1]].make_context(words[1], words[2:])


@pytest.mark.parametrize("name", KUBERNETES)
def test_pools_of_a_cluster_mount_what_they_define(name: str) -> None:
    for group in spec_of(name)["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == volumes


def test_slurm_script_starts_a_head_and_workers_and_ends_as_the_driver_did(tmp_path: Path) -> None:
    """With Slurm's commands pretended: who is started where, with which words, is what the script is about."""
    programs = {
        "scontrol": "printf '127.0.0.1\\nworker-a\\nworker-b\\n'",
        "srun": f'echo "srun $*" >> {tmp_path}/calls',
        "hardmoe": f'echo "hardmoe $*" >> {tmp_path}/calls; exit 3',
    }
    bin_directory = tmp_path / "env" / "bin"
    bin_directory.mkdir(parents=True)
    for name, body in programs.items():
        (bin_directory / name).write_text(f"#!/bin/bash\n{body}\n")
        (bin_directory / name).chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as head:
        variables = {"ENVIRONMENT": str(tmp_path / "env"), "PORT": str(head.getsockname()[1]), "SLURM_JOB_ID": "7"}
        variables |= {"SLURM_JOB_NODELIST": "nodes", "SLURM_CPUS_PER_TASK": "96", "SLURM_GPUS_ON_NODE": "8"}
        command = ["bash", str(CLUSTER / "slurm.sh"), "run", "-f", "photos.yaml"]
        done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    address = f"127.0.0.1:{variables['PORT']}"
    assert f"hardmoe run -f photos.yaml --address {address}" in calls
    (first,) = [call for call in calls if "--head" in call]
    (others,) = [call for call in calls if f"ray start --address {address}" in call]
    assert "--nodelist=127.0.0.1 " in first and "--num-gpus 8" in first and "--num-cpus 96" in first
    assert "--nodes=2 " in others and "--nodelist=worker-a,worker-b " in others


def test_image_installs_the_lock_and_what_it_copies_exists() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    assert "pip install --no-cache-dir -r requirements.lock" in text
    for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        assert all((REPOSITORY / name).exists() for name in line.split()), line


def test_commands_of_the_runbook_that_need_no_account_run_and_the_others_are_marked(tmp_path: Path) -> None:
    blocks = re.findall(r"^```(\S+ ?\S*)\n(.*?)^```$", (CLUSTER / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert {info for info, _ in blocks} == {"sh", "sh cluster", "sh account"}
    for info, body in blocks:
        for line in body.splitlines():
            words = line.split()
            if info == "sh":
                done = invoke(REPOSITORY, *words[1:], "--root", str(tmp_path / "run"))
                assert words[0] == "hardmoe" and done.returncode == 0, done.stderr
            elif words[0] == "hardmoe":
                assert words[1] in cli.commands, line
            for name in re.findall(r"cluster/\S+", line):
                assert (REPOSITORY / name).exists(), line
    assert not (tmp_path / "run").exists()
