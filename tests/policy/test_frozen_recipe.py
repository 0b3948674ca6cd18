"""The recipe's keys, which of them bear identity, and the recipes that the project ships.

Moving a key from `identity` to `operational` makes finished runs of two different things look the same; moving it the other
way makes every finished run look drifted. So both lists stand here in full.
"""

import json
from pathlib import Path

import pytest
from iconify_layout import LEFT_HALF, write_package
from support import hardmoe, snapshot
from yfcc_layout import write_yfcc

from hardmoe.cli.detection import read_detection
from hardmoe.cli.study import read_study
from hardmoe.config import Config
from hardmoe.detection.config import DetectionConfig
from hardmoe.recipe import Recipe, load_recipe

PIPELINES = Path(__file__).parents[2] / "pipelines"
STUDIES = {path for path in PIPELINES.rglob("*.yaml") if "\nlines:" in path.read_text()}
DETECTIONS = {path for path in PIPELINES.rglob("*.yaml") if "\ncanvases:" in path.read_text()}
RECIPES = sorted({*PIPELINES.rglob("*.yaml")} - STUDIES - DETECTIONS)

IDENTITY = """
    dataset.source dataset.image_column dataset.tags_column dataset.id_column dataset.split_column
    dataset.license_column dataset.part_column dataset.test_fraction dataset.validation_fraction dataset.store dataset.store_size
    dataset.near_duplicates dataset.near_radius dataset.near_difference dataset.max_bad_fraction
    dataset.icon_size dataset.shard_rows dataset.max_pixels
    hashtags.min_count hashtags.max_tags
    trunk.backbone trunk.stem trunk.image_size trunk.decode trunk.epochs trunk.batch_size trunk.repeat_threshold
    trunk.learning_rate trunk.momentum
    trunk.nesterov trunk.weight_decay trunk.warmup_fraction
    trunk.accumulate trunk.optimizer trunk.schedule trunk.beta2 trunk.max_grad_norm trunk.ema_decay
    trunk.loss trunk.class_weights trunk.label_smoothing trunk.early_stop trunk.keep
    trunk.augment.crop trunk.augment.crop_ratio trunk.augment.flip trunk.augment.jitter trunk.augment.randaugment
    trunk.augment.magnitude trunk.augment.mixup trunk.augment.cutmix
    trunk.moe.placement trunk.moe.num_experts trunk.moe.k trunk.moe.mlp_ratio trunk.moe.capacity_factor
    trunk.moe.inference_capacity_factor trunk.moe.priority trunk.moe.group_images trunk.moe.router trunk.moe.noise
    trunk.moe.constraint trunk.moe.loss_weight trunk.moe.threshold trunk.moe.dropout trunk.moe.dispatch
    partition.experts partition.method partition.fine_clusters partition.slack partition.overlap
    partition.out_of_part_fraction
    partition.transform partition.components partition.spherical
    partition.sample_size partition.restarts partition.max_share partition.max_passes partition.tolerance
    experts.backbone experts.stem experts.init experts.epochs experts.batch_size experts.repeat_threshold
    experts.learning_rate experts.momentum
    experts.nesterov experts.weight_decay experts.warmup_fraction
    experts.accumulate experts.optimizer experts.schedule experts.beta2 experts.max_grad_norm experts.ema_decay
    experts.branch_at experts.decoder experts.distill.weight experts.distill.temperature
    experts.budget experts.loss experts.class_weights experts.label_smoothing experts.early_stop experts.keep
    experts.augment.crop experts.augment.crop_ratio experts.augment.flip experts.augment.jitter experts.augment.randaugment
    experts.augment.magnitude experts.augment.mixup experts.augment.cutmix
    experts.moe.placement experts.moe.num_experts experts.moe.k experts.moe.mlp_ratio experts.moe.capacity_factor
    experts.moe.inference_capacity_factor experts.moe.priority experts.moe.group_images experts.moe.router experts.moe.noise
    experts.moe.constraint experts.moe.loss_weight experts.moe.threshold experts.moe.dropout experts.moe.dispatch
    decoder.epochs decoder.align decoder.rank decoder.dim decoder.temperature decoder.loss decoder.classes decoder.sampled_tags
    decoder.rounds decoder.round_epochs
    decoder.batch_size decoder.learning_rate decoder.weight_decay
    evaluation.dense_baseline evaluation.random_partition evaluation.top_k evaluation.all_experts evaluation.rivals
    evaluation.retrieval_sample evaluation.probe evaluation.transfer evaluation.probe_sample evaluation.abstention
    evaluation.bootstrap_replicates evaluation.map_replicates
    distil seed
"""
"""What is computed: a change of any of these is another run."""

