"""The loss of a linear layer and its gradients in one function: what lies between three matrix products costs little.

Built from torch's own pieces (linear, log-softmax, dense targets, their product, its sum) a step writes eight arrays of [B, V];
here it writes one, `logits -> log p -> p - y` in place, and the labels stay sparse. `sharded` never holds more than [B, C] of it:
once forward for the normaliser, once more backward for the gradients, so four matrix products instead of three. Rejected: keeping
the logits in half precision instead of computing them again, which is no longer the same loss.

The gradient of `softmax` with respect to logit v is p_v - y_v, of `sigmoid` w_v (p_v - y_v), each over B.

Shape letters: B batch, Z unified dims, V tags (all, or those of a sample), C tags of one shard, L labels of the batch.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

SHARD_TAGS = 8192
"""C: 16 MB of logits at a batch of 512. Part of what `sharded` computes, as sums are rounded shard by shard."""


@dataclass(frozen=True)
class BatchLabels:
    """The labels of a batch, on the device."""

    rows_L: Tensor
    """int64, the row of the batch that each belongs to."""
    indices_L: Tensor
    """int64, its tag, ascending neither here nor within a row."""
    weights_L: Tensor
    """float32, its target; those of a row sum to 1 for `softmax`."""


@dataclass(frozen=True)
class LossForm:
    """Which loss, and how much of it at a time."""

    sigmoid: bool
    """The sum of binary cross-entropies; else cross-entropy."""
    shard: int | None
    """C, or None for all tags at once."""
    tag_weights_V: Tensor | None = None
    """float32 [V]: `sigmoid` only, a factor of each tag's term; None for 1."""


def linear_loss(points_BZ: Tensor, weight_VZ: Tensor, bias_V: Tensor, labels: BatchLabels, form: LossForm) -> Tensor:
    """Mean over the batch of the loss of `points @ weight.T + bias`, a float32 scalar with gradients for these three.

    Args:
        points_BZ: float32 [B, Z].
        weight_VZ: float32 [V, Z].
        bias_V: float32 [V].
        labels: the targets.
        form: the loss.
    """
    loss: Tensor = _LinearLoss.apply(points_BZ, weight_VZ, bias_V, labels, form)
    return loss


