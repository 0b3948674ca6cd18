"""The recipe: from YAML and the command line to one typed object, and a sentence with the remedy for every mistake."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from hardmoe.cli.init import json_schema, write_recipe
from hardmoe.errors import RecipeError
from hardmoe.recipe import Recipe, load_recipe, parse_recipe

DEMO = Path(__file__).parents[2] / "pipelines" / "demo.yaml"


@pytest.fixture
def write(tmp_path: Path):  # type: ignore[no-untyped-def]
    def write(text: str, name: str = "hardmoe.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("partition: {expert: 4}", "unknown key 'partition.expert'; did you mean 'partition.experts'?"),
        ("partitions: {experts: 4}", "unknown key 'partitions'; did you mean 'partition'?"),
        ("backbone: resnet18", "unknown key 'backbone'; did you mean 'trunk.backbone'?"),
        ("partition: {epochs: 3}", "unknown key 'partition.epochs'; did you mean 'trunk.epochs'?"),
        ("evaluation: {zzz: 1}", "unknown key 'evaluation.zzz'; the keys here are "),
        ("1: 2", "unknown key 1"),
        ("partition: {experts: many}", "partition.experts must be a whole number, not 'many'"),
        ("partition: {experts: true}", "partition.experts must be a whole number, not true"),
        ("partition: {experts: 2.5}", "partition.experts must be a whole number, not 2.5"),
        ("partition: {experts: 0}", "partition.experts must be at least 1, not 0"),
        (
            "partition: {method: magic}",
            "partition.method must be 'kmeans', 'balanced', 'two_level', 'given' or 'random', not 'magic'",
        ),
        ("partition: {overlap: 0.9}", "partition.overlap must be at least 1, not 0.9"),
        ("partition: {out_of_part_fraction: 1}", "partition.out_of_part_fraction must be less than 1, not 1"),
        (
            "partition: {method: random, overlap: 1.1}",
            "overlap 1.1 goes by distances to centroids, and method 'random' has none; take it out, or set out_of_part_fraction",
        ),
        (
            "partition: {experts: 1, overlap: 1.1}",
            "overlap 1.1 needs other parts, and experts is 1; take it out, or raise experts",
        ),
        ("partition: {experts: 1, out_of_part_fraction: 0.02}", "out_of_part_fraction 0.02 needs other parts, and experts is 1"),
        (
            "partition: {method: given}",
            "partition.method is 'given' but dataset.part_column names no column; set it, or set partition.method: kmeans",
        ),
        ("partition: {method: balanced, slack: -0.1}", "partition.slack must be at least 0, not -0.1"),
        ("partition: {method: balanced, slack: .inf}", "partition.slack must be a finite number, not .inf"),
        (
            "partition: {slack: 0.1}",
            "partition: slack 0.1 does nothing with method 'kmeans': set method: balanced, or leave slack out",
        ),
        (
            "partition: {method: balanced, experts: 9, sample_size: 8}",
            "sample_size 8 cannot seed 9 experts: raise it to 9 or more",
        ),
        (
            "partition: {fine_clusters: 64}",
            "fine_clusters 64 does nothing with method 'kmeans': set method: two_level, or leave it out",
        ),
        (
            "partition: {method: two_level, fine_clusters: 4, experts: 8}",
            "fine_clusters 4 cannot be grouped into 8 parts: raise it to 8 or more",
        ),
        ("partition: {method: two_level, sample_size: 100}", "sample_size 100 cannot seed 128 fine clusters: raise it to 128"),
        (
            "partition: {method: two_level, experts: 2000}",
            "32000 fine clusters are too many to be compared pair by pair: set fine_clusters to 16384 or less",
        ),
        ("partition: {method: two_level, fine_clusters: 0}", "partition.fine_clusters must be at least 1, not 0"),
        (
            "partition: {method: two_level, slack: 0.1}",
            "slack 0.1 does nothing with method 'two_level': set method: balanced, or leave slack out",
        ),
        ("dataset: {path: 5}", "dataset.path must be text or a list, as in [a, b]"),
        ("trunk: {learning_rate: .nan}", "trunk.learning_rate must be "),
        ("trunk: resnet18", "trunk must be a section with keys of its own, not 'resnet18'"),
        ("root: 2024-01-01", "root must be text, not 2024-01-01"),
        ("seed: -1\npartition: {experts: 0}", "(and 1 more mistake)"),
        ("dataset: {test_fraction: 0.6, validation_fraction: 0.5}", "leaves nothing to train on; make their sum less than 1"),
        ("experts: {backbone: resnet20}", "set experts.init: random, or leave experts.backbone out"),
    ],
)
def test_mistake_is_one_sentence_with_key_value_and_remedy(write, text: str, sentence: str) -> None:  # type: ignore[no-untyped-def]
    path = write(text)
    told = refusal(path)
    assert told.startswith(str(path))
    assert sentence in told


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[a, b]", "must be a mapping of sections such as 'dataset:'"),
        ("just text", "must be a mapping of sections such as 'dataset:'"),
        ("trunk: {epochs: 1", "is not valid YAML at line 1"),
        ("trunk:\n\tepochs: 1", "indent with spaces, not tabs"),
        ("trunk: {epochs: 1}\ntrunk: {epochs: 2}", "the key 'trunk' is given twice; keep one"),
        ("trunk: {epochs: 1, epochs: 2}", "the key 'epochs' is given twice"),
    ],
)
def test_file_that_is_no_recipe_is_told_what_it_is(write, text: str, sentence: str) -> None:  # type: ignore[no-untyped-def]
    assert sentence in refusal(write(text))


def test_missing_unreadable_and_binary_files_are_told_apart(tmp_path: Path) -> None:
    assert "there is no recipe" in refusal(tmp_path / "none.yaml")
    assert "hardmoe init" in refusal(tmp_path / "none.yaml")
    assert "cannot read the recipe" in refusal(tmp_path)
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    assert "is not text in UTF-8" in refusal(tmp_path / "photo.jpg")


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "trunk:\npartition:\n", "{}"])
def test_what_a_recipe_leaves_out_has_its_default(write, text: str) -> None:  # type: ignore[no-untyped-def]
    """A section whose keys are all commented out reads as null, and says nothing."""
    assert load_recipe(write(text)) == Recipe()


def test_numbers_in_exponent_notation_are_numbers(write) -> None:  # type: ignore[no-untyped-def]
    """YAML 1.1 reads `1e-4` as text."""
    recipe = load_recipe(write("trunk: {learning_rate: 1e-4}\npartition: {tolerance: 2E-3}"), ["decoder.learning_rate=5e-3"])
    assert (recipe.trunk.learning_rate, recipe.partition.tolerance, recipe.decoder.learning_rate) == (1e-4, 2e-3, 5e-3)


def test_extends_states_only_what_differs_over_any_number_of_files(write) -> None:  # type: ignore[no-untyped-def]
    write("trunk: {epochs: 1, batch_size: 8}\nreuse: [a, b]\nseed: 1", "base/base.yaml")
    write("extends: base.yaml\ntrunk: {epochs: 2}\nseed: 2", "base/middle.yaml")
    recipe = load_recipe(write("extends: base/middle.yaml\ntrunk: {image_size: 64}\nreuse: [c]"))
    assert (recipe.trunk.epochs, recipe.trunk.batch_size, recipe.trunk.image_size) == (2, 8, 64)
    assert (recipe.seed, recipe.reuse) == (2, ["c"])


def test_extends_that_leads_nowhere_or_in_a_circle_is_refused(write) -> None:  # type: ignore[no-untyped-def]
    assert "which does not exist; correct the path" in refusal(write("extends: gone.yaml"))
    write("extends: hardmoe.yaml", "other.yaml")
    told = refusal(write("extends: other.yaml"))
    assert "goes round in a circle" in told
    assert told.count("hardmoe.yaml") >= 2
    assert "must be the path of one recipe" in refusal(write("extends: [a, b]"))


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("partition.experts=16", 16),
        ("partition.experts = 16", 16),
        ("evaluation.dense_baseline=false", False),
        ("reuse=[runs/a, runs/b]", ["runs/a", "runs/b"]),
        ("dataset.id_column=null", None),
        ("root=a=b", "a=b"),
        ("trunk={epochs: 3}", 3),
    ],
)
def test_set_overrides_one_key_with_a_yaml_value(write, override: str, value: Any) -> None:  # type: ignore[no-untyped-def]
    recipe = load_recipe(write("trunk: {epochs: 9}\npartition: {experts: 2}\ndataset: {id_column: x}"), [override])
    key = override.partition("=")[0].strip()
    found: Any = recipe
    for part in ("trunk", "epochs") if key == "trunk" else key.split("."):
        found = getattr(found, part)
    assert found == value


def test_the_last_set_wins_over_the_file_and_over_earlier_ones(write) -> None:  # type: ignore[no-untyped-def]
    assert load_recipe(write("seed: 1"), ["seed=2", "seed=3"]).seed == 3


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("partition.experts", "is not of the form key=value, such as --set partition.experts=16"),
        ("=3", "is not of the form key=value"),
        ("seed.x=3", "'seed' is a value, not a section"),
        ("partition.expert=3", "did you mean 'partition.experts'?"),
        ("trunk.epochs={", "the value is not valid YAML"),
    ],
)
def test_set_that_cannot_be_applied_is_refused(write, override: str, sentence: str) -> None:  # type: ignore[no-untyped-def]
    assert sentence in refusal(write("seed: 1"), override)


def test_what_is_computed_does_not_depend_on_where_and_how(write) -> None:  # type: ignore[no-untyped-def]
    path = write("dataset: {path: a.parquet}")
    elsewhere = ["root=other", "dataset.path=b.parquet", "execution.backend=inline", "trunk.num_threads=4", "reuse=[x]"]
    assert load_recipe(path, elsewhere).what() == load_recipe(path).what()
    assert load_recipe(path, ["trunk.epochs=7"]).what() != load_recipe(path).what()


def test_resolved_recipe_reads_back_as_itself() -> None:
    recipe = load_recipe(DEMO)
    assert parse_recipe(yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json"))), "recipe.yaml") == recipe


def test_schema_for_editors_accepts_the_demo_and_refuses_an_unknown_key() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="no validator installed; the policy tests look at the keys")
    schema = json.loads(json_schema())
    demo = yaml.safe_load(DEMO.read_text())
    jsonschema.validate(demo, schema)
    jsonschema.validate({"extends": "other.yaml"}, schema)
    for wrong in ({"partitions": {}}, {"trunk": {"epoch": 1}}, {"partition": {"experts": 0}}, {"seed": "x"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(demo | wrong, schema)


def test_init_writes_the_defaults_with_a_comment_on_every_key_and_never_over_a_file(tmp_path: Path) -> None:
    path = tmp_path / "new.yaml"
    assert str(path) in write_recipe(path, force=False)
    recipe, defaults = load_recipe(path), Recipe()
    assert recipe.what() == defaults.what()
    lines = path.read_text().splitlines()
    keys = [number for number, line in enumerate(lines) if line.strip() and not line.strip().startswith("#")]
    assert all(lines[number - 1].strip().startswith("#") for number in keys)
    with pytest.raises(RecipeError, match=r"exists already; give another path, or --force to replace it"):
        write_recipe(path, force=False)
    write_recipe(path, force=True)
    with pytest.raises(RecipeError, match=r"cannot write .*; give a writable path"):
        write_recipe(tmp_path / "no" / "such" / "directory.yaml", force=False)
