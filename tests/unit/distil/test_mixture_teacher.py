"""The loss of the distilled network against NumPy in float64, its gradients by hand, and whose answer is asked for.

Shape letters: B batch, N examples, K experts, E features of an expert, D features of the network, Z unified dims, V tags.
"""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from hardmoe.distil.config import StudentConfig
from hardmoe.distil.teacher import Known, MixtureTeacher
from hardmoe.errors import DataError
from hardmoe.models.alignment import AffineAlignment
from hardmoe.models.backbones import Backbone, TagClassifier
from hardmoe.models.shared_decoder import SharedDecoder
from hardmoe.training.augment import Mix
from hardmoe.training.distillation import PROJECTION, Asked, drop_projection

B, N, K, E, D, Z, V = 6, 20, 3, 5, 4, 7, 8
Floats = NDArray[np.float64]


def make_teacher(**student: Any) -> MixtureTeacher:
    chance = np.random.default_rng(0)
    ids = chance.integers(0, 256, (N, 16), dtype=np.uint8)
    known = Known(ids[np.lexsort(ids.T[::-1])], chance.integers(0, K, N), chance.normal(size=(N, E)).astype(np.float16))

    def draw(*shape: int) -> torch.Tensor:
        return torch.from_numpy(chance.normal(size=shape).astype(np.float32))

    decoder = SharedDecoder(draw(V, Z), draw(V), AffineAlignment(draw(K, Z, E), draw(K, Z))).requires_grad_(False)
    return MixtureTeacher(StudentConfig(**student), known, decoder, [], 0).on(torch.device("cpu"))


def make_asked(teacher: MixtureTeacher) -> Asked:
    torch.manual_seed(1)
    model = TagClassifier(Backbone(nn.Identity(), D), V, seed=0)
    teacher.prepare(model, seed=3)
    features_BD, logits_BV = torch.randn(B, D, requires_grad=True), torch.randn(B, V, requires_grad=True)
    keys_B = teacher.keys(teacher.known.ids_N16[[3, 17, 4, 4, 0, 11]])
    return Asked(model, torch.zeros(B, 3, 8, 8), keys_B, features_BD, logits_BV)


def softmax(logits_BV: Floats) -> Floats:
    scaled = np.exp(logits_BV - logits_BV.max(axis=1, keepdims=True))
    return np.asarray(scaled / scaled.sum(axis=1, keepdims=True))


def said_by_hand(teacher: MixtureTeacher, keys_B: torch.Tensor) -> tuple[Floats, Floats]:
    """Unified embeddings [B, Z] and logits [B, V] in float64, one example after another."""
    weights = {name: tensor.double().numpy() for name, tensor in teacher.decoder.state_dict().items()}
    assert teacher.known.embeddings_NE is not None
    unified = []
    for key in keys_B.tolist():
        expert, hidden_E = teacher.known.experts_N[key], teacher.known.embeddings_NE[key].astype(np.float64)
        unified.append(weights["alignment.weight"][expert] @ hidden_E + weights["alignment.bias"][expert])
    unified_BZ = np.array(unified)
    return unified_BZ, unified_BZ @ weights["decoder.weight"].T + weights["decoder.bias"]


