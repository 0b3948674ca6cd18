"""Training one network as a unit of a stage: what trunk, dense baseline and experts have in common.

The unit streams its examples' shards once, decodes them, joins the labels by id, trains with checkpoints in the root and
writes `model.safetensors`, a description and `metrics.jsonl`. Rejected: a base class for the three; they differ in what they
read and where they start, which are arguments.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from hardmoe.config import Json
from hardmoe.data.config import PILLOW_MAX_PIXELS
from hardmoe.data.loader import EncodedBatch, ExampleSet
from hardmoe.data.reading import example_shards, labels_of, num_trained_on, read_examples, training_shards
from hardmoe.errors import CorruptFileError, HardmoeError
from hardmoe.models.backbones import Backbone, TagClassifier, build_backbone
from hardmoe.models.branching import split
from hardmoe.models.flops import measure_backbone
from hardmoe.models.moe.config import MoeConfig
from hardmoe.stage import InputArtifact, UnitContext
from hardmoe.tables import ids_to_array
from hardmoe.training.config import TrainingConfig
from hardmoe.training.distillation import Teacher, drop_projection
from hardmoe.training.loop import TrainingReferences, train
from hardmoe.training.losses import start_from_shares
from hardmoe.training.unit_sinks import unit_sinks, write_log

MODEL_FILE = "model.safetensors"


@dataclass(frozen=True)
class Architecture:
    """Which network, and what it is shown: everything that is needed to build it beside the seed, and to use it."""

    backbone: str
    stem: str
    image_size: int
    num_tags: int
    decode: str
    """`full` or `reduced`: how JPEGs are decoded for it, in training and in use alike."""
    moe: MoeConfig = field(default_factory=MoeConfig)
    """Its layers of experts, of backbones that have some."""

    def to_json(self) -> Json:
        """As it is recorded; of the layers of experts, what differs from the backbone's own."""
        told = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "moe"}
        return told | ({"moe": identity} if (identity := self.moe.identity()) else {})

    @property
    def reduced(self) -> bool:
        """Whether the JPEG decoder may scale down while it decodes."""
        return self.decode == "reduced"


@dataclass(frozen=True)
class Start:
    """Where a network begins, and what of it never moves."""

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    """By their names in a `TagClassifier`; whatever has none begins fresh."""
    holds_decoder: bool = False
    """Whether the decoder stays as it begins."""
    holds_until: str | None = None
    """The stage up to which, and with it, the backbone stays as it begins; None for none."""


@dataclass(frozen=True)
class NetworkJob:
    """One training: what to read, what to build, where to start."""

    architecture: Architecture
    examples: InputArtifact
    expert: int | None
    """Which part of a partition to read; None for a whole dataset."""
    vocabulary: InputArtifact
    config: TrainingConfig
    seed: int
    start: Start = Start()
    teacher: Teacher | None = None
    """Whose outputs it follows beside the hashtags."""
    as_often_as_in: InputArtifact | None = None
    """A partition: show every example as often as all its experts together do; None to show each once."""
    num_samples: int | None = None
    """How many samples to show; None for `config.epochs` times all."""


def unit_device(context: UnitContext) -> torch.device:
    """The GPU that the unit was given, or the CPU."""
    return torch.device("cuda" if context.use_gpu and torch.cuda.is_available() else "cpu")


def training_devices(context: UnitContext) -> list[torch.device]:
    """What the unit was given to train on: its GPUs; or the CPU, once for every GPU that Ray counts where there is none.

    A share of a GPU is a limit as well: one process cannot take the memory of those that it is packed with.

    Raises:
        HardmoeError: there are fewer GPUs than the recipe asks for.
    """
    asked = context.stage.resources.num_gpus
    count = max(1, int(asked or 1)) if context.use_gpu else 1
    if unit_device(context).type == "cpu":
        return [torch.device("cpu")] * count
    if (there := torch.cuda.device_count()) < count:
        raise HardmoeError(
            f"gpus: {count} are asked for, where this process sees {there}; lower gpus, or use a machine with more"
        )
    for index in range(count):
        torch.cuda.set_per_process_memory_fraction(min(1.0, asked or 1.0), index)
    return [torch.device("cuda", index) for index in range(count)]


def build_network(architecture: Architecture, seed: int) -> TagClassifier:
    """A network with fresh weights."""
    return TagClassifier(backbone_of(architecture, seed), architecture.num_tags, seed=seed)


def backbone_of(architecture: Architecture, seed: int) -> Backbone:
    """Its backbone with fresh weights."""
    size, stem, moe = architecture.image_size, architecture.stem, architecture.moe
    return build_backbone(architecture.backbone, image_size=size, seed=seed, stem=stem, moe=moe)


def load_weights(network: InputArtifact) -> dict[str, Tensor]:
    """The weights of a finished trunk, expert or dense baseline.

    Raises:
        CorruptFileError: the file is not what was written.
    """
    try:
        weights: dict[str, Tensor] = safetensors.torch.load(network.read(MODEL_FILE))
    except safetensors.SafetensorError as error:
        where = network.storage.where(network.path(MODEL_FILE))
        raise CorruptFileError(f"{where} is damaged: {error}; delete the artifact and run again") from error
    return weights


