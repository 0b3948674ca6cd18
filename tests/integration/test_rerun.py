"""A finished recipe run again: nothing is started, nothing changes, the same is said. How fast is the benchmark's affair."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from mounts import bind_read_only
from support import copied_run, hardmoe, invoke, real_images, refusal, snapshot, succeed, write_photos, write_recipe

from hardmoe.data import ingest

INVENTORY = "dataset/_progress/inventory.json"
"""Digests of the user's files, by path, size and time: the only file that looking at a finished run may refresh."""

_PROBE = """
import atexit, os, sys
atexit.register(lambda: open(os.environ["MODULES_FILE"], "w").write(" ".join({name.split(".")[0] for name in sys.modules})))
from hardmoe.cli.main import main
main()
"""


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run of one's own, with photos of one's own; returns its root."""
    root = copied_run(finished, tmp_path)
    (tmp_path / "photos").unlink()
    shutil.copytree(finished / "photos", tmp_path / "photos")
    succeed(tmp_path, "run")  # the photos lie elsewhere now, so their digests are taken once more
    return root


def changed(before: dict[str, tuple[int, int]], root: Path) -> set[str]:
    """Names of the files that are new, gone, or others."""
    return {path for path, _ in before.items() ^ snapshot(root).items()}


def test_finished_run_again_loads_nothing_heavy_leaves_no_file_of_ray_and_says_the_same(finished: Path, tmp_path: Path) -> None:
    """The recipe's backend is Ray: a Ray that was started would have left its files in the empty TMPDIR."""
    before, first = snapshot(finished), succeed(finished, "run")
    (empty := tmp_path / "tmp").mkdir()
    environment = {**os.environ, "MODULES_FILE": str(tmp_path / "modules"), "TMPDIR": str(empty), "RAY_TMPDIR": str(empty)}
    again = subprocess.run(
        [sys.executable, "-c", _PROBE, "run"], cwd=finished, env=environment, capture_output=True, text=True, timeout=120
    )
    assert (again.returncode, again.stdout, again.stderr) == (0, first, "")
    assert {"ray", "torch", "torchvision", "faiss"}.isdisjoint((tmp_path / "modules").read_text().split())
    assert list(empty.iterdir()) == []
    assert snapshot(finished) == before


def test_run_whose_photos_were_moved_away_is_still_finished(run: Path, finished: Path) -> None:
    shutil.rmtree(run.parents[1] / "photos")
    before, moved = snapshot(run), invoke(run.parents[1], "run")
    assert moved.returncode == 0, moved.stderr
    assert moved.stdout.replace(str(run), "") == invoke(finished, "run").stdout.replace(str(finished / "runs" / "small"), "")
    assert changed(before, run) == set()


def test_alias_file_that_is_gone_is_not_missed_and_one_that_changed_is_refused(project: Path) -> None:
    """A vanished alias file once made a finished run unusable, where vanished photos did not."""
    write_recipe(project, hashtags={"min_count": 5, "aliases": "aliases.csv"})
    aliases = project / "aliases.csv"
    aliases.write_text("alias,tag\nslim,thin\n")
    first = succeed(project, "partition", "--backend", "inline")
    aliases.unlink()
    assert succeed(project, "partition") == first
    aliases.write_text("alias,tag\nthin,slim\n")
    assert "aliases.sha256" in refusal(invoke(project, "partition"))


def test_photos_gone_before_the_dataset_was_finished_are_asked_for(run: Path) -> None:
    """Only a finished dataset can do without its source."""
    project = run.parents[1]
    shutil.rmtree(project / "photos")
    shutil.rmtree(run / "dataset")
    assert "matches no file" in refusal(invoke(project, "run"))


def test_touched_photos_are_read_again_and_nothing_is_rebuilt(run: Path) -> None:
    project = run.parents[1]
    for path in (project / "photos").iterdir():
        os.utime(path, (1, 1))
    before = snapshot(run)
    first = invoke(project, "run")
    assert first.returncode == 0, first.stderr
    assert changed(before, run) == {INVENTORY}
    before = snapshot(run)
    assert invoke(project, "run").stdout == first.stdout
    assert changed(before, run) == set()


