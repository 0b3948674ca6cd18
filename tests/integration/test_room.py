"""Room for a stage is looked at before it is begun, by formulas that must not ask for more than the stage then stores."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from support import copied_run, invoke, refusal

from hardmoe.artifacts.store import Artifact, ArtifactStore
from hardmoe.data.inventory import known_bytes
from hardmoe.errors import StorageError
from hardmoe.pipeline import ExternalInputs, build_stages
from hardmoe.planning.room import Room
from hardmoe.recipe import Recipe, parse_recipe
from hardmoe.stage import Stage
from hardmoe.storage import LocalStorage


class Disk(LocalStorage):
    """With so much room left."""

    free: int | None = None

    def free_bytes(self) -> int | None:
        return self.free


@pytest.fixture
def disk(finished: Path) -> Disk:
    return Disk(finished / "runs" / "small")


@pytest.fixture
def recipe(disk: Disk) -> Recipe:
    return parse_recipe(yaml.safe_load(disk.read_bytes("recipe.yaml")), "recipe.yaml")


def stages_with_inputs(disk: Disk, recipe: Recipe) -> list[tuple[Stage, Artifact, dict[str, Artifact]]]:
    """Every stage of the run, what came of it, and what was there before it."""
    store, before, found = ArtifactStore(disk), dict[str, Artifact](), []
    for stage in build_stages(recipe, ExternalInputs("")):
        found.append((stage, store.get(stage.name), dict(before)))
        before[stage.name] = store.get(stage.name)
    return found


def test_large_stages_are_asked_for_about_what_they_store(disk: Disk, recipe: Recipe) -> None:
    large = {"dataset", "features", "partition", "embeddings"}
    for stage, artifact, before in stages_with_inputs(disk, recipe):
        if stage.name in large:
            stored = sum(entry.size for entry in artifact.record.files)
            needed = Room(recipe, disk, before).needed_bytes(stage)
            assert needed is not None and 0.6 * stored < needed < stored / 0.7, stage.name


def test_stage_that_cannot_fit_is_refused_and_one_that_has_written_half_is_not(disk: Disk, recipe: Recipe) -> None:
    (stage, artifact, before) = next(each for each in stages_with_inputs(disk, recipe) if each[0].name == "partition")
    room, stored = Room(recipe, disk, before), sum(entry.size for entry in artifact.record.files)
    elsewhere = replace(stage, name="nothing/written")
    disk.free = stored // 2
    with pytest.raises(
        StorageError, match=rf"nothing/written will store about \d+ kB in {disk.where()}, where .* are free; free"
    ):
        room(elsewhere)
    room(stage)  # which is there already
    for disk.free in (2 * stored, None):
        room(elsewhere)


@pytest.mark.parametrize(
    ("changes", "is_known"),
    [
        ({}, True),
        ({"store": "copy"}, True),
        ({"store": "reference"}, False),
        ({"store_size": 32}, False),
        ({"source": "iconify"}, False),
    ],
)
def test_dataset_is_asked_for_only_where_images_are_kept_as_they_are(
    disk: Disk, recipe: Recipe, changes: dict[str, object], is_known: bool
) -> None:
    changed = recipe.model_copy(update={"dataset": recipe.dataset.model_copy(update=changes)})
    dataset = build_stages(recipe, ExternalInputs(""))[0]
    assert Room(changed, disk, {}).needed_bytes(dataset) == (known_bytes(disk) if is_known else None)


def test_command_refuses_a_stage_before_it_begins(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied_run(finished, tmp_path, keep=["dataset", "vocabulary", "trunk", "features", "router"])
    monkeypatch.setattr(LocalStorage, "free_bytes", lambda self: 1000)
    sentence = refusal(invoke(tmp_path, "partition", "--backend", "inline"))
    assert sentence.startswith("partition will store about") and "1 kB are free" in sentence
    assert not list((tmp_path / "runs" / "small").glob("partition/_progress/*/done/**/*.json"))
    monkeypatch.undo()
    assert invoke(tmp_path, "partition", "--backend", "inline").returncode == 0