MOE = ["placement", "num_experts", "k", "mlp_ratio", "capacity_factor", "inference_capacity_factor", "priority", "router"]
MOE += ["noise", "constraint", "loss_weight", "threshold", "dropout"]
"""Keys of `moe` that say nothing until they are set."""

ADDED = {
    "dataset.part_column": None,
    "partition.fine_clusters": None,
    "partition.slack": 0.05,
    "partition.overlap": None,
    "partition.out_of_part_fraction": 0.0,
    "partition.components": None,
    "partition.spherical": False,
    "experts.budget": "epochs",
    "experts.branch_at": "image",
    "experts.decoder": "own",
    "experts.distill.weight": 0.0,
    "experts.distill.temperature": 1.0,
    "evaluation.top_k": None,
    "evaluation.all_experts": False,
    "evaluation.rivals": {},
    "evaluation.retrieval_sample": 20_000,
    "evaluation.probe": False,
    "evaluation.transfer": None,
    "evaluation.probe_sample": 20_000,
    "evaluation.abstention": False,
    "distil": None,
    "decoder.rank": 8,
    "decoder.rounds": 0,
    "decoder.round_epochs": 1,
    "decoder.temperature": None,
    "decoder.loss": "softmax",
    "decoder.classes": "full",
    "decoder.sampled_tags": 8192,
    **{
        f"{section}.{key}": default
        for section in ("trunk", "experts")
        for key, default in {
            "accumulate": 1,
            "optimizer": "sgd",
            "schedule": "cosine",
            "beta2": 0.999,
            "max_grad_norm": None,
            "ema_decay": None,
            "loss": "softmax",
            "class_weights": "none",
            "label_smoothing": 0.0,
            "early_stop": None,
            "keep": "last",
            "augment.crop": None,
            "augment.crop_ratio": 1.3333,
            "augment.flip": False,
            "augment.jitter": 0.0,
            "augment.randaugment": 0,
            "augment.magnitude": 9,
            "augment.mixup": 0.0,
            "augment.cutmix": 0.0,
            **{f"moe.{key}": None for key in MOE},
            "moe.group_images": 8,
            "moe.dispatch": "grouped",
        }.items()
    },
}
"""Of these, the keys that came after the first runs: they bear identity unless they have this default. Another default would make
finished runs of two different things look the same, so it never changes."""

OPERATIONAL = """
    root reuse
    dataset.path dataset.image_root dataset.tags_path
    hashtags.aliases hashtags.allow hashtags.deny
    features.path features.num_threads
    trunk.gpus trunk.num_threads trunk.checkpoint_every_steps trunk.checkpoint_every_seconds
    experts.gpus experts.num_threads experts.checkpoint_every_steps experts.checkpoint_every_seconds
    decoder.num_threads decoder.checkpoint_every_steps decoder.memory_gib
    execution.backend execution.address execution.parallel execution.attempts
"""
"""Where and how: a change of any of these leaves every fingerprint as it is. Files count by content, not by path."""


def _sections() -> dict[str, type[Config]]:
    """The recipe itself, by the empty prefix, and its sections by theirs, at any depth."""
    found: dict[str, type[Config]] = {}

    def visit(section: type[Config], prefix: str) -> None:
        found[prefix] = section
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Config):
                visit(field.annotation, f"{prefix}{name}.")

    visit(Recipe, "")
    return found


def _marks() -> dict[str, bool]:
    """Every key of the recipe, and whether it is operational; a section's own mark holds for all its keys."""
    sections = _sections()
    keys = {(prefix, name) for prefix, section in sections.items() for name in section.model_fields}
    keys = {(prefix, name) for prefix, name in keys if f"{prefix}{name}." not in sections}
    whole = {f"{name}." for name in Recipe.operational_fields()}
    return {prefix + name: prefix in whole or name in sections[prefix].operational_fields() for prefix, name in keys}


def test_every_key_is_frozen_as_identity_or_operational() -> None:
    marks = _marks()
    assert {key for key, operational in marks.items() if not operational} == set(IDENTITY.split())
    assert {key for key, operational in marks.items() if operational} == set(OPERATIONAL.split())


def test_identity_of_a_recipe_holds_exactly_the_identity_keys() -> None:
    flat: set[str] = set()
    for section, value in Recipe().what().items():
        flat |= {f"{section}.{key}" for key in value} if isinstance(value, dict) else {section}
    assert flat == set(IDENTITY.split()) - ADDED.keys()


def test_keys_that_came_later_have_their_frozen_defaults() -> None:
    sections = _sections()
    found = {prefix + name: section.model_fields[name] for prefix, section in sections.items() for name in section.added_fields()}
    assert {key: field.default for key, field in found.items() if f"{key}." not in sections} == ADDED


