"""What a checkpoint holds: a model and its optimiser as named tensors in host memory, and whose training they belong to."""

import hashlib
import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn, optim

from hardmoe.config import Json
from hardmoe.data.loader import ExampleSet
from hardmoe.training.checkpoint import host_copy

_FORMAT = 2
"""Raised when a checkpoint holds something else than before: those of an earlier format are not resumed."""
_BATCH = 256


def take_snapshot(model: nn.Module, optimizer: optim.Optimizer) -> dict[str, Tensor]:
    """Copies of `model.<name>` and of whatever the optimiser keeps of a parameter, `optimizer.<key>.<name>`."""
    tensors = {f"model.{name}": host_copy(tensor) for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{key}.{name}"] = host_copy(value)
    return tensors


def restore_snapshot(model: nn.Module, optimizer: optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put a snapshot back; an optimiser of which it holds nothing begins anew."""
    model.load_state_dict({name: tensors[f"model.{name}"] for name in model.state_dict()})
    optimizer.state.clear()
    parameters = dict(model.named_parameters())
    for path, tensor in tensors.items():
        kind, _, rest = path.partition(".")
        if kind == "optimizer":
            key, _, name = rest.partition(".")
            parameter = parameters[name]
            # Moments lie where and as their parameter does, counts of steps where the optimiser put them: on the host.
            like = parameter if tensor.shape == parameter.shape else tensor
            optimizer.state[parameter][key] = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def training_digest(model: nn.Module, examples: ExampleSet, facts: Sequence[Json]) -> str:
    """Names the training that a checkpoint belongs to: format, facts, examples, initial weights, what is trainable.

    Args:
        model: before its first step.
        examples: what it is trained on.
        facts: whatever else decides the weights, such as config and seed.
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
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
