"""Costs added up by hand, for a dense network, a mixture, and a mixture that shares its first stages with the gate."""

from hardmoe.evaluation.costs import Cost, SharedLayer, TrainedNetwork, total_cost, with_teacher
from hardmoe.models.flops import BackboneSize

IMAGES = 1_000
TRUNK = TrainedNetwork(BackboneSize(flops=100, parameters=50), decoder_parameters=10, images_seen=2_000)
TRUNK_STEP = 3 * (100 + 2 * 10)


def test_a_network_with_its_own_decoder_costs_itself_and_what_it_started_from() -> None:
    dense = TrainedNetwork(BackboneSize(100, 50), 10, 4_000)
    found = total_cost([dense], [TRUNK], None, None, 1, IMAGES)
    assert found == Cost(60, 60, 120, 6_000, (4_000 + 2_000) * TRUNK_STEP)


def test_a_mixture_costs_its_gate_all_its_experts_and_one_of_them_an_image() -> None:
    experts = [TrainedNetwork(BackboneSize(100, 50), 10, seen) for seen in (1_000, 3_000)]
    layer = SharedLayer(parameters=2 * 30 + 20, decoder_parameters=20, networks=2, images_seen=5_000)
    found = total_cost(experts, [TRUNK], TRUNK, layer, 1, IMAGES)
    decoding = 2 * (30 + 20)
    assert found.parameters == 50 + 2 * 50 + 80
    assert found.active_parameters == 50 + 50 + 50
    assert found.flops == 100 + 100 + decoding
    assert found.images_seen == 6_000
    passes = IMAGES * 100 + IMAGES * 100
    assert found.training_flops == 6_000 * TRUNK_STEP + passes + 3 * 5_000 * decoding
    two = total_cost(experts, [TRUNK], TRUNK, layer, 2, IMAGES)
    assert (two.active_parameters, two.flops) == (50 + 2 * 50 + 50, 100 + 2 * (100 + decoding))
    assert (two.parameters, two.training_flops) == (found.parameters, found.training_flops)


def test_stages_shared_with_the_gate_count_once() -> None:
    size = BackboneSize(flops=100, parameters=50, shared_flops=40, shared_parameters=15)
    experts = [TrainedNetwork(size, 10, 1_000) for _ in range(4)]
    found = total_cost(experts, [TRUNK], TRUNK, None, 1, IMAGES)
    assert found.parameters == 50 + 4 * (35 + 10)
    assert found.active_parameters == 50 + 35 + 10
    assert found.flops == 100 + 60 + 20
    assert found.training_flops == 4_000 * (3 * (60 + 20) + 40) + 2_000 * TRUNK_STEP + IMAGES * 100
    dense = total_cost(experts[:1], [TRUNK], None, None, 1, IMAGES)
    assert (dense.parameters, dense.active_parameters, dense.flops) == (60, 60, 120)


def test_experts_within_a_network_count_in_part() -> None:
    size = BackboneSize(100, 50, inactive_parameters=20, routed_flops=30, spared_flops=10)
    network = TrainedNetwork(size, 10, 1_000)
    found = total_cost([network], [], None, None, 1, IMAGES)
    assert (found.parameters, found.active_parameters) == (60, 40)
    assert (found.flops, found.routed_flops) == (120, 30)
    assert found.training_flops == 1_000 * 3 * (100 - 10 + 20)
    gated = total_cost([network, network], [], network, None, 2, IMAGES)
    assert (gated.parameters, gated.active_parameters) == (50 + 2 * 60, 30 + 2 * 30 + 10)
    assert gated.routed_flops == 3 * 30


def test_what_a_teacher_says_is_part_of_the_training_and_so_is_all_that_made_a_mixture() -> None:
    taught = TrainedNetwork(BackboneSize(100, 50), 10, 4_000, teacher_flops=4_000 * 220)
    own = total_cost([taught], [], None, None, 1, IMAGES)
    assert own.training_flops == 4_000 * (TRUNK_STEP + 220)
    mixture = Cost(500, 200, 250, 9_000, 7_000_000)
    found = with_teacher(own, mixture, taught.teacher_flops)
    assert found == Cost(60, 60, 120, 13_000, own.training_flops + 7_000_000, 0, 7_000_000 + 4_000 * 220)
    assert found.training_flops - found.teacher_flops == 4_000 * TRUNK_STEP
