"""What is looked at before anything is started: everything that would otherwise fail hours later, or not at all.

A misspelt root in `reuse`, a root that was taken from and is gone, a backbone that does not exist or does not take images of
this size, a file of weights that is another network's, a unified space that is too wide, more principal directions than features
have dimensions, a dataset with nothing to evaluate on. Rejected: leaving these to the stage that stumbles over them, which is
after the ingestion of all images, or after the training of all experts.
"""

from hardmoe.artifacts.other_run import OtherRun
from hardmoe.artifacts.record import RECORD_NAME, parse_record
from hardmoe.artifacts.store import Artifact, find_reusable
from hardmoe.cli.common import RECIPE_FILE
from hardmoe.data.given_parts import check_parts
from hardmoe.data.splits import check_test_examples, check_test_labels
from hardmoe.decoder.config import DecoderConfig
from hardmoe.distil.stage import NETWORK
from hardmoe.errors import MissingRecordError, RebuiltInputError, RecipeError
from hardmoe.execution.plan import Plan
from hardmoe.pipeline import rival_network
from hardmoe.recipe import Recipe
from hardmoe.storage import open_storage

_NETWORKS = ("trunk", "expert")
_PROJECTING = ("router", "given-router", "sweep-sample")
"""Kinds of stages that fit principal directions."""


def check_before_building(recipe: Recipe, plan: Plan) -> None:
    """Look at all of it.

    Raises:
        RecipeError: the recipe asks for something impossible.
        DataError: the parts that the dataset's own column gives are not as many as the experts, or an evaluation is asked for and
            there is nothing to evaluate on.
        ArtifactError: an artifact that lies in another root is there no more.
    """
    _check_reuse(recipe)
    _check_given_parts(recipe, plan)
    _check_test_split(recipe, plan)
    for stage in plan.missing:
        for name in stage.inputs.values():
            if (artifact := plan.artifacts.get(name)) is not None:
                _check_origin(artifact)
    missing = {stage.kind for stage in plan.missing}
    if recipe.partition.components is not None and missing & {*_PROJECTING}:
        _check_components(recipe.partition.components, _features_width(recipe, plan))
    if missing & {*_NETWORKS, "decoder"}:
        width = _probed_width(recipe) if missing & {*_NETWORKS} else _trained_width(recipe, plan)
        if width is not None:
            _check_decoder(recipe.decoder, width)
    _check_rivals(recipe, plan)
    _check_student(recipe, plan)
    if missing & {*_NETWORKS} and recipe.experts.shared_stage is not None:
        from hardmoe.models.probe import check_branch

        trunk = recipe.trunk
        check_branch(trunk.backbone, recipe.experts.shared_stage, image_size=trunk.image_size, stem=trunk.stem, moe=trunk.moe)
    if "expert" in missing and (recipe.experts.init_path or recipe.experts.init_root):
        _check_start(recipe)


def taken_over(recipe: Recipe, plan: Plan) -> dict[str, Artifact]:
    """The missing artifacts that `reuse` would supply, by name."""
    known = dict(plan.artifacts)
    found: dict[str, Artifact] = {}
    for stage in plan.missing:
        if all(name in known for name in stage.inputs.values()):
            inputs = {role: known[name] for role, name in stage.inputs.items()}
            artifact = find_reusable(stage.name, plan.fingerprints[stage.name], inputs, recipe.reuse)
            if artifact is not None:
                known[stage.name] = found[stage.name] = artifact
    return found


def _check_test_split(recipe: Recipe, plan: Plan) -> None:
    """A dataset and a vocabulary that were finished when nobody asked for an evaluation yet."""
    if "evaluation" not in {stage.name for stage in plan.missing}:
        return
    known = plan.artifacts | (taken_over(recipe, plan) if recipe.reuse else {})
    if (dataset := known.get("dataset")) is not None:
        check_test_examples(recipe.dataset, dataset.payload["sizes"])
    if (vocabulary := known.get("vocabulary")) is not None:
        check_test_labels(recipe.hashtags, vocabulary.payload["labelled"])


def _check_reuse(recipe: Recipe) -> None:
    for root in recipe.reuse:
        if not open_storage(root).exists(RECIPE_FILE):
            raise RecipeError(f"reuse names '{root}', where no run was begun; correct the root or take it out of 'reuse'")


def _check_given_parts(recipe: Recipe, plan: Plan) -> None:
    """Whether a dataset that is there already has as many parts as there are to be experts."""
    if recipe.partition.method == "given":
        dataset = plan.artifacts.get("dataset") or taken_over(recipe, plan).get("dataset")
        if dataset is not None:
            check_parts(dataset.payload["parts"], recipe.partition.experts)


