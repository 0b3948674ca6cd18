"""The training of a detector: torchvision's losses plus whatever the network's modules ask for, by the one hook.

The order of canvases is a hash of their numbers and the epoch, noise in gates is seeded by the step, and checkpoints hold
weights, buffers and the optimiser's state: a training that was killed ends with the same bits. Rejected: the loop of
`hardmoe.training`, whose batches are squares with hashtags and whose validation ranks hashtags.

Shape letters: B canvases of a batch, N canvases.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn, optim

from hardmoe.config import Json
from hardmoe.detection.canvas_files import CanvasSet
from hardmoe.detection.config import FitConfig
from hardmoe.errors import HardmoeError, PreemptedError
from hardmoe.hashing import derive_seed, hash_ids, number_ids
from hardmoe.models.moe.networks.retinanet import Detector
from hardmoe.stage import UnitContext
from hardmoe.training.auxiliary import take_auxiliary_loss
from hardmoe.training.checkpoint import Checkpoints
from hardmoe.training.determinism import seeded_step
from hardmoe.training.optim import parameter_groups, set_learning_rate
from hardmoe.training.snapshot import restore_snapshot, take_snapshot

_RISE = 0.05
_LOG_EVERY = 10


@dataclass(frozen=True)
class Fit:
    """One training."""

    detector: Detector
    canvases: CanvasSet
    config: FitConfig
    seed: int
    device: torch.device

    @property
    def num_steps(self) -> int:
        """Of the whole training; the last batch of an epoch may be small."""
        return self.config.epochs * -(-len(self.canvases) // self.config.batch_size)

    def batches(self, start: int) -> Iterator[NDArray[np.int64]]:
        """Numbers of the canvases of every step from `start` on."""
        size, count = self.config.batch_size, len(self.canvases)
        per_epoch = -(-count // size)
        for step in range(start, self.num_steps):
            order_N = np.argsort(hash_ids(number_ids(count), self.seed, "order", step // per_epoch), kind="stable")
            yield order_N[step % per_epoch * size :][:size]

    def learning_rate(self, step: int) -> float:
        """A linear rise, then half a cosine down to 0."""
        rise = max(1, round(_RISE * self.num_steps))
        share = (
            (step + 1) / rise if step < rise else 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, self.num_steps - rise)))
        )
        return self.config.learning_rate * share

    def digest(self) -> str:
        """Names the training that a checkpoint belongs to."""
        found = hashlib.sha256(json.dumps([self.config.identity(), self.seed], sort_keys=True).encode())
        found.update(self.canvases.images_NSS3.data)
        for name, tensor in sorted(self.detector.state_dict().items()):
            found.update(name.encode())
            found.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()


def fit_detector(fit: Fit, context: UnitContext, checkpoints: Checkpoints) -> list[dict[str, float]]:
    """Train, from the latest checkpoint if there is one; returns rows of the losses.

    Raises:
        HardmoeError: a loss is no number.
        PreemptedError: the unit was asked to stop, and a checkpoint was made.
    """
    detector, digest = fit.detector.to(fit.device).train(), fit.digest()
    optimizer = optim.AdamW(parameter_groups(detector, fit.config.weight_decay), lr=0.0, fused=True)
    start, rows = 0, list[dict[str, float]]()
    if (found := checkpoints.latest()) is not None and found.state["training"] == digest:
        restore_snapshot(detector, optimizer, None, found.tensors)
        start, rows = found.step, found.state["rows"]
    for step, numbers in enumerate(fit.batches(start), start + 1):
        set_learning_rate(optimizer, fit.learning_rate(step - 1))
        losses = _step(fit, optimizer, numbers, step)
        if step % _LOG_EVERY == 0 or step == fit.num_steps:
            rows.append({"step": step, **losses})
        context.progress(step, fit.num_steps, loss=losses["loss"])
        reason = context.asked_to_stop() if step < fit.num_steps else None
        if reason is not None or step % fit.config.checkpoint_every_steps == 0:
            checkpoints.save(step, take_snapshot(detector, optimizer, None), {"training": digest, "rows": rows})
        if reason is not None:
            raise PreemptedError(f"{reason} at step {step} of {fit.num_steps}, where a checkpoint was made")
    return rows


def _step(fit: Fit, optimizer: optim.Optimizer, numbers: NDArray[np.int64], step: int) -> Mapping[str, float]:
    """One step; its losses."""
    optimizer.zero_grad(set_to_none=True)
    with seeded_step(derive_seed(fit.seed, "step", step), fit.device):
        parts: dict[str, Tensor] = fit.detector(
            images_of(fit.canvases, numbers, fit.device), targets_of(fit.canvases, numbers, fit.device)
        )
    auxiliary = take_auxiliary_loss(fit.detector)
    total = torch.stack([*parts.values(), *([] if auxiliary is None else [auxiliary])]).sum()
    if not bool(torch.isfinite(total.detach())):
        raise HardmoeError(
            f"the loss is {float(total.detach())} at step {step}; lower learning_rate (now {fit.config.learning_rate:g})"
        )
    total.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(fit.detector.parameters(), fit.config.max_grad_norm)
    optimizer.step()
    return {"loss": float(total.detach()), **{name: float(value.detach()) for name, value in parts.items()}}


def images_of(canvases: CanvasSet, numbers: NDArray[np.int64], device: torch.device) -> list[Tensor]:
    """Canvases as the detector takes them: float [3, S, S] in 0 to 1."""
    pixels_BSS3 = torch.from_numpy(canvases.images_NSS3[numbers]).to(device)
    return list(pixels_BSS3.permute(0, 3, 1, 2).float() / 255)


def targets_of(canvases: CanvasSet, numbers: NDArray[np.int64], device: torch.device) -> list[dict[str, Tensor]]:
    """Their objects, as torchvision has them."""
    rows = [canvases.objects(int(number)) for number in numbers]
    return [
        {
            "boxes": torch.from_numpy(canvases.boxes_M4[some]).to(device),
            "labels": torch.from_numpy(canvases.classes_M[some]).to(device),
        }
        for some in rows
    ]


def describe(detector: nn.Module, fit: Fit, rows: list[dict[str, float]]) -> Json:
    """What a record says of a training."""
    return {
        "steps": fit.num_steps,
        "canvases_seen": fit.config.epochs * len(fit.canvases),
        "parameters": sum(each.numel() for each in detector.parameters()),
        "trained_parameters": sum(each.numel() for each in detector.parameters() if each.requires_grad),
        "final_losses": {key: rows[-1][key] for key in ("loss", "classification", "bbox_regression")},
    }
