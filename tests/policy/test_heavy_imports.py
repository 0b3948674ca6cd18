"""What a command loads: the promise behind its speed, asserted by names instead of by seconds.

Seconds depend on the machine and its load (tests/benchmarks/startup.py prints them); which libraries were imported does not.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import copied_run, hardmoe, invoke, snapshot, write_recipe

HEAVY = {"torch", "torchvision", "ray", "faiss", "boto3"}

_PROBE = """
import atexit, os, sys
atexit.register(lambda: open(os.environ["MODULES_FILE"], "w").write("\\n".join({name.split(".")[0] for name in sys.modules})))
from hardmoe.cli.main import main
main()
"""


def _loaded(directory: Path, modules_file: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """Run a command in a directory; also returns the top-level modules that it had loaded at its end."""
    environment = {**os.environ, "MODULES_FILE": str(modules_file)}
    command = [sys.executable, "-c", _PROBE, *arguments]
    result = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=120)
    return result, set(modules_file.read_text().split())


def test_probe_sees_a_heavy_import(tmp_path: Path, project: Path) -> None:
    """The oracle of this file: a command that must build something does load torch."""
    result, modules = _loaded(project, tmp_path / "modules", "run", "--backend", "inline", "--set", "trunk.backbone=nothing")
    assert result.returncode in (1, 3), result.stderr
    assert "torch" in modules


def assert_light_and_harmless(finished: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """The command succeeds on a finished run, loads nothing heavy and changes no file."""
    before = snapshot(finished)
    result, modules = _loaded(finished, tmp_path / "modules", *arguments)
    assert result.returncode == 0, result.stderr
    assert modules & HEAVY == set()
    assert snapshot(finished) == before


def test_help_loads_click_and_nothing_that_reads_data(tmp_path: Path) -> None:
    result, modules = _loaded(tmp_path, tmp_path / "modules", "--help")
    assert result.returncode == 0
    assert modules & (HEAVY | {"numpy", "pyarrow", "pydantic", "yaml", "rich", "PIL"}) == set()


@pytest.mark.parametrize("work", ["features.work:FeaturesWork", "experts.embed:EmbeddingsWork"])
def test_driver_of_a_stage_that_only_lists_shards_does_without_torch(work: str) -> None:
    module, _, name = work.partition(":")
    probe = f"import sys; from hardmoe.{module} import {name}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120, check=True)
    assert set(result.stdout.split()) & HEAVY == set()


def test_networks_that_are_not_torchvisions_do_without_it(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from torch import nn\n\ndef network(image_size):\n"
        "    found = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())\n    found.num_features = 3\n    return found\n"
    )
    probe = (
        "import sys; from hardmoe.models.backbones import build_backbone\n"
        "import hardmoe.training.extract, hardmoe.training.network\n"
        "names = ('own:network', 'quicknet_w4', 'resnet20')\n"
        "print(*(build_backbone(name, image_size=8, seed=0).num_features for name in names), 'torchvision' in sys.modules)"
    )
    search = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": search}
    command = [sys.executable, "-c", probe]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.split() == ["3", "32", "64", "False"]


@pytest.mark.parametrize("arguments", [("run",), ("run", "--dry-run"), ("evaluate",), ("report",)], ids=" ".join)
def test_finished_run_again_starts_neither_ray_nor_torch_and_changes_no_file(
    tmp_path: Path, finished: Path, arguments: tuple[str, ...]
) -> None:
    """The recipe's backend is Ray, which would be started on the first unit; there is none."""
    assert_light_and_harmless(finished, tmp_path, arguments)


@pytest.mark.parametrize(
    "arguments",
    [("status",), ("status", "--json"), ("logs",), ("show", "router"), ("verify",), ("init", "--schema")],
    ids=" ".join,
)
def test_looking_at_a_run_loads_nothing_heavy_and_changes_no_file(
    tmp_path: Path, finished: Path, arguments: tuple[str, ...]
) -> None:
    assert_light_and_harmless(finished, tmp_path, arguments)


def test_finished_sweep_and_check_again_load_nothing_heavy_and_change_no_file(finished: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    copied_run(finished, project, keep=("dataset", "vocabulary", "trunk", "features", "router", "partition"))
    write_recipe(project, "other.yaml", root="runs/other")
    for arguments in (("partition", "--sweep", "2,3"), ("partition", "--check", "other.yaml")):
        first = invoke(project, *arguments, "--backend", "inline")
        assert first.returncode == 0, first.stderr
        assert_light_and_harmless(project, tmp_path, arguments)


def test_finished_run_again_prints_what_the_first_time_printed(finished: Path) -> None:
    first, second = hardmoe(finished, "run"), hardmoe(finished, "run")
    assert first.returncode == second.returncode == 0
    assert first.stdout == second.stdout
    assert "precision@1" in first.stdout
    assert str(finished / "runs" / "small" / "report" / "index.html") in first.stdout


def test_digests_of_the_images_survive_the_commit_that_needed_them(finished: Path) -> None:
    """The commit of the dataset once swept the cache of digests away, as if a build had left it there.

    The next command then read all images again and wrote the cache anew: a finished run that changed a file. A cache as old
    as the run is one that was never written anew.
    """
    dataset = finished / "runs" / "small" / "dataset"
    cache, record = dataset / "_progress" / "inventory.json", dataset / "artifact.json"
    assert cache.stat().st_mtime_ns < record.stat().st_mtime_ns
