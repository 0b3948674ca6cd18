"""AdamW (Loshchilov and Hutter 2019) for the decoder: one fused pass over all parameters, or only the rows that were computed.

Under `classes: sampled` a step touches a part of the decoder's rows. The others are left as they are, moments included, and are
taken up with the step's own bias correction when they are next touched (as torch's `SparseAdam` does): a step then costs what was
computed and not the vocabulary. All weights and moments are float32, whatever the products are computed in. Rejected:
`torch.optim.AdamW` around the same kernel, which has no rows, whose state dict would have to be translated for checkpoints, and
whose first step imports torch's compiler, 3 s; unfused, an update of 10 million weights takes 75 ms instead of 12.

Shape letters: V tags, Z unified dims, T chosen tags.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hardmoe.models.shared_decoder import SharedDecoder

_DECAYED = "decoder.weight"


@dataclass(frozen=True)
class DecoderRows:
    """Copies of some of the decoder's rows, with gradients after a backward pass."""

    tags_T: Tensor
    """int64, ascending."""
    weight_TZ: Tensor
    bias_T: Tensor

    @classmethod
    def of(cls, model: SharedDecoder, tags_T: Tensor) -> "DecoderRows":
        """Copy these rows."""
        weight_TZ, bias_T = model.decoder.weight.detach()[tags_T], model.decoder.bias.detach()[tags_T]
        return cls(tags_T, weight_TZ.requires_grad_(), bias_T.requires_grad_())

    def by_name(self) -> dict[str, Tensor]:
        """Under the names of the parameters that they are rows of."""
        return {"decoder.weight": self.weight_TZ, "decoder.bias": self.bias_T}


class DecoderOptimizer:
    """Moments of one model's parameters.

    Args:
        model: to be moved.
        weight_decay: of the decoder's weight alone.
    """

    def __init__(self, model: SharedDecoder, weight_decay: float) -> None:
        self._parameters = dict(model.named_parameters())
        self._weight_decay = weight_decay
        self.means = {name: torch.zeros_like(value) for name, value in self._parameters.items()}
        self.squares = {name: torch.zeros_like(value) for name, value in self._parameters.items()}

    @torch.no_grad()
    def step(self, number: int, learning_rate: float, rows: DecoderRows | None = None) -> None:
        """Move what has a gradient, and take the gradients away.

        Args:
            number: of the step, 1 for the first.
            learning_rate: of the step.
            rows: what stands for the decoder's parameters in this step; None for all of them.
        """
        replaced = rows.by_name() if rows else {}
        for name, parameter in self._parameters.items():
            if name not in replaced and parameter.grad is not None:
                self._move(name, parameter, parameter.grad, self.means[name], self.squares[name], number, learning_rate)
                parameter.grad = None
        for name, values in replaced.items():
            assert rows is not None and values.grad is not None
            means, squares = self.means[name][rows.tags_T], self.squares[name][rows.tags_T]
            moved = values.detach()
            self._move(name, moved, values.grad, means, squares, number, learning_rate)
            for whole, part in ((self._parameters[name], moved), (self.means[name], means), (self.squares[name], squares)):
                whole.index_copy_(0, rows.tags_T, part)

    def tensors(self) -> dict[str, Tensor]:
        """The moments by name, for a checkpoint."""
        means = {f"mean.{name}": value for name, value in self.means.items()}
        return means | {f"square.{name}": value for name, value in self.squares.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take them up again."""
        for name in self._parameters:
            self.means[name].copy_(tensors[f"mean.{name}"])
            self.squares[name].copy_(tensors[f"square.{name}"])

    def _move(
        self, name: str, value: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, number: int, learning_rate: float
    ) -> None:
        torch._fused_adamw_(
            [value],
            [gradient],
            [mean],
            [square],
            [],
            [torch.tensor(float(number), device=value.device)],
            lr=learning_rate,
            beta1=0.9,
            beta2=0.999,
            weight_decay=self._weight_decay if name == _DECAYED else 0.0,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )
