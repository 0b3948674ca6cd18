"""The stages of a recipe, inputs first: the one place that knows how the stage families meet.

Pure data in, pure data out; nothing heavy is imported, and only `identify_inputs` reads anything. The controls (dense
baseline, its refitted decoder, the random partition) are the same stages over other inputs, so a control can never get less
care than what it controls. Rejected: a graph declared in the recipe, which no user wants to write.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from hardmoe.artifacts.names import DENSE, LIMITS, ROUNDS, TRANSFER, expert_name
from hardmoe.artifacts.store import ArtifactStore
from hardmoe.config import Json
from hardmoe.data.config import DatasetConfig
from hardmoe.data.stages import SOURCE, dataset_stage, vocabulary_stage, with_followers, with_source
from hardmoe.decoder.stage import decoder_stage
from hardmoe.distil import stage as distilling
from hardmoe.distil.config import StudentConfig
from hardmoe.errors import RecipeError
from hardmoe.evaluation import stage as judging
from hardmoe.evaluation.config import RivalConfig, TransferConfig
from hardmoe.evaluation.stage import System
from hardmoe.experts.origin import Origin, identify_origin
from hardmoe.experts.stages import (
    dense_stage,
    embeddings_stage,
    expert_stage,
    further_stage,
    match_name,
    nearest_embeddings_stage,
)
from hardmoe.features.stage import external_features_stage, features_stage
from hardmoe.outside import features_digest, hashtags_digests, second_source_digest, source_digest
from hardmoe.partitioning import advice_stages
from hardmoe.partitioning.config import PartitionConfig
from hardmoe.partitioning.stages import match_stage, nearest_stage, partition_stage, router_stage
from hardmoe.recipe import Recipe
from hardmoe.report.stage import report_stage
from hardmoe.stage import Stage
from hardmoe.trunk.stage import trunk_stage

DENSE_EMBEDDINGS = "baselines/dense_embeddings"
DENSE_REFIT = "baselines/dense_refit"
RANDOM = "baselines/random"
TOP_K = "topk"
RIVALS = "rivals"
ALL_EXPERTS = "all_experts"


@dataclass(frozen=True)
class Mixture:
    """Names of the artifacts of one mixture: the recipe's, or the random control's."""

    partition: str
    experts: tuple[str, ...]
    embeddings: str
    decoder: str
    earlier: tuple[str, ...] = ()
    """Experts of the rounds before."""


@dataclass(frozen=True)
class ExternalInputs:
    """Identities of what lies outside the root."""

    source_sha256: str
    hashtags_sha256: Mapping[str, str | None] = field(default_factory=dict)
    """Of the files that `hashtags.aliases`, `allow` and `deny` name, by key."""
    features_sha256: str | None = None
    """Of the files of `features.path`; None where there are none, or while only the stages' names are of interest."""
    origin: Origin = field(default_factory=Origin)
    """Of what `experts.init` names, where it names something outside the root."""
    second_source_sha256: str | None = None
    """Of the files of `evaluation.transfer`; None where there is none, or while only the stages' names are of interest."""


def identify_inputs(recipe: Recipe, store: ArtifactStore) -> ExternalInputs:
    """Digest what lies outside the root, from the cache where nothing changed.

    Raises:
        DataError: the source cannot be listed, or a file that the recipe names cannot be read.
        DriftError: the dataset was made from other files; says which.
    """
    source = source_digest(recipe, store)
    origin = identify_origin(recipe.experts, recipe.partition.experts, recipe.evaluation.dense_baseline, store)
    second = second_source_digest(recipe, store)
    return ExternalInputs(source, hashtags_digests(recipe, store), features_digest(recipe, store), origin, second)