def test_sections_that_came_later_are_off_until_something_in_them_is_set() -> None:
    sections = _sections()
    later = [(section, name) for section in sections.values() for name in section.added_fields()]
    nested = [section.model_fields[name] for section, name in later if isinstance(section.model_fields[name].default, Config)]
    assert len(nested) == 5
    for field in nested:
        assert field.default == field.annotation()
        assert field.default.identity() == {}
        assert field.annotation.added_fields() == set(field.annotation.model_fields)


def test_every_key_is_explained_in_a_sentence() -> None:
    """`hardmoe init` prints these as comments, and editors show them from the schema."""
    fields = {prefix + name: field for prefix, section in _sections().items() for name, field in section.model_fields.items()}
    assert [key for key, field in fields.items() if not (field.description or "").strip().endswith(".")] == []


def test_every_key_of_a_detection_is_explained_and_only_places_are_operational() -> None:
    sections = {"": DetectionConfig}
    sections |= {
        f"{name}.": field.annotation
        for name, field in DetectionConfig.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Config) and name != "dataset"
    }
    keys = {f"{prefix}{name}": field for prefix, section in sections.items() for name, field in section.model_fields.items()}
    assert [key for key, field in keys.items() if not (field.description or "").strip().endswith(".")] == []
    operational = {f"{prefix}{name}" for prefix, section in sections.items() for name in section.operational_fields()}
    assert {key for key in operational if not key.startswith("execution")} == {
        "root",
        *(f"{section}.{key}" for section in ("baseline", "heads") for key in ("num_threads", "checkpoint_every_steps")),
    }


def test_schema_for_editors_knows_every_key(tmp_path: Path) -> None:
    result = hardmoe(tmp_path, "init", "--schema")
    assert result.returncode == 0, result.stderr
    schema = json.loads(result.stdout)
    assert set(schema["properties"]) == {*Recipe.model_fields, "extends"}
    assert schema["additionalProperties"] is False


def test_written_recipe_is_the_default_recipe(tmp_path: Path) -> None:
    """Every key at its default but the two that are examples, so that what one reads there is what one gets."""
    assert hardmoe(tmp_path, "init").returncode == 0
    written, default = load_recipe(tmp_path / "hardmoe.yaml"), Recipe()
    assert written.what() == default.what()
    assert written.execution == default.execution


def _collect(project: Path, recipe: Path) -> None:
    """Put a small collection where the recipe looks for its large one; `photos/` is there already."""
    if recipe.name.startswith("icons390k"):
        write_package(project / "data" / "iconify" / "package", {"s": {"icons": {"half": {"body": LEFT_HALF}}}})
    elif recipe.name == "yfcc100m.yaml":
        write_yfcc(project / "data" / "yfcc100m", project / "images", num_images=3)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_shipped_recipe_dry_runs_and_builds_nothing(project: Path, recipe: Path) -> None:
    _collect(project, recipe)
    before = snapshot(project)
    result = hardmoe(project, "run", "--dry-run", "-f", str(recipe))
    assert result.returncode == 0, result.stderr
    assert "artifacts would be built" in result.stdout
    for artifact in ("dataset", "router", "experts/expert-0000", "decoder", "report"):
        assert any(line.split()[:2] == [artifact, "missing"] for line in result.stdout.splitlines()), artifact
    # Digests of the user's files may be kept for the next time; nothing else may have appeared.
    new = {path for path in snapshot(project) if path not in before}
    assert all(path.endswith("/_progress/inventory.json") for path in new), new


@pytest.mark.parametrize("recipe", [*RECIPES, *sorted(STUDIES | DETECTIONS)], ids=lambda path: path.name)
def test_shipped_recipe_says_its_command_and_stands_in_the_table(recipe: Path) -> None:
    head = [line for line in recipe.read_text().splitlines() if line.startswith("#")]
    assert any("Command:" in line for line in head), "a recipe states its command in its head"
    assert f"`{recipe.relative_to(PIPELINES)}`" in (PIPELINES / "README.md").read_text()
    if recipe in DETECTIONS:
        root = read_detection({"recipe_path": recipe, "overrides": []}).root
    else:
        root = read_study(recipe)[0].root if recipe in STUDIES else load_recipe(recipe).root
    assert root.startswith("runs/"), "a shipped recipe writes below runs/, which git ignores"


@pytest.mark.parametrize("study", sorted(STUDIES), ids=lambda path: path.name)
def test_every_line_of_a_shipped_study_is_a_recipe(study: Path) -> None:
    config, runs = read_study(study)
    for run in runs:
        assert load_recipe(study.parent / config.recipe, run.overrides).root == run.root
