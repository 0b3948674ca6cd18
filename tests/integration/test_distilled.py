"""One dense network that learns from a finished mixture: what is built, what its teacher says, what it is judged and priced by.

Shape letters: N examples, S side in pixels, Z unified dims, V tags, B batch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import copied_run, invoke, metrics, payload, records, refusal, run_here, write_recipe

from hardmoe.artifacts.names import expert_name
from hardmoe.artifacts.store import ArtifactStore
from hardmoe.data.loader import ExampleSet
from hardmoe.data.reading import tag_names
from hardmoe.distil.config import StudentConfig
from hardmoe.distil.teacher import MixtureTeacher
from hardmoe.mixture import Mixture
from hardmoe.models.backbones import TagClassifier
from hardmoe.storage import LocalStorage, open_storage
from hardmoe.training.checkpoint import Checkpoints
from hardmoe.training.config import AugmentConfig, TrainingConfig
from hardmoe.training.inference import normalised
from hardmoe.training.loop import TrainingReferences, train
from hardmoe.training.network import (
    NetworkJob,
    Start,
    architecture_of,
    load_examples,
    load_network,
    load_weights,
    starting_network,
)
from hardmoe.training.reporting import TrainingProgress, TrainingSinks
from hardmoe.training.team import pack, unpack

CPU = torch.device("cpu")
NETWORKS = {f"distilled/{part}" for part in ("network", "embeddings", "decoder")}


class Killed(Exception):
    """Stands for a signal."""


@pytest.fixture(scope="module")
def built(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The finished run with a distilled network, and what the command said."""
    directory = tmp_path_factory.mktemp("distilled")
    kept = [path.name for path in (finished / "runs/small").iterdir() if path.name not in ("evaluation", "report")]
    root = copied_run(finished, directory, keep=kept)
    result = invoke(directory, "distil", "--backend", "inline", "--set", "distil={}")
    assert result.returncode == 0, result.stderr
    run_here(directory, "report", "--set", "distil={}")
    return root, result.stdout