def build_stages(recipe: Recipe, external: ExternalInputs) -> list[Stage]:
    """All stages that the recipe asks for, every stage after its inputs."""
    stages = [
        dataset_stage(recipe.dataset, external.source_sha256, _given_parts(recipe)),
        vocabulary_stage(recipe.hashtags, external.hashtags_sha256),
        trunk_stage(recipe.trunk, recipe.seed),
        _features(recipe, external),
    ]
    if recipe.partition.is_routed:
        stages.append(router_stage(recipe.partition, recipe.seed))
    stages.append(partition_stage(recipe.partition, recipe.seed))
    mixture = _mixture(recipe, stages, ("partition", "experts", "embeddings", "decoder"), external.origin)
    # The trunk is judged by its own features, which nobody computes where the partition goes by others.
    trunk = System("features", "feature", ("trunk",), shared=False, networks=("trunk",))
    systems = {} if recipe.features.path else {"trunk": trunk}
    if recipe.evaluation.dense_baseline:
        systems |= _dense(recipe, stages, external.origin)
    for name, rival in recipe.evaluation.rivals.items():
        systems[name] = _rival(recipe, stages, name, rival)
    whole = _system(recipe, mixture)
    systems |= {"experts_own_decoder": replace(whole, decoders=mixture.experts, shared=False), "mixture": whole}
    if recipe.distil is not None:
        systems["distilled"] = _distilled(recipe, stages, mixture, recipe.distil)
    if recipe.evaluation.top_k is not None:
        systems["mixture_topk"] = _top_k(recipe, stages, mixture, recipe.evaluation.top_k)
    if recipe.evaluation.all_experts:
        systems |= _all_experts(recipe, stages, mixture)
    if recipe.evaluation.random_partition:
        random = _random(recipe, stages, external.origin)
        systems["random_partition"] = replace(_system(recipe, random), gate=None)
    further = _probes(recipe, stages, systems, external)
    if recipe.evaluation.abstention:
        further[judging.ABSTENTION] = LIMITS
        stages.append(nearest_stage(1, f"{judging.ABSTENTION}/nearest"))
        stages.append(judging.abstention_stage(recipe.evaluation, whole, f"{judging.ABSTENTION}/nearest"))
    stages.append(judging.evaluation_stage(recipe.evaluation, systems, further))
    stages.append(report_stage(recipe.what(), stages))
    return [with_source(stage, recipe.dataset) for stage in stages]


def select(stages: Sequence[Stage], targets: Sequence[str]) -> list[Stage]:
    """The target stages and everything that they stand on, in the same order."""
    wanted = set(targets)
    for stage in reversed(stages):
        if stage.name in wanted:
            wanted |= set(stage.inputs.values())
    return with_followers([stage for stage in stages if stage.name in wanted])


def sweep_stages(recipe: Recipe, counts: Sequence[int], num_seeds: int) -> list[Stage]:
    """The sample of the recipe's features, and a stage for every number of parts.

    Raises:
        RecipeError: the recipe's parts are not those of k-means, or its sample cannot hold so many.
    """
    if recipe.partition.method == "random":
        raise RecipeError(
            "--sweep compares numbers of parts for k-means, but partition.method is random, which looks at no feature; "
            "set partition.method: kmeans"
        )
    if recipe.partition.method == "two_level":
        raise RecipeError(
            "--sweep compares numbers of parts for k-means, but partition.method is two_level, whose parts are groups of finer "
            "clusters; set partition.method: kmeans"
        )
    if (most := max(counts)) > recipe.partition.sample_size:
        raise RecipeError(
            f"--sweep asks for {most} parts of a sample of {recipe.partition.sample_size} examples; "
            f"ask for fewer parts, or raise partition.sample_size to {most} or more"
        )
    return advice_stages.sweep_stages(recipe.partition, counts, num_seeds, recipe.seed)


def check_can_route(recipe: Recipe) -> None:
    """Whether a run of this recipe can say of any image which part it belongs to.

    Raises:
        RecipeError: it cannot.
    """
    reason = None
    if recipe.partition.method == "random":
        reason = "its parts are random, so nothing says where another image belongs; take a run with partition.method: kmeans"
    elif recipe.features.path:
        reason = "its parts go by features that were computed elsewhere (features.path); take a run without features.path"
    if reason is not None:
        raise RecipeError(f"--check cannot route other images by the run in {recipe.root}: {reason}")


