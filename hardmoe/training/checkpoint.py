"""Checkpoints of a training in progress: tensors first, the state that vouches for them last.

    {prefix}/step-00001200/state.safetensors   model and momentum tensors
    {prefix}/step-00001200/state.json          step, state, size and SHA-256 of the tensors: the commit marker

A checkpoint exists when its `state.json` does and agrees with the tensors; anything else is passed over for an earlier
one, so a worker killed at any byte costs at most the steps since. The newest two are kept, beside them the best by the
validation split, and what a diverged training would go back to. A worker that was cut off may go on saving for a while
beside the attempt that took over: both save the same, and neither deletes what lies ahead of itself. Rejected:
`torch.save`, which pickles, and one file replaced in place, which leaves nothing to go back to.
"""

import hashlib
import json
import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import safetensors.torch
import torch
from torch import Tensor

from hardmoe.config import Json
from hardmoe.errors import StorageError
from hardmoe.storage import Storage, join

logger = logging.getLogger(__name__)

KEPT = 2
"""Checkpoints kept in any case: the newest, and one to go back to if it turns out to be damaged."""

_TENSORS, _STATE = "state.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """What was saved after `step` steps."""

    step: int
    tensors: dict[str, Tensor]
    state: Json


class Checkpoints:
    """The checkpoints of one training under a prefix of a storage."""

    def __init__(self, storage: Storage, prefix: str) -> None:
        self.storage = storage
        self.prefix = prefix

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Json, keep: Collection[int] = ()) -> None:
        """Commit a checkpoint, then delete all earlier ones but one and those of the steps to `keep`."""
        data = safetensors.torch.save({name: host_copy(tensor) for name, tensor in tensors.items()})
        marker = {"step": step, "size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "state": state}
        directory = self._directory(step)
        try:
            self.storage.write_bytes(join(directory, _TENSORS), data)
            self.storage.write_bytes(join(directory, _STATE), json.dumps(marker, allow_nan=False).encode())
        except StorageError:
            if not any(committed and other > step for other, committed in self._steps().items()):
                raise
            logger.warning("another attempt is ahead and deleted %s while it was being written", directory)
        self._delete_older(step, keep)

    def latest(self, at_most: int | None = None) -> Checkpoint | None:
        """The newest checkpoint, of no later step than `at_most`, that is committed and whole; None if there is none."""
        for step, committed in sorted(self._steps().items(), reverse=True):
            if at_most is not None and step > at_most:
                continue
            if not committed:
                logger.warning("passing over the checkpoint %s: it was never finished", self._directory(step))
            elif checkpoint := self._load(step):
                return checkpoint
        return None

    def delete_after(self, step: int) -> None:
        """Delete the checkpoints of later steps: the training has gone back and takes another way."""
        for later in self._steps():
            if later > step:
                self.storage.delete_tree(self._directory(later))

    def clear(self) -> None:
        """Delete every checkpoint."""
        self.storage.delete_tree(self.prefix)

    def _directory(self, step: int) -> str:
        return join(self.prefix, f"step-{step:08d}")

    def _steps(self) -> dict[int, bool]:
        """Whether each step's checkpoint has its commit marker."""
        steps: dict[int, bool] = {}
        for path in self.storage.list(self.prefix):
            if match := re.fullmatch(r"step-(\d{8,})/(.+)", path):
                steps[int(match[1])] = steps.get(int(match[1]), False) or match[2] == _STATE
        return steps

    def _load(self, step: int) -> Checkpoint | None:
        directory = self._directory(step)
        try:
            marker = json.loads(self._read(join(directory, _STATE)))
            size, sha256, state = int(marker["size"]), str(marker["sha256"]), marker["state"]
        except (ValueError, KeyError, TypeError):
            logger.warning("passing over the checkpoint %s: its %s is damaged", directory, _STATE)
            return None
        data = self._read(join(directory, _TENSORS))
        if len(data) != size or hashlib.sha256(data).hexdigest() != sha256:
            logger.warning("passing over the checkpoint %s: its %s is not what was written", directory, _TENSORS)
            return None
        return Checkpoint(step, safetensors.torch.load(data), state)

    def _read(self, path: str) -> bytes:
        """The file, or nothing if it is not there; another attempt may delete it at any moment."""
        try:
            return self.storage.read_bytes(path)
        except StorageError:
            if self.storage.exists(path):
                raise
            return b""

    def _delete_older(self, newest: int, keep: Collection[int]) -> None:
        """Keep the newest committed ones up to `newest`, and whatever another attempt has beyond it."""
        steps = self._steps()
        kept = sorted((step for step, committed in steps.items() if committed and step <= newest), reverse=True)[:KEPT]
        for step in steps.keys() - {*kept, *keep}:
            if step < newest:
                self.storage.delete_tree(self._directory(step))


def host_copy(tensor: Tensor) -> Tensor:
    """A dense copy in host memory: later steps do not change it, and safetensors refuses other layouts and shared memory."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