class _LinearLoss(torch.autograd.Function):
    """See the module."""

    @staticmethod
    def forward(ctx: Any, points_BZ: Tensor, weight_VZ: Tensor, bias_V: Tensor, labels: BatchLabels, form: LossForm) -> Tensor:
        """The loss; keeps p - y, or with shards what is needed to compute it again."""
        ctx.labels, ctx.form = labels, form
        if form.shard is not None and form.shard < len(weight_VZ):
            losses_B, normaliser_B = _sharded_losses(points_BZ, weight_VZ, bias_V, labels, form)
            ctx.errors_BV = None
            ctx.save_for_backward(points_BZ, weight_VZ, bias_V, normaliser_B)
            return losses_B.sum() / len(points_BZ)
        logits_BV = torch.addmm(bias_V, points_BZ, weight_VZ.T)
        if form.sigmoid:
            total = _sigmoid_sum(logits_BV, labels, form.tag_weights_V)
            errors_BV = logits_BV.sigmoid_()
        else:
            torch.log_softmax(logits_BV, dim=1, out=logits_BV)
            total = -(logits_BV[labels.rows_L, labels.indices_L] * labels.weights_L).sum()
            errors_BV = logits_BV.exp_()
        _subtract(errors_BV, labels.rows_L, labels.indices_L, labels.weights_L)
        ctx.errors_BV = errors_BV if form.tag_weights_V is None else errors_BV.mul_(form.tag_weights_V)
        ctx.save_for_backward(points_BZ, weight_VZ, bias_V, None)
        return total / len(points_BZ)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of points, weight and bias."""
        points_BZ, weight_VZ, bias_V, normaliser_B = ctx.saved_tensors
        factor = gradients[0] / len(points_BZ)
        # The factor goes to the points, which are few: (p - y) stays as it is.
        scaled_BZ = points_BZ * factor
        if ctx.errors_BV is not None:
            errors_BV = ctx.errors_BV
            return (errors_BV @ weight_VZ).mul_(factor), errors_BV.T @ scaled_BZ, errors_BV.sum(0).mul_(factor), None, None
        gradient_BZ, gradient_VZ = torch.zeros_like(points_BZ), torch.empty_like(weight_VZ)
        gradient_V = torch.empty_like(bias_V)
        for start in range(0, len(weight_VZ), ctx.form.shard):
            shard = slice(start, start + ctx.form.shard)
            errors_BC = _shard_errors(points_BZ, weight_VZ[shard], bias_V[shard], normaliser_B, start, ctx)
            gradient_BZ.addmm_(errors_BC, weight_VZ[shard])
            torch.mm(errors_BC.T, scaled_BZ, out=gradient_VZ[shard])
            torch.sum(errors_BC, 0, out=gradient_V[shard])
        return gradient_BZ.mul_(factor), gradient_VZ, gradient_V.mul_(factor), None, None


def _sharded_losses(
    points_BZ: Tensor, weight_VZ: Tensor, bias_V: Tensor, labels: BatchLabels, form: LossForm
) -> tuple[Tensor, Tensor]:
    """Every row's loss, and its log-normaliser (zeros for `sigmoid`)."""
    normalisers, sums_B = [], torch.zeros_like(points_BZ[:, 0])
    for start in range(0, len(weight_VZ), form.shard or len(weight_VZ)):
        shard = slice(start, start + (form.shard or len(weight_VZ)))
        logits_BC = torch.addmm(bias_V[shard], points_BZ, weight_VZ[shard].T)
        rows, columns, weights = _labels_in(labels, start, len(bias_V[shard]))
        factors = None if form.tag_weights_V is None else form.tag_weights_V[shard]
        positive = logits_BC[rows, columns] * weights
        sums_B.index_add_(0, rows, -positive if factors is None else -positive * factors[columns])
        if form.sigmoid:
            terms_BC = functional.softplus(logits_BC)
            sums_B += (terms_BC if factors is None else terms_BC.mul_(factors)).sum(1)
        else:
            normalisers.append(logits_BC.logsumexp(1))
    if form.sigmoid:
        return sums_B, torch.zeros_like(sums_B)
    normaliser_B = torch.stack(normalisers).logsumexp(0)
    return sums_B.addcmul_(_row_sums(labels, len(points_BZ)), normaliser_B), normaliser_B


def _shard_errors(points_BZ: Tensor, weight_CZ: Tensor, bias_C: Tensor, normaliser_B: Tensor, start: int, ctx: Any) -> Tensor:
    """p - y of one shard's tags, float32 [B, C], with their weights."""
    errors_BC = torch.addmm(bias_C, points_BZ, weight_CZ.T)
    errors_BC = errors_BC.sigmoid_() if ctx.form.sigmoid else errors_BC.sub_(normaliser_B[:, None]).exp_()
    _subtract(errors_BC, *_labels_in(ctx.labels, start, len(bias_C)))
    factors_V = ctx.form.tag_weights_V
    return errors_BC if factors_V is None else errors_BC.mul_(factors_V[start : start + len(bias_C)])


def _sigmoid_sum(logits_BV: Tensor, labels: BatchLabels, tag_weights_V: Tensor | None) -> Tensor:
    positives_L = logits_BV[labels.rows_L, labels.indices_L] * labels.weights_L
    terms_V = functional.softplus(logits_BV).sum(0)
    if tag_weights_V is None:
        return terms_V.sum() - positives_L.sum()
    return (terms_V * tag_weights_V).sum() - (positives_L * tag_weights_V[labels.indices_L]).sum()


def _labels_in(labels: BatchLabels, start: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The labels whose tag is one of a shard's: rows, columns of the shard, targets."""
    inside_L = (labels.indices_L >= start) & (labels.indices_L < start + count)
    return labels.rows_L[inside_L], labels.indices_L[inside_L] - start, labels.weights_L[inside_L]


def _subtract(errors_BC: Tensor, rows: Tensor, columns: Tensor, weights: Tensor) -> None:
    errors_BC.index_put_((rows, columns), -weights, accumulate=True)


def _row_sums(labels: BatchLabels, num_rows: int) -> Tensor:
    return torch.zeros(num_rows, device=labels.weights_L.device).index_add_(0, labels.rows_L, labels.weights_L)