def drift_stages(recipe: Recipe, dataset: Stage, config: DatasetConfig, place: str) -> list[Stage]:
    """The check of another dataset, in this recipe's root: its features, by this run's trunk, sent by this run's router.

    Args:
        recipe: of this run.
        dataset: the other recipe's dataset stage; its artifact must be in this root, as `place`/dataset, by reference.
        config: the other recipe's section, to read its images.
        place: directory of the check's artifacts.
    """
    own = features_stage(recipe.features)
    features = replace(
        own,
        name=f"{place}/features",
        inputs={**own.inputs, "dataset": f"{place}/dataset"},
        operational={**own.operational, SOURCE: config.model_dump(mode="json")},
    )
    return [replace(dataset, name=f"{place}/dataset"), features, advice_stages.drift_stage(place)]


def _mixture(recipe: Recipe, stages: list[Stage], names: tuple[str, str, str, str], origin: Origin) -> Mixture:
    """Add experts, embeddings and decoder over a partition; these four are named."""
    partition, place, *_ = names
    matches = match_name(place) if recipe.experts.init_root is not None else None
    if matches is not None and recipe.experts.init_root is not None:
        stages.append(match_stage(matches, partition, recipe.experts.init_root, origin.experts, recipe.seed))
    before: Mixture | None = None
    for number in range(recipe.decoder.rounds + 1):
        # What the last round gives has the names that it would have without any.
        last = number == recipe.decoder.rounds
        there = names if last else (partition, *_within(f"{place.removesuffix('experts')}{ROUNDS}{number}/"))
        before = _round(recipe, stages, there, (number, before), origin.experts, matches)
    assert before is not None
    return before


def _system(recipe: Recipe, mixture: Mixture) -> System:
    """A mixture as a system: trunk, then one of the experts, then the shared decoder."""
    return System(
        mixture.embeddings,
        "embedding",
        (mixture.decoder,),
        shared=True,
        networks=mixture.experts,
        starts=("trunk", *mixture.earlier),
        gate=None if recipe.features.path or not recipe.partition.is_routed else "trunk",
        branch_at=recipe.experts.shared_stage,
    )


def rival_network(name: str) -> str:
    """The artifact of a rival's network."""
    return f"{RIVALS}/{name}/network"


def _rival(recipe: Recipe, stages: list[Stage], name: str, rival: RivalConfig) -> System:
    """Add a network of all images that starts from fresh weights, its embeddings and its refitted decoder."""
    network, embeddings, decoder = rival_network(name), f"{RIVALS}/{name}/embeddings", f"{RIVALS}/{name}/decoder"
    epochs = rival.epochs or recipe.trunk.epochs + recipe.experts.epochs
    config = recipe.trunk.model_copy(update={"backbone": rival.backbone, "stem": rival.stem, "moe": rival.moe, "epochs": epochs})
    stages.append(trunk_stage(config, recipe.seed, network))
    stages.append(embeddings_stage(embeddings, "dataset", {0: network}, partitioned=False))
    stages.append(decoder_stage(recipe.decoder.of_one_fit(), 1, recipe.seed, decoder, embeddings, start=network))
    return System(embeddings, "embedding", (decoder,), shared=True, networks=(network,))


def _distilled(recipe: Recipe, stages: list[Stage], mixture: Mixture, student: StudentConfig) -> System:
    """Add a network that learns from the mixture, its embeddings and its decoder, refitted as its control's is."""
    if student.init == "trunk":
        # As the dense baseline, which shows an example as often as all experts together do.
        training = recipe.experts.training(student.epochs or recipe.experts.epochs)
        overlapping = mixture.partition if recipe.partition.has_extra_copies else None
        control, start = distilling.TrainedLike(training, recipe.experts.gpus, overlapping), "trunk"
    else:
        training = recipe.trunk.training(student.epochs or recipe.trunk.epochs + recipe.experts.epochs)
        control, start = distilling.TrainedLike(training, recipe.trunk.gpus), distilling.NETWORK
    taught_by = distilling.TaughtBy(mixture.embeddings, mixture.decoder, mixture.experts)
    stages.append(distilling.distilled_stage(student, control, taught_by, recipe.seed))
    stages.append(embeddings_stage(distilling.EMBEDDINGS, "dataset", {0: distilling.NETWORK}, partitioned=False))
    places = (distilling.DECODER, distilling.EMBEDDINGS)
    stages.append(decoder_stage(recipe.decoder.of_one_fit(), 1, recipe.seed, *places, start=start))
    networks = (distilling.NETWORK,)
    return System(distilling.EMBEDDINGS, "embedding", (distilling.DECODER,), shared=True, networks=networks, teacher="mixture")