def load_network(network: InputArtifact) -> TagClassifier:
    """A finished trunk, expert or dense baseline, in evaluation mode on the CPU."""
    model = build_network(architecture_of(network), seed=0)
    model.load_state_dict(load_weights(network))
    return model.eval()


def architecture_of(network: InputArtifact) -> Architecture:
    """Which network an artifact holds."""
    told = network.payload["architecture"]
    return Architecture(**{**told, "moe": MoeConfig.model_validate(told.get("moe", {}))})


def flops_of(network: InputArtifact) -> int:
    """Operations of a finished network's features of one image."""
    seen = architecture_of(network)
    return measure_backbone(seen.backbone, image_size=seen.image_size, stem=seen.stem, moe=seen.moe).flops


def train_network(context: UnitContext, job: NetworkJob, description_file: str) -> Json:
    """Train, and write the network's files; returns the payload of its record."""
    examples = load_examples(job, "train").labelled()
    if job.as_often_as_in is not None:
        examples = examples.shown(num_trained_on(job.as_often_as_in, examples.ids_N16))
    examples = replace(examples, budget=job.num_samples)
    validation = load_examples(job, "validation").labelled()
    model = starting_network(job, examples)
    devices = training_devices(context)
    references = TrainingReferences(validation, job.teacher)
    with unit_sinks(context) as sinks:
        try:
            result = train(model, examples, job.config, seed=job.seed, devices=devices, references=references, sinks=sinks)
        except torch.OutOfMemoryError as error:
            raise HardmoeError(remedy_for_memory(context, job.config)) from error
    drop_projection(model)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with context.output(MODEL_FILE) as out:
        out.write(safetensors.torch.save(weights))
    write_log(context, sinks)
    payload: dict[str, Json] = {
        "architecture": job.architecture.to_json(),
        "num_features": model.backbone.num_features,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "unique_examples": len(examples),
        "samples_per_epoch": list(result.samples_per_epoch),
        "examples_seen": result.examples_seen,
        "steps": result.steps,
        "final_loss": result.final_loss,
        "validation_precision@1": result.validation_precision_at_1,
    }
    if any(not parameter.requires_grad for parameter in model.parameters()):
        payload["trained_parameters"] = sum(each.numel() for each in model.parameters() if each.requires_grad)
    if job.teacher is not None:
        payload["teacher_flops"] = job.teacher.flops * result.examples_seen
    if result.divergence is not None:
        payload["divergence"] = asdict(result.divergence)
    if result.selection is not None:
        payload["selection"] = asdict(result.selection)
    with context.output(description_file) as out:
        out.write((json.dumps(payload, indent=1, sort_keys=True) + "\n").encode())
    return payload


def remedy_for_memory(context: UnitContext, config: TrainingConfig) -> str:
    """What to say where a GPU, or the share of it, has no memory left."""
    share = context.stage.resources.num_gpus or 1
    raised = f", or raise gpus (now {share:g})" if share < 1 else ""
    return (
        f"the GPU's memory does not suffice for batches of {config.batch_size} images; raise accumulate (now "
        f"{config.accumulate}), which takes each in pieces, or lower batch_size{raised}"
    )


def starting_network(job: NetworkJob, examples: ExampleSet) -> TagClassifier:
    """The network of a job before its first step, what is held already without a gradient."""
    model = build_network(job.architecture, job.seed)
    model.load_state_dict({**model.state_dict(), **job.start.weights})
    if job.config.loss == "sigmoid" and "decoder.bias" not in job.start.weights and len(examples):
        start_from_shares(model.decoder, examples)
    model.decoder.requires_grad_(not job.start.holds_decoder)
    if job.start.holds_until is not None:
        model.backbone.hold(split(model.backbone, job.start.holds_until, job.architecture.backbone).shared)
    if job.teacher is not None:
        job.teacher.prepare(model, job.seed)
    return model


def load_examples(job: NetworkJob, split: str) -> ExampleSet:
    """A split's examples, decoded, with their labels."""
    training = split == "train"
    paths = training_shards(job.examples, job.expert) if training else example_shards(job.examples, split, job.expert)
    return ExampleSet.from_stream(
        _encoded(job, split, paths),
        image_size=job.architecture.image_size,
        max_pixels=PILLOW_MAX_PIXELS,  # the dataset stage has held every image against the recipe's own limit
        num_threads=job.config.num_threads,
        scratch_path=Path(tempfile.gettempdir()),
        reduced=job.architecture.reduced,
    )


def _encoded(job: NetworkJob, split: str, paths: list[str]) -> Iterator[EncodedBatch]:
    all_ids = [
        ids_to_array(t.column("example_id")) for p in paths for t in read_examples(job.examples, [p], columns=["example_id"])
    ]
    labels = labels_of(job.vocabulary, np.concatenate(all_ids) if all_ids else np.zeros((0, 16), np.uint8), split=split)
    start = 0
    for table in read_examples(job.examples, paths, columns=["example_id", "image"]):
        stop = start + table.num_rows
        low, high = labels.offsets[start], labels.offsets[stop]
        offsets = labels.offsets[start : stop + 1] - low
        yield EncodedBatch(
            ids_to_array(table.column("example_id")), table.column("image").to_pylist(), labels.indices_L[low:high], offsets
        )
        start = stop