@pytest.fixture(scope="module")
def augmented_root(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose experts, and so the distilled network, see augmented and mixed images."""
    directory = tmp_path_factory.mktemp("distilled-augmented")
    (directory / "photos").symlink_to((finished / "photos").resolve())
    experts = {"epochs": 1, "augment": {"flip": True, "mixup": 0.4}}
    student = {"weight": 0.7, "temperature": 2.0, "memory_gib": 1e-6}
    write_recipe(
        directory, experts=experts, distil=student, evaluation={"dense_baseline": False}, reuse=[str(finished / "runs/small")]
    )
    run_here(directory, "distil")
    return directory / "runs" / "small"


def test_only_the_distilled_network_is_built_and_the_command_prints_its_row(built: tuple[Path, str], finished: Path) -> None:
    root, said = built
    before, after = records(finished / "runs/small"), records(root)
    assert {Path(name).parent.as_posix() for name in after.keys() - before.keys()} == NETWORKS
    changed = {Path(name).parent.as_posix() for name in before if name in after and before[name] != after[name]}
    assert changed == {"evaluation", "report"}
    rows = [line.split()[0] for line in said.splitlines() if line and line[0].isalpha()]
    assert rows.index("distilled") == rows.index("mixture") + 1
    assert "mixture - distilled, precision@1: " in said
    assert list(metrics(root)["systems"]) == ["trunk", "dense", "dense_refit", "experts_own_decoder", "mixture", "distilled"]


def test_it_is_one_network_in_use_and_its_training_stands_on_the_mixtures(built: tuple[Path, str]) -> None:
    root, said = built
    costs, network, dense = metrics(root)["costs"], payload(root, "distilled/network"), payload(root, "baselines/dense")
    mixture, found = costs["mixture"], costs["distilled"]
    for same in ("parameters", "active_parameters", "flops"):
        assert found[same] == costs["dense_refit"][same]
    assert network["parameters"] == dense["parameters"]
    assert network["examples_seen"] == dense["examples_seen"]
    assert found["images_seen"] == mixture["images_seen"] + network["examples_seen"]
    assert found["teacher_flops"] == mixture["training_flops"] + network["teacher_flops"]
    # Beside the answers, its own steps and refit are the dense baseline's, which started from the trunk.
    own = found["training_flops"] - found["teacher_flops"]
    assert own == costs["dense_refit"]["training_flops"] - costs["trunk"]["training_flops"]
    assert "teacher_flops" not in mixture
    assert "distilled: of its " in said


def test_what_was_learnt_along_for_the_comparison_is_not_kept(built: tuple[Path, str]) -> None:
    root, _ = built
    store = ArtifactStore(open_storage(str(root)))
    assert load_weights(store.get("distilled/network")).keys() == load_weights(store.get("baselines/dense")).keys()


def test_report_shows_the_distilled_network(built: tuple[Path, str]) -> None:
    root, _ = built
    page = (root / "report/index.html").read_text()
    assert "one network that learnt from the mixture" in page
    assert "of it the mixture's" in page


def test_experts_are_asked_and_their_passes_counted_where_images_are_augmented(
    augmented_root: Path, built: tuple[Path, str]
) -> None:
    asked, known = payload(augmented_root, "distilled/network"), payload(built[0], "distilled/network")
    per_image, cached = (told["teacher_flops"] // told["examples_seen"] for told in (asked, known))
    costs = metrics(augmented_root)["costs"]
    # An expert and the decoder are what an image costs the mixture but for the gate; the cache has the expert's part already.
    assert per_image == pytest.approx(costs["mixture"]["flops"] / 2, rel=0.05)
    assert 0 < cached < 0.2 * per_image
    assert costs["distilled"]["teacher_flops"] == costs["mixture"]["training_flops"] + asked["teacher_flops"]


def teacher_of(root: Path, live: bool, **student: Any) -> MixtureTeacher:
    store = ArtifactStore(open_storage(str(root)))
    experts = [store.get(f"experts/{expert_name(expert)}") for expert in range(3)] if live else []
    return MixtureTeacher.of(StudentConfig(**student), store.get("embeddings"), store.get("decoder"), experts)


def job_of(root: Path, config: TrainingConfig, teacher: MixtureTeacher | None) -> NetworkJob:
    store = ArtifactStore(open_storage(str(root)))
    trunk = store.get("trunk")
    start = Start(load_weights(trunk))
    examples, vocabulary = store.get("dataset"), store.get("vocabulary")
    return NetworkJob(architecture_of(trunk), examples, None, vocabulary, config, seed=5, start=start, teacher=teacher)


@pytest.fixture(scope="module")
def examples(finished: Path) -> ExampleSet:
    """The labelled training examples of the finished run."""
    return load_examples(job_of(finished / "runs/small", TrainingConfig(), None), "train").labelled()


@pytest.mark.parametrize(("live", "tolerance"), [(True, 1e-5), (False, 5e-3)], ids=["asked", "known"])
def test_on_plain_images_the_teacher_says_what_the_mixture_says(
    finished: Path, examples: ExampleSet, live: bool, tolerance: float
) -> None:
    """Both round nothing or, where the answers are those stored, to float16."""
    root = finished / "runs/small"
    mixture = Mixture.load(str(root))
    pixels_B3SS = torch.from_numpy(examples.images_at(np.arange(96)))
    teacher = teacher_of(root, live).on(CPU)
    unified_BZ, logits_BV = teacher.answers(normalised(pixels_B3SS), teacher.keys(examples.ids_N16[:96]))
    seen = mixture.see(pixels_B3SS.numpy())
    experts_B = mixture.route_seen(seen)
    assert len(np.unique(experts_B)) == 3
    expected_BZ = mixture.embed_seen(seen, experts_B)
    torch.testing.assert_close(unified_BZ, expected_BZ, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(logits_BV.softmax(1), mixture.decode(expected_BZ), rtol=tolerance, atol=tolerance)
    assert logits_BV.shape[1] == len(tag_names(mixture.store.get("vocabulary")))


def test_experts_come_into_memory_when_they_are_asked_and_leave_it_for_others(finished: Path, examples: ExampleSet) -> None:
    root, images_B3SS = finished / "runs/small", torch.zeros(len(examples), 3, 16, 16)
    keys_B = teacher_of(root, True).keys(examples.ids_N16)
    free, narrow = teacher_of(root, True).on(CPU), teacher_of(root, True, memory_gib=1e-6).on(CPU)
    assert free.networks is not None
    assert narrow.networks is not None
    assert free.networks.num_loads == 0
    of_one_B = keys_B[torch.from_numpy(free.known.experts_N)[keys_B] == 1]
    free.answers(images_B3SS[: len(of_one_B)], of_one_B)
    assert free.networks.numbers == [1]
    for teacher in (free, narrow):
        for _ in range(2):
            said = teacher.answers(images_B3SS[:64], keys_B[:64])
    assert (free.networks.num_loads, narrow.networks.num_loads) == (3, 6)
    assert len(narrow.networks.numbers) == 1
    assert torch.equal(said[0], free.answers(images_B3SS[:64], keys_B[:64])[0])


def trained(
    root: Path,
    examples: ExampleSet,
    config: TrainingConfig,
    teacher: MixtureTeacher,
    folder: Path | None = None,
    kill_at: int = 0,
) -> dict[str, torch.Tensor]:
    def watch(progress: TrainingProgress) -> None:
        if progress.step == kill_at:
            raise Killed

    model = starting_network(job_of(root, config, teacher), examples)
    sinks = TrainingSinks(Checkpoints(LocalStorage(folder), "checkpoints") if folder else None, progress=watch)
    train(model, examples, config, seed=5, devices=[CPU], references=TrainingReferences(teacher=teacher), sinks=sinks)
    return model.state_dict()


def same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("live", "kills"), [(True, (2, 4)), (False, (5,))], ids=["asked", "known"])
def test_killed_and_resumed_distillation_has_the_bits_of_an_uninterrupted_one(
    finished: Path, examples: ExampleSet, tmp_path: Path, live: bool, kills: Sequence[int]
) -> None:
    """The checkpoint holds the map into the unified space as well, and steps are killed between checkpoints."""
    root, some = finished / "runs/small", examples.take(np.arange(120))
    augment = AugmentConfig(flip=True, crop=0.5, mixup=0.4) if live else AugmentConfig()
    config = TrainingConfig(epochs=2, batch_size=32, accumulate=2, checkpoint_every_steps=3, augment=augment)
    expected = trained(root, some, config, teacher_of(root, live))
    assert "projection.weight" in expected
    for kill_at in kills:
        with pytest.raises(Killed):
            trained(root, some, config, teacher_of(root, live), tmp_path, kill_at)
    assert same_bits(trained(root, some, config, teacher_of(root, live), tmp_path), expected)


def test_checkpoint_of_another_teachers_weight_is_not_gone_on_from(finished: Path, examples: ExampleSet, tmp_path: Path) -> None:
    root, some = finished / "runs/small", examples.take(np.arange(64))
    config = TrainingConfig(epochs=2, batch_size=32, checkpoint_every_steps=1)
    with pytest.raises(Killed):
        trained(root, some, config, teacher_of(root, False), tmp_path, kill_at=3)
    other = teacher_of(root, False, embedding_weight=2.0)
    assert same_bits(trained(root, some, config, other, tmp_path), trained(root, some, config, other))


def test_teacher_reaches_the_processes_of_further_devices_whole(finished: Path, examples: ExampleSet) -> None:
    root, images_B3SS = finished / "runs/small", torch.rand(8, 3, 16, 16)
    teacher = teacher_of(root, True, weight=0.25)
    network: TagClassifier = load_network(ArtifactStore(open_storage(str(root))).get("trunk"))
    _, there = unpack(pack(network, teacher))
    assert there is not None
    found = [each.on(CPU).answers(images_B3SS, each.keys(examples.ids_N16[:8])) for each in (teacher, there)]  # type: ignore[attr-defined]
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ([], "the recipe distils nothing (distil is null); write `distil: {}` into it"),
        (["distil={backbone: resnet19, init: random}"], "distil.backbone: unknown backbone 'resnet19'; did you mean resnet18"),
        (["distil={wieght: 0.5}"], "unknown key 'distil.wieght'; did you mean 'distil.weight'?"),
    ],
)
def test_command_that_cannot_distil_says_so_in_one_sentence(
    finished: Path, tmp_path: Path, settings: Sequence[str], sentence: str
) -> None:
    kept = [path.name for path in (finished / "runs/small").iterdir() if path.name not in ("evaluation", "report")]
    copied_run(finished, tmp_path, keep=kept)
    given = [word for setting in settings for word in ("--set", setting)]
    assert sentence in refusal(invoke(tmp_path, "distil", "--backend", "inline", *given))