def _within(prefix: str) -> tuple[str, str, str]:
    """Names of a round's experts, embeddings and decoder."""
    return f"{prefix}experts", f"{prefix}embeddings", f"{prefix}decoder"


def _round(
    recipe: Recipe,
    stages: list[Stage],
    names: tuple[str, str, str, str],
    after: tuple[int, Mixture | None],
    start: Json,
    matches: str | None,
) -> Mixture:
    """Add the experts of one round, `after` how many others and which mixture, and what is fitted to them."""
    (partition, place, embeddings, decoder), (number, before), count = names, after, recipe.partition.experts
    first = recipe.experts.epochs - recipe.decoder.rounds * recipe.decoder.round_epochs
    config = recipe.experts.model_copy(update={"epochs": first if before is None else recipe.decoder.round_epochs})
    experts = tuple(f"{place}/{expert_name(expert)}" for expert in range(count))
    for expert in range(count):
        stage = expert_stage(config, expert, recipe.seed, partition, place, start, matches)
        if before is not None:
            stage = further_stage(stage, number, before.experts[expert], before.decoder)
        stages.append(stage)
    stages.append(embeddings_stage(embeddings, partition, dict(enumerate(experts)), partitioned=True))
    stages.append(decoder_stage(recipe.decoder.of_one_fit(), count, recipe.seed, decoder, embeddings))
    earlier = () if before is None else (*before.earlier, *before.experts)
    return Mixture(partition, experts, embeddings, decoder, earlier)


def _dense(recipe: Recipe, stages: list[Stage], origin: Origin) -> dict[str, System]:
    """Add the dense baseline, its embeddings and its refitted decoder."""
    overlapping = "partition" if recipe.partition.has_extra_copies else None
    stages.append(dense_stage(recipe.experts, recipe.seed, overlapping, origin.dense))
    stages.append(embeddings_stage(DENSE_EMBEDDINGS, "dataset", {0: DENSE}, partitioned=False))
    stages.append(decoder_stage(recipe.decoder.of_one_fit(), 1, recipe.seed, DENSE_REFIT, DENSE_EMBEDDINGS))
    starts = ("trunk",) if recipe.experts.init == "trunk" else ()
    held = recipe.experts.shared_stage
    dense = System(DENSE_EMBEDDINGS, "embedding", (DENSE,), shared=False, networks=(DENSE,), starts=starts, branch_at=held)
    return {"dense": dense, "dense_refit": replace(dense, decoders=(DENSE_REFIT,), shared=True)}


def _top_k(recipe: Recipe, stages: list[Stage], mixture: Mixture, top_k: int) -> System:
    """Add what several experts say of held-out images, and how to weigh them."""
    embeddings, temperature = _several(stages, mixture, top_k, TOP_K), f"{TOP_K}/temperature"
    stages.append(judging.temperature_stage(temperature, embeddings, mixture.decoder))
    return replace(_system(recipe, mixture), embeddings=embeddings, passes=top_k, temperature=temperature)


def _all_experts(recipe: Recipe, stages: list[Stage], mixture: Mixture) -> dict[str, System]:
    """Add what all experts say of held-out images, and what each is worth on its own."""
    embeddings, losses = _several(stages, mixture, recipe.partition.experts, ALL_EXPERTS), f"{ALL_EXPERTS}/losses"
    stages.append(judging.losses_stage(losses, embeddings, mixture.decoder))
    whole = replace(_system(recipe, mixture), embeddings=embeddings)
    return {
        "best_single_expert": replace(whole, chosen_by="validation", losses=losses),
        "oracle_expert": replace(whole, chosen_by="labels"),
    }