def test_changing_only_where_and_how_is_accepted_and_builds_nothing(run: Path) -> None:
    project = run.parents[1]
    (project / "photos").rename(project / "elsewhere")
    changes = ["trunk.num_threads=2", "experts.checkpoint_every_steps=null", "decoder.num_threads=2", "experts.gpus=0.5"]
    changes += ["execution.attempts=7", f"dataset.path=['{project}/elsewhere/0.parquet', 'elsewhere/[12].parquet']"]
    arguments = [argument for change in changes for argument in ("--set", change)]
    before = snapshot(run)
    result = invoke(project, "run", "--parallel", "3", "--address", "192.0.2.1:1", *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout == invoke(project, "run").stdout
    assert changed(before, run) <= {INVENTORY}


def test_finished_run_on_a_read_only_disk_can_be_looked_at(run: Path, tmp_path: Path) -> None:
    """Its inventory cannot be refreshed there, which costs a second reading of the photos and nothing else."""
    project = run.parents[1]
    for path in (project / "photos").iterdir():
        os.utime(path, (2, 2))
    (elsewhere := tmp_path / "mounted").mkdir()
    with bind_read_only(run, elsewhere):
        result = hardmoe(project, "run", "--root", str(elsewhere))
    assert result.returncode == 0, result.stderr
    assert "mixture" in result.stdout


def test_recipe_kept_in_the_root_is_the_one_that_built_and_not_the_first_try(project: Path) -> None:
    """Seen: a first try with a mistake in it was kept for ever, and `status` listed the experts of that one."""
    first = invoke(project, "run", "--backend", "inline", "--set", "partition.experts=7", "--set", "dataset.tags_column=tags")
    assert "no column 'tags'" in refusal(first)
    second = invoke(project, "run", "--backend", "inline", "--set", "hashtags.min_count=400")
    assert "hashtags.min_count" in refusal(second)
    kept = yaml.safe_load((project / "runs" / "small" / "recipe.yaml").read_text())
    assert (kept["partition"]["experts"], kept["dataset"]["tags_column"]) == (3, "hashtags")
    assert "experts/expert-0003" not in invoke(project, "status").stdout


def test_records_do_not_depend_on_the_place_or_the_spelling_of_the_photos_path(photos: Path, tmp_path: Path) -> None:
    """Seen: every row's origin held the path as it was typed, so moved photos gave other bytes under one fingerprint."""
    found = []
    for name, pattern in (("here", "photos/*.parquet"), ("there", "data/sets/[0-9].parquet")):
        (project := tmp_path / name).mkdir()
        (project / pattern).parent.mkdir(parents=True)
        for path in photos.iterdir():
            shutil.copy(path, (project / pattern).parent)
        write_recipe(project, dataset={"path": pattern}, hashtags={"min_count": 400})
        assert "hashtags.min_count=400" in refusal(invoke(project, "run", "--backend", "inline"))
        found.append((project / "runs" / "small" / "dataset" / "artifact.json").read_bytes())
    assert found[0] == found[1]


def test_bare_command_in_another_directory_finds_the_photos_of_an_absolute_recipe(run: Path, tmp_path: Path) -> None:
    """`--root` is a place whatever it looks like, also a number; and the kept recipe can be used from anywhere."""
    project = run.parents[1]
    run.rename(project / "2024")
    result = invoke(project, "run", "--root", "2024")
    assert result.returncode == 0, result.stderr
    (elsewhere := tmp_path / "elsewhere").mkdir()
    again = invoke(elsewhere, "run", "-f", str(project / "2024" / "recipe.yaml"), "--root", str(project / "2024"))
    assert again.stdout == result.stdout


def test_photos_that_grow_while_they_are_read_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A download still under way: without the check the dataset would be recorded as made from files that it never saw."""
    images = real_images(60)
    write_photos(tmp_path / "photos", images[:50])
    write_recipe(tmp_path)
    write = ingest._RUN["write-copy"]

    def growing(context: object, config: object) -> object:
        write_photos(tmp_path / "photos", images)
        return write(context, config)  # type: ignore[arg-type]

    monkeypatch.setitem(ingest._RUN, "write-copy", growing)
    sentence = refusal(invoke(tmp_path, "partition", "--backend", "inline"))
    assert "changed while they were being read" in sentence
    assert not (tmp_path / "runs" / "small" / "dataset" / "artifact.json").exists()