def _check_origin(artifact: Artifact) -> None:
    """Make sure that what was taken over from another root is still there, and still the same."""
    origin = artifact.record.reused_from
    if origin is None:
        return
    where = artifact.home.where(artifact.name)
    remedy = f"bring it back, or delete {where} and what stands on it and run again"
    if not artifact.storage.exists(RECORD_NAME):
        raise MissingRecordError(f"{where} was taken over from {origin}, which is gone; {remedy}")
    there = parse_record(artifact.storage.read_bytes(RECORD_NAME), f"{origin}/{RECORD_NAME}")
    if there.digest() != artifact.record.digest():
        raise RebuiltInputError(f"{where} was taken over from {origin}, which was built anew since (other bytes); {remedy}")


def _probed_width(recipe: Recipe) -> int | None:
    """Width of the experts' features, from networks that are built without content; None where that cannot be done."""
    # Imports torch, as the driver's part of the training does anyway.
    from hardmoe.models.probe import probe_backbone

    size = recipe.trunk.image_size
    trunk_width = probe_backbone(recipe.trunk.backbone, image_size=size, stem=recipe.trunk.stem, moe=recipe.trunk.moe)
    if recipe.experts.backbone is None:
        return trunk_width
    width = probe_backbone(recipe.experts.backbone, image_size=size, stem=recipe.experts.stem, moe=recipe.experts.moe)
    if recipe.experts.decoder == "fixed" and width is not None and trunk_width is not None:
        from hardmoe.experts.start import check_decoder_fits

        check_decoder_fits(recipe.experts.backbone, width, trunk_width)
    return width


def _check_rivals(recipe: Recipe, plan: Plan) -> None:
    """Try out the networks that the mixture is to be held against."""
    missing = {stage.name for stage in plan.missing}
    for name, rival in recipe.evaluation.rivals.items():
        if rival_network(name) in missing:
            from hardmoe.models.probe import probe_backbone

            try:
                width = probe_backbone(rival.backbone, image_size=recipe.trunk.image_size, stem=rival.stem, moe=rival.moe)
                if width is not None:
                    _check_decoder(recipe.decoder, width)
            except RecipeError as error:
                raise RecipeError(f"evaluation.rivals.{name}: {error}") from error


def _check_student(recipe: Recipe, plan: Plan) -> None:
    """Try out the network that is to learn from the mixture."""
    student = recipe.distil
    if student is None or student.backbone is None or NETWORK not in {stage.name for stage in plan.missing}:
        return
    from hardmoe.models.probe import probe_backbone

    try:
        moe = recipe.trunk.moe if student.backbone == recipe.trunk.backbone else None
        width = probe_backbone(student.backbone, image_size=recipe.trunk.image_size, stem=student.stem, moe=moe)
        if width is not None:
            _check_decoder(recipe.decoder, width)
    except RecipeError as error:
        raise RecipeError(f"distil.backbone: {error}") from error


def _check_start(recipe: Recipe) -> None:
    """Hold a file or a run that experts start from against their network."""
    from hardmoe.experts.start import check_file, check_run, expert_architecture
    from hardmoe.training.network import Architecture

    trunk, experts = recipe.trunk, recipe.experts
    own = Architecture(trunk.backbone, trunk.stem, trunk.image_size, 1, trunk.decode, trunk.moe)
    architecture = expert_architecture(experts, own, 1)
    if experts.init_path is not None:
        check_file(experts.init_path, architecture)
    elif experts.init_root is not None:
        check_run(OtherRun.open(experts.init_root), experts, architecture)


def _trained_width(recipe: Recipe, plan: Plan) -> int | None:
    """Width of the experts' features, as the finished networks record it."""
    for name, artifact in plan.artifacts.items():
        if name.startswith("experts/") or (name == "trunk" and recipe.experts.backbone is None):
            width: int = artifact.payload["num_features"]
            return width
    return None


def _features_width(recipe: Recipe, plan: Plan) -> int | None:
    """Width of the features that the partition goes by; None where only their files know."""
    width: int | None = None
    if (features := plan.artifacts.get("features")) is not None:
        width = features.payload["dim"]
    elif (trunk := plan.artifacts.get("trunk")) is not None and not recipe.features.path:
        width = trunk.payload["num_features"]
    elif not recipe.features.path:
        from hardmoe.models.probe import probe_backbone

        trunk_config = recipe.trunk
        width = probe_backbone(
            trunk_config.backbone, image_size=trunk_config.image_size, stem=trunk_config.stem, moe=trunk_config.moe
        )
    return width


def _check_components(components: int, width: int | None) -> None:
    if width is not None and components > width:
        raise RecipeError(
            f"partition.components is {components}, but the features have {width} dimensions; set it to {width} or less, "
            "or leave it out"
        )


def _check_decoder(config: DecoderConfig, width: int) -> None:
    if config.dim is None and config.align != "lowrank":
        return
    from hardmoe.models.shared_decoder import check_rank, check_width

    dim = width if config.dim is None else config.dim
    check_width(dim, width)
    if config.align == "lowrank":
        check_rank(config.rank, dim, width)