def _several(stages: list[Stage], mixture: Mixture, count: int, place: str) -> str:
    """Add what so many of the experts nearest to each held-out image say of it; returns the artifact's name."""
    nearest, embeddings = f"{place}/nearest", f"{place}/embeddings"
    stages.append(nearest_stage(count, nearest))
    stages.append(nearest_embeddings_stage(embeddings, nearest, dict(enumerate(mixture.experts))))
    return embeddings


def _probes(recipe: Recipe, stages: list[Stage], systems: Mapping[str, System], external: ExternalInputs) -> dict[str, str]:
    """Add what is asked of the systems' spaces; returns the artifacts' names by role."""
    found, config = {}, recipe.evaluation
    spaces = {name: told for name, told in systems.items() if told.temperature is None and told.chosen_by is None}
    if config.probe:
        found[judging.OWN_IMAGES] = "probe"
        stages.append(judging.probe_stage("probe", config, spaces))
    if config.transfer is not None:
        found[judging.SECOND_DATASET] = f"{TRANSFER}probe"
        elsewhere = _elsewhere(recipe, stages, spaces, (config.transfer, external.second_source_sha256 or ""))
        stages.append(judging.probe_stage(f"{TRANSFER}probe", config, elsewhere, TRANSFER))
    return found


def _elsewhere(
    recipe: Recipe, stages: list[Stage], spaces: Mapping[str, System], second: tuple[TransferConfig, str]
) -> dict[str, System]:
    """Add a second dataset and what every network says of its images; returns the systems over them.

    Every image goes to the expert that the router sends it to; a mixture without a router is left out.
    """
    (config, sha256), dataset, trunk = second, f"{TRANSFER}dataset", f"{TRANSFER}features"
    features = features_stage(recipe.features)
    more = [
        replace(dataset_stage(config.dataset(), sha256), name=dataset),
        replace(vocabulary_stage(config.hashtags(), {}), name=f"{TRANSFER}vocabulary", inputs={"dataset": dataset}),
        replace(features, name=trunk, inputs={**features.inputs, "dataset": dataset}),
    ]
    there: dict[str, str] = {}
    for name, system in spaces.items():
        place = f"{TRANSFER}embeddings/{name if system.gate is None else 'mixture'}"
        if system.column == "feature":
            there[system.embeddings] = trunk
        elif system.embeddings in there:
            continue
        elif system.gate is not None:
            more.append(nearest_stage(1, f"{TRANSFER}nearest", trunk, training=True))
            networks = dict(enumerate(system.networks))
            more.append(nearest_embeddings_stage(place, f"{TRANSFER}nearest", networks, dataset))
            there[system.embeddings] = place
        elif len(system.networks) == 1:
            more.append(embeddings_stage(place, dataset, {0: system.networks[0]}, partitioned=False))
            there[system.embeddings] = place
    source = {SOURCE: config.dataset().model_dump(mode="json")}
    stages += [replace(stage, operational={**stage.operational, **source}) for stage in more]
    return {name: replace(told, embeddings=there[told.embeddings]) for name, told in spaces.items() if told.embeddings in there}


def _random(recipe: Recipe, stages: list[Stage], origin: Origin) -> Mixture:
    """Add a whole mixture over a random partition."""
    asked = recipe.partition
    config = PartitionConfig(experts=asked.experts, method="random", out_of_part_fraction=asked.out_of_part_fraction)
    stages.append(partition_stage(config, recipe.seed, f"{RANDOM}/partition"))
    names = (f"{RANDOM}/partition", f"{RANDOM}/experts", f"{RANDOM}/embeddings", f"{RANDOM}/decoder")
    return _mixture(recipe, stages, names, origin)


def _given_parts(recipe: Recipe) -> int | None:
    """How many parts the dataset's own column must give; None if the partition does not go by it."""
    return recipe.partition.experts if recipe.partition.method == "given" else None


def _features(recipe: Recipe, external: ExternalInputs) -> Stage:
    """The trunk's features, or those that were computed elsewhere."""
    if not recipe.features.path:
        return features_stage(recipe.features)
    return external_features_stage(recipe.features, external.features_sha256 or "", recipe.dataset.id_column is not None)