@pytest.mark.parametrize(
    ("weight", "temperature", "embedding_weight"), [(0.3, 2.0, 0.7), (1.0, 1.0, 0.0), (0.0, 1.0, 1.5), (0.5, 8.0, 1.0)]
)
def test_loss_and_gradients_are_those_of_the_formula_in_float64(
    weight: float, temperature: float, embedding_weight: float
) -> None:
    teacher = make_teacher(weight=weight, temperature=temperature, embedding_weight=embedding_weight)
    asked, hashtags = make_asked(teacher), 2.5
    found = teacher.blended(torch.tensor(hashtags), asked, "softmax")
    found.backward()  # type: ignore[no-untyped-call]
    unified_BZ, teacher_BV = said_by_hand(teacher, asked.keys_B)
    p_BV = softmax(teacher_BV / temperature)
    q_BV = softmax(asked.logits_BV.detach().double().numpy() / temperature)
    divergence = (p_BV * np.log(p_BV / q_BV)).sum(axis=1).mean()
    expected = (1 - weight) * hashtags + weight * temperature**2 * divergence
    assert asked.logits_BV.grad is not None
    np.testing.assert_allclose(asked.logits_BV.grad, weight * temperature * (q_BV - p_BV) / B, rtol=1e-4, atol=1e-6)
    if embedding_weight == 0:
        assert asked.features_BD.grad is None
        assert not hasattr(asked.model, PROJECTION)
    else:
        projection = asked.model.get_submodule(PROJECTION)
        assert isinstance(projection, nn.Linear)
        matrix_ZD, features_BD = projection.weight.detach().double().numpy(), asked.features_BD.detach().double().numpy()
        projected_BZ = features_BD @ matrix_ZD.T + projection.bias.detach().double().numpy()
        lengths_B1 = np.linalg.norm(projected_BZ, axis=1, keepdims=True)
        first_BZ, second_BZ = projected_BZ / lengths_B1, unified_BZ / np.linalg.norm(unified_BZ, axis=1, keepdims=True)
        cosines_B1 = (first_BZ * second_BZ).sum(axis=1, keepdims=True)
        expected += embedding_weight * (1 - cosines_B1.mean())
        # d cos / d (P f) = (z' - cos f') / |P f|, of the directions f' and z'.
        toward_BZ = (second_BZ - cosines_B1 * first_BZ) / lengths_B1
        assert asked.features_BD.grad is not None
        np.testing.assert_allclose(asked.features_BD.grad, -embedding_weight / B * toward_BZ @ matrix_ZD, rtol=1e-4, atol=1e-6)
        assert projection.weight.grad is not None
        expected_ZD = -embedding_weight / B * toward_BZ.T @ features_BD
        np.testing.assert_allclose(projection.weight.grad, expected_ZD, rtol=1e-4, atol=1e-6)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)


def test_sigmoid_losses_compare_a_distribution_for_every_hashtag() -> None:
    teacher = make_teacher(weight=1.0, embedding_weight=0.0, temperature=3.0)
    asked = make_asked(teacher)
    _, teacher_BV = said_by_hand(teacher, asked.keys_B)
    p_BV, q_BV = (1 / (1 + np.exp(-x / 3)) for x in (teacher_BV, asked.logits_BV.detach().double().numpy()))
    each_BV = p_BV * np.log(p_BV / q_BV) + (1 - p_BV) * np.log((1 - p_BV) / (1 - q_BV))
    found = float(teacher.blended(torch.tensor(9.0), asked, "sigmoid").detach())
    assert found == pytest.approx(9 * each_BV.sum(axis=1).mean(), rel=1e-4)


def test_answers_do_not_depend_on_the_other_rows_of_the_batch() -> None:
    teacher = make_teacher()
    asked = make_asked(teacher)
    together = teacher.answers(asked.images_B3SS, asked.keys_B)
    for row in range(B):
        alone = teacher.answers(asked.images_B3SS[row : row + 1], asked.keys_B[row : row + 1])
        for whole, one in zip(together, alone, strict=True):
            torch.testing.assert_close(whole[row : row + 1], one)


def test_example_that_the_mixture_never_saw_is_named() -> None:
    teacher = make_teacher()
    strange = np.full((1, 16), 255, np.uint8)
    with pytest.raises(DataError, match="no embedding of the training example " + "ff" * 16):
        teacher.keys(np.concatenate([teacher.known.ids_N16[:2], strange]))


def test_projection_is_drawn_from_the_seed_and_leaves_with_the_teacher() -> None:
    models = [TagClassifier(Backbone(nn.Identity(), D), V, seed=0) for _ in range(3)]
    own = models[0].state_dict().keys()
    for model, seed in zip(models, (1, 1, 2), strict=True):
        make_teacher().prepare(model, seed)
    weights = [model.state_dict()["projection.weight"] for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    drop_projection(models[0])
    assert models[0].state_dict().keys() == own
    drop_projection(models[0])  # of a network that has none, nothing is taken


def test_of_two_mixed_images_the_one_with_the_larger_share_decides() -> None:
    values_B = torch.arange(4)
    assert Mix(0.7).larger(values_B).tolist() == [0, 1, 2, 3]
    assert Mix(0.3).larger(values_B).tolist() == [3, 0, 1, 2]
    # As `images` and `targets` take the other from the image before.
    assert Mix(0.0).targets(values_B.float()[:, None]).flatten().tolist() == [3, 0, 1, 2]
