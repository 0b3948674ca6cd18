"""One step of a training: a batch in, a moved network out; a function of the batch, the step's number and the state.

A batch is augmented and mixed whole and goes through the network in `accumulate` pieces, whose losses count by their rows: so the
pieces change nothing but what batch normalisation and dropout see. Rejected: augmenting each piece, whose mixing partners
would then depend on the number of pieces.

Shape letters: B batch, S side in pixels, V tags.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn, optim

from hardmoe.data.loader import TrainingBatch
from hardmoe.hashing import derive_seed
from hardmoe.models.backbones import TagClassifier
from hardmoe.models.single_values import running_statistics_for_single_values
from hardmoe.training.augment import augment_images, draw_mix
from hardmoe.training.auxiliary import take_auxiliary_loss
from hardmoe.training.average import WeightAverage
from hardmoe.training.config import TrainingConfig
from hardmoe.training.determinism import seeded_step
from hardmoe.training.distillation import Asked, Teacher
from hardmoe.training.inference import move_images, normalised
from hardmoe.training.losses import TagLoss
from hardmoe.training.optim import set_learning_rate
from hardmoe.training.team import Seat, Team, sum_losses


@dataclass(frozen=True)
class Gradients:
    """What the gradients of one training's batches have in common, in whatever process they are computed."""

    model: TagClassifier
    """On the device, in training mode."""
    loss: TagLoss
    config: TrainingConfig
    seed: int
    device: torch.device
    teacher: Teacher | None = None
    """On the device."""

    def add(self, batch: TrainingBatch, step: int, seat: Seat | None = None) -> Tensor:
        """Add the gradient of a batch to the network's; returns its loss, float32 on the device, which nothing has waited for.

        Args:
            batch: the whole batch.
            step: decides what is random.
            seat: of a process that computes a share of the gradient, and of the loss; None for all of it.
        """
        inputs = self._inputs(batch, step)
        num_rows = len(batch.images_B3SS)
        if seat is not None:
            inputs = [seat.share_of(rows) for rows in inputs]
        total = torch.zeros((), device=self.device)
        with seeded_step(derive_seed(self.seed, "step", step), self.device):
            num_pieces = min(self.config.accumulate, len(inputs[0]))
            pieces = zip(*(rows.tensor_split(num_pieces) for rows in inputs), strict=True)
            for images, targets, keys in pieces:
                alone = len(images) == 1 and seat is None
                with running_statistics_for_single_values(self.model) if alone else nullcontext():
                    total += self._backward(images, targets, keys, len(images) / num_rows)
        return total

    def _inputs(self, batch: TrainingBatch, step: int) -> list[Tensor]:
        """The images, normalised and channels last, their targets, augmented and mixed, and what the teacher knows them by."""
        targets_BV = self.loss.targets(batch, step, self.model.decoder.out_features, self.device)
        images_B3SS = augment_images(move_images(batch.images_B3SS, self.device), self.config.augment, self.seed, step)
        normalised_B3SS = normalised(images_B3SS)
        ids_B16 = batch.ids_B16
        keys_B = torch.zeros(len(ids_B16), dtype=torch.int64) if self.teacher is None else self.teacher.keys(ids_B16)
        mix = draw_mix(self.config.augment, images_B3SS.shape[-1], self.seed, step)
        if mix is None:
            return [normalised_B3SS, targets_BV, keys_B]
        return [mix.images(normalised_B3SS), mix.targets(targets_BV), mix.larger(keys_B)]

    def _backward(self, images_B3SS: Tensor, targets_BV: Tensor, keys_B: Tensor, share: float) -> Tensor:
        """Add a piece's gradient; returns its share of the loss."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            features_BD, logits_BV = self.model(images_B3SS)
            loss = self.loss(logits_BV, targets_BV)
            if self.teacher is not None:
                asked = Asked(self.model, images_B3SS, keys_B, features_BD, logits_BV)
                loss = self.teacher.blended(loss, asked, self.loss.name)
        if (auxiliary := take_auxiliary_loss(self.model)) is not None:
            loss = loss + auxiliary
        loss = loss * share
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


@dataclass(frozen=True)
class Stepper:
    """What the steps of one training have in common."""

    gradients: Gradients
    optimizer: optim.Optimizer
    average: WeightAverage | None
    team: Team | None = None
    """Whoever computes the gradients together with this process."""

    def take(self, batch: TrainingBatch, step: int, learning_rate: float) -> Tensor:
        """Move the network; returns the loss, float32 on the device, which nothing has waited for."""
        model, max_grad_norm = self.gradients.model, self.gradients.config.max_grad_norm
        set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.zero_grad()
        if self.team is not None and self.team.is_needed_for(len(batch.images_B3SS)):
            with self.team.step(step, model) as seat:
                share = self.gradients.add(batch, step, seat)
            total = sum_losses(share)
        else:
            total = self.gradients.add(batch, step)
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(step)
        return total
