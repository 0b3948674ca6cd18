"""What modules add to the loss: taken once, summed, and part of the step's gradient."""

from pathlib import Path

import pytest
import torch
from labelled_examples import make_examples
from torch import Tensor, nn

from hardmoe.errors import PreemptedError
from hardmoe.models.backbones import Backbone, TagClassifier, build_backbone
from hardmoe.models.moe.config import MoeConfig
from hardmoe.models.moe.constraints.relative import RelativeImportance
from hardmoe.models.moe.experts.modules import ModuleExperts
from hardmoe.models.moe.layer import MoeLayer, Plan, moe_layers
from hardmoe.models.moe.routers.sparse_gate import SparseGateRouter
from hardmoe.models.moe.scores.pooled import PooledScores
from hardmoe.storage.local import LocalStorage
from hardmoe.training.auxiliary import take_auxiliary_loss
from hardmoe.training.checkpoint import Checkpoints
from hardmoe.training.config import TrainingConfig
from hardmoe.training.loop import TrainingSinks, train


class Told(nn.Module):
    """Leaves its parameter."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(value))
        self.auxiliary_loss: Tensor | None = self.weight * 2


def test_what_modules_left_is_summed_and_taken_away() -> None:
    network = nn.Sequential(Told(1.5), nn.ReLU(), nn.Sequential(Told(0.25)))
    total = take_auxiliary_loss(network)
    assert total is not None and float(total.detach()) == 3.5
    assert take_auxiliary_loss(network) is None


SGD = TrainingConfig(
    epochs=2, batch_size=8, learning_rate=0.5, nesterov=False, momentum=0.0, weight_decay=0.0, checkpoint_every_steps=2
)


def _transformer(weight: float) -> TagClassifier:
    moe = MoeConfig(num_experts=4, placement="last1", loss_weight=weight, noise=0.0, constraint="importance")
    return TagClassifier(build_backbone("vmoe_xs8", image_size=8, seed=1, moe=moe), 5, seed=2)


def test_step_minimises_the_sum_and_tells_it() -> None:
    """One step of plain descent moves the router by what the weight of its loss says, and the log has the sum."""
    examples = make_examples(8, seed=0)
    one_step = SGD.model_copy(update={"epochs": 1, "warmup_fraction": 0.0})
    routers, losses = [], []
    for weight in (0.0, 1.0, 2.0):
        model = _transformer(weight)
        result = train(model, examples, one_step, seed=0, devices=[torch.device("cpu")])
        ((_, layer),) = moe_layers(model)
        routers.append(layer.router.scores.weight_ED.detach())
        losses.append(result.final_loss)
        assert layer.auxiliary_loss is None
    assert torch.allclose(routers[2] - routers[0], 2 * (routers[1] - routers[0]), atol=1e-6)
    assert float((routers[1] - routers[0]).abs().max()) > 1e-5
    assert losses[0] < losses[1]
    assert losses[2] - losses[0] == pytest.approx(2 * (losses[1] - losses[0]), rel=1e-4)


def _constrained() -> TagClassifier:
    """A convolution, experts that are convolutions behind a hard constraint, and a mean over the pixels."""
    torch.manual_seed(3)
    router = SparseGateRouter(PooledScores(4, 3), 3, constraint=RelativeImportance(3, 0.1))
    experts = ModuleExperts(lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)), 3)
    layer = MoeLayer(router, experts, Plan(k=1, group_images=2**31), item_dims=3)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), layer, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return TagClassifier(Backbone(network, 6), 5, seed=2)


def test_training_with_a_hard_constraint_that_is_killed_ends_with_the_bits_of_one_that_is_not(tmp_path: Path) -> None:
    examples, device = make_examples(40, seed=0), torch.device("cpu")
    whole = _constrained()
    train(whole, examples, SGD, seed=0, devices=[device])
    steps, resumed = iter(range(1000)), _constrained()

    def asked() -> str | None:
        return "asked" if next(steps) == 4 else None

    checkpoints = Checkpoints(LocalStorage(tmp_path), "checkpoints")
    with pytest.raises(PreemptedError):
        train(resumed, examples, SGD, seed=0, devices=[device], sinks=TrainingSinks(checkpoints, asked_to_stop=asked))
    resumed = _constrained()
    train(resumed, examples, SGD, seed=0, devices=[device], sinks=TrainingSinks(checkpoints))
    ends = whole.state_dict()
    assert bool(ends["backbone.network.1.router.constraint.relative_E"].any())
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(tensor, ends[name]), name
