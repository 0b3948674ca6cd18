"""The exponential moving average of a training's weights (Polyak and Juditsky 1992; the form of Tarvainen and Valpola 2017).

In float32, of parameters and of batch normalisation's statistics alike; counters are those of the live network. The decay rises
with the steps, as TensorFlow's moving average has it, so that twenty steps do not end near the initial weights. Rejected: torch's
`AveragedModel`, a deep copy of the network, which users' networks may not allow, with a counter that would have to be saved.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


def decay_at(steps_before: int, decay: float) -> float:
    """The decay of the update after a step."""
    return min(decay, (1 + steps_before) / (10 + steps_before))


class WeightAverage:
    """The average of one network's weights, on its device; before the first update it is the network."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model = model
        self._decay = decay
        self.tensors = {name: tensor.float().clone() for name, tensor in self._live().items()}

    def update(self, step: int) -> None:
        """Take the network in as it is after this step, 0 for the first."""
        average = get_ema_multi_avg_fn(decay_at(step, self._decay))  # type: ignore[no-untyped-call]
        average(list(self.tensors.values()), [tensor.float() for tensor in self._live().values()], torch.tensor(step))

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go on from an earlier attempt's `tensors`."""
        for name, average in self.tensors.items():
            average.copy_(tensors[name])

    @torch.no_grad()
    def replace(self) -> None:
        """Make the network its average."""
        for name, tensor in self._live().items():
            tensor.copy_(self.tensors[name])

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let a block see the network as its average; afterwards it has its own bits again."""
        own = {name: tensor.clone() for name, tensor in self._live().items()}
        self.replace()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in self._live().items():
                    tensor.copy_(own[name])

    def _live(self) -> dict[str, Tensor]:
        # Asked for each time: a module may put another tensor in a buffer's place.
        return {name: tensor for name, tensor in self._model.state_dict().items() if tensor.is_floating_point()}
