"""What a checkpoint holds: model, optimiser and average as named tensors in host memory, and whose training they belong to."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, nn, optim

from hardmoe.config import Json
from hardmoe.data.loader import ExampleSet
from hardmoe.training.average import WeightAverage
from hardmoe.training.checkpoint import host_copy
from hardmoe.training.distillation import Teacher
from hardmoe.training.optim import optimizer_state, restore_optimizer_state

_FORMAT = 2
"""Raised when a checkpoint holds something else than before: those of an earlier format are not resumed."""
_BATCH = 256


def take_snapshot(model: nn.Module, optimizer: optim.Optimizer, average: WeightAverage | None) -> dict[str, Tensor]:
    """Copies of `model.<name>`, of what the optimiser keeps of each, `optimizer.<what>.<name>`, and of `average.<name>`."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"optimizer.{name}": tensor for name, tensor in optimizer_state(model, optimizer).items()}
    if average is not None:
        tensors |= {f"average.{name}": tensor for name, tensor in average.tensors.items()}
    return {name: host_copy(tensor) for name, tensor in tensors.items()}


def restore_snapshot(
    model: nn.Module, optimizer: optim.Optimizer, average: WeightAverage | None, tensors: Mapping[str, Tensor]
) -> None:
    """Put a snapshot back; an optimiser of which it holds nothing begins anew."""
    model.load_state_dict(_below("model.", tensors))
    optimizer.state.clear()
    restore_optimizer_state(model, optimizer, _below("optimizer.", tensors))
    if average is not None:
        average.restore(_below("average.", tensors))


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def training_digest(model: nn.Module, examples: ExampleSet, facts: Sequence[Json], teacher: Teacher | None = None) -> str:
    """Names the training that a checkpoint belongs to: format, facts, examples, initial weights, what is trainable.

    Args:
        model: before its first step.
        examples: what it is trained on.
        facts: whatever else decides the weights, such as config and seed.
        teacher: whose outputs it follows.
    """
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    body = [_FORMAT, list(facts), examples.image_size, trainable]
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode())
    for array in (examples.ids_N16, examples.label_offsets, examples.label_indices_L):
        digest.update(array.tobytes())
    if examples.times_N is not None:
        digest.update(examples.times_N.tobytes())
    # An id may be the user's own name of an image that was replaced since; hashing costs a fraction of the decoding.
    for images_B3SS in examples.sequential_images(_BATCH):
        digest.update(images_B3SS.data)
    for name, tensor in chain(sorted(model.state_dict().items()), () if teacher is None else teacher.tensors()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
