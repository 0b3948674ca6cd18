"""The shared decoder's forward pass and its start, against NumPy in float64."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from hardmoe.decoder.config import DecoderConfig
from hardmoe.errors import RecipeError
from hardmoe.models.alignment import AffineAlignment
from hardmoe.models.shared_decoder import DecoderForm, SharedDecoder

K, E, Z, V = 3, 4, 6, 5


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def random_decoder(seed: int = 0) -> SharedDecoder:
    generator = torch.Generator().manual_seed(seed)
    weight, bias, *maps = (torch.randn(shape, generator=generator) for shape in ((V, Z), (V,), (K, Z, E), (K, Z)))
    return SharedDecoder(weight, bias, AffineAlignment(*maps))


def random_batch(num_examples: int = 11, experts=None, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(num_examples, E, generator=generator)
    return embeddings, torch.tensor(experts) if experts else torch.randint(0, K, (num_examples,), generator=generator)


@pytest.mark.parametrize("experts", [None, [2] * 11, [2, 0, 2, 0, 0, 2, 2, 2, 0, 0, 0]])
def test_forward_equals_each_examples_own_affine_map(experts):
    decoder = random_decoder()
    embeddings, experts = random_batch(experts=experts)

    weights = {name: tensor.double().numpy() for name, tensor in decoder.state_dict().items()}
    for row, (h, e) in enumerate(zip(embeddings.double().numpy(), experts.tolist(), strict=True)):
        z = weights["alignment.weight"][e] @ h + weights["alignment.bias"][e]
        np.testing.assert_allclose(decoder.align(embeddings, experts)[row].detach(), z, rtol=1e-5, atol=1e-5)
        logits = weights["decoder.weight"] @ z + weights["decoder.bias"]
        np.testing.assert_allclose(decoder(embeddings, experts)[row].detach(), logits, rtol=1e-5, atol=1e-5)


def test_no_rows_and_half_precision_are_fine_and_an_unknown_expert_is_refused():
    decoder = random_decoder()
    embeddings, experts = random_batch()
    assert decoder(embeddings[:0], experts[:0]).shape == (0, V)
    assert decoder(embeddings.half(), experts).dtype == torch.float32
    with pytest.raises(ValueError, match="expert 3 has no alignment: there are 3 experts"):
        decoder(embeddings, experts + 1)


def test_gradients_pass_the_numerical_check():
    decoder = random_decoder().double()
    embeddings, experts = random_batch(num_examples=5, experts=[0, 2, 2, 0, 2])
    parameters = tuple(decoder.parameters())

    def logits(*values):
        named = dict(zip((name for name, _ in decoder.named_parameters()), values, strict=True))
        return torch.func.functional_call(decoder, named, (embeddings.double(), experts))

    assert torch.autograd.gradcheck(logits, parameters)
    decoder(embeddings, experts).sum().backward()
    assert (decoder.alignment.weight.grad[1] == 0).all()


def test_renumbering_experts_changes_no_prediction():
    decoder = random_decoder()
    embeddings, experts = random_batch()
    new_number = torch.tensor([2, 0, 1])
    renumbered = SharedDecoder.from_tensors(decoder.state_dict())
    for name in ("weight", "bias"):
        renumbered.state_dict()[f"alignment.{name}"][new_number] = decoder.state_dict()[f"alignment.{name}"].clone()

    torch.testing.assert_close(renumbered(embeddings, new_number[experts]), random_decoder()(embeddings, experts), rtol=0, atol=0)


NAMES = {"affine": "weight bias", "lowrank": "shared left right bias", "scale": "weight bias", "none": ""}


@pytest.mark.parametrize("temperature", [None, 0.1])
@pytest.mark.parametrize("align", NAMES)
def test_state_dict_has_the_files_names_and_builds_the_same_model(align, temperature):
    form = DecoderForm(align, rank=2, temperature=temperature)
    decoder = SharedDecoder.initial(K, E, torch.randn(V, E), torch.randn(V), 0, form)
    aligned = {f"alignment.{name}" for name in NAMES[align].split()}
    own = {"decoder.weight", "decoder.bias"} | ({"decoder.log_scale"} if temperature else set())
    assert set(decoder.state_dict()) == aligned | own
    assert decoder.num_experts == (None if align == "none" else K)

    again = SharedDecoder.from_tensors(decoder.state_dict())
    batch = random_batch()
    torch.testing.assert_close(again(*batch), decoder(*batch), rtol=0, atol=0)


@pytest.mark.parametrize("align", ["affine", "lowrank"])
@pytest.mark.parametrize("dim", [None, E, E + 3, 2 * E, 2 * E + 1, 4 * E])
def test_start_has_the_trunks_logits_for_every_expert(dim, align):
    start_weight, start_bias = torch.randn(V, E), torch.randn(V)
    decoder = SharedDecoder.initial(K, E, start_weight, start_bias, 0, DecoderForm(align, dim, rank=2))
    embeddings, experts = random_batch()

    assert decoder.dim == (dim or E)
    torch.testing.assert_close(decoder(embeddings, experts), embeddings @ start_weight.T + start_bias)
    decoder(embeddings, experts).logsumexp(1).sum().backward()
    assert (decoder.decoder.weight.grad.norm(dim=0) > 0).all(), "a further dimension without a gradient never wakes"
    if align == "lowrank":
        assert (decoder.alignment.left.grad.norm(dim=1) > 0).all(), "nor does a correction"


def test_cosine_start_has_the_directions_of_the_trunks_decoder_and_the_temperature():
    start_weight, start_bias = torch.randn(V, E), torch.randn(V)
    embeddings, experts = random_batch()
    decoder = SharedDecoder.initial(K, E, start_weight, start_bias, 0, DecoderForm("scale", temperature=0.25))
    cosines = torch.cosine_similarity(embeddings[:, None], start_weight[None], dim=2)
    torch.testing.assert_close(decoder(embeddings, experts), cosines / 0.25 + start_bias)

    decoder = SharedDecoder.initial(K, E, torch.randn(V, 9), start_bias, 0, DecoderForm(temperature=0.25))
    decoder(embeddings, experts).logsumexp(1).sum().backward()
    assert decoder.decoder.weight.grad.norm(dim=1).max() < 1e3, "rows of length zero would have gradients without a bound"


def test_a_rank_that_is_no_lower_is_refused_with_the_remedy():
    with pytest.raises(RecipeError, match=r"decoder\.rank 4 is no less .* from 4 to 6 dimensions; set it to at most 3, or"):
        SharedDecoder.initial(K, E, torch.ones(V, E), torch.zeros(V), 0, DecoderForm("lowrank", dim=Z, rank=4))


def test_narrow_start_is_the_best_low_rank_approximation():
    start_weight = torch.randn(V, E)
    decoder = SharedDecoder.initial(K, E, start_weight, torch.zeros(V), 0, DecoderForm(dim=2))
    u, s, vt = np.linalg.svd(start_weight.double().numpy(), full_matrices=False)
    product = (decoder.decoder.weight @ decoder.alignment.weight[1]).detach()
    np.testing.assert_allclose(product, (u[:, :2] * s[:2]) @ vt[:2], atol=1e-5)


def test_start_from_a_trunk_of_another_width_keeps_only_its_bias():
    start_bias = torch.randn(V)
    decoder = SharedDecoder.initial(K, E, torch.randn(V, 9), start_bias, 0, DecoderForm(dim=None))
    embeddings, experts = random_batch()
    torch.testing.assert_close(decoder(embeddings, experts), start_bias.expand(11, V))


def test_start_is_a_function_of_the_seed_and_leaves_global_randomness_alone():
    state = torch.random.get_rng_state()
    start = [SharedDecoder.initial(K, E, torch.ones(V, E), torch.zeros(V), seed, DecoderForm(dim=Z)) for seed in (0, 0, 1)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(start[0].alignment.weight, start[1].alignment.weight)
    assert not torch.equal(start[0].alignment.weight, start[2].alignment.weight)
    assert torch.equal(start[0].alignment.weight[0], start[0].alignment.weight[K - 1])


def test_more_than_four_times_the_width_is_refused_with_the_remedy():
    with pytest.raises(RecipeError, match=r"decoder\.dim 17 .* width 4.* at most 16"):
        SharedDecoder.initial(K, E, torch.ones(V, E), torch.zeros(V), 0, DecoderForm(dim=17))


def test_a_width_without_alignment_is_refused_in_the_recipe():
    with pytest.raises(ValidationError, match="needs align: affine"):
        DecoderConfig(align="none", dim=8)
    with pytest.raises(ValidationError, match="dim: 8 needs align: affine or lowrank; with scale the width"):
        DecoderConfig(align="scale", dim=8)
    with pytest.raises(ValidationError, match="rank: 3 is read by align: lowrank only"):
        DecoderConfig(rank=3)
    with pytest.raises(ValidationError, match="sampled_tags: 3 is read by classes: sampled only"):
        DecoderConfig(sampled_tags=3)
    assert DecoderConfig.operational_fields() == {"checkpoint_every_steps", "memory_gib", "num_threads"}
