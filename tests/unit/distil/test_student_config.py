"""The recipe's `distil` section: what it refuses, and what it changes of the stages."""

from typing import Any

import pytest

from hardmoe.errors import RecipeError
from hardmoe.pipeline import ExternalInputs, build_stages
from hardmoe.recipe import parse_recipe
from hardmoe.stage import Stage

NETWORK = "distilled/network"


def stages_of(**sections: Any) -> dict[str, Stage]:
    return {stage.name: stage for stage in build_stages(parse_recipe(sections, "test"), ExternalInputs(""))}


def test_only_evaluation_and_report_know_of_a_distilled_network() -> None:
    plain, taught = stages_of(), stages_of(distil={})
    assert taught.keys() - plain.keys() == {NETWORK, "distilled/embeddings", "distilled/decoder"}
    assert {name for name, stage in plain.items() if stage != taught[name]} == {"evaluation", "report"}
    assert stages_of(distil=None) == plain
    assert "distil" not in plain["report"].config["recipe"]


def test_stages_come_after_their_inputs() -> None:
    for more in ({}, {"experts": {"augment": {"flip": True}}}, {"partition": {"overlap": 1.1}}, {"decoder": {"rounds": 1}}):
        seen: set[str] = set()
        for name, stage in stages_of(distil={}, **more).items():
            assert set(stage.inputs.values()) <= seen, name
            seen.add(name)


def test_from_the_trunk_it_is_trained_as_the_dense_baseline_is() -> None:
    experts = {"epochs": 7, "learning_rate": 0.03, "loss": "one_tag", "num_threads": 3, "gpus": 2}
    stages = stages_of(distil={}, experts=experts, partition={"overlap": 1.1})
    network, dense = stages[NETWORK], stages["baselines/dense"]
    control = dense.config["experts"]
    assert {key: control[key] for key in network.config["training"]} == network.config["training"]
    assert network.config["training"]["epochs"] == 7
    assert network.resources == dense.resources
    assert network.inputs["extra_copies"] == dense.inputs["extra_copies"] == "partition"
    assert stages["distilled/decoder"].config == stages["baselines/dense_refit"].config
    assert stages["distilled/decoder"].inputs["trunk"] == stages["baselines/dense_refit"].inputs["trunk"] == "trunk"


def test_from_fresh_weights_it_is_trained_as_a_rival_is() -> None:
    student = {"init": "random", "backbone": "quicknet_w17"}
    rivals = {"rivals": {"other": {"backbone": "quicknet_w17"}}}
    stages = stages_of(distil=student, evaluation=rivals, trunk={"epochs": 3, "augment": {"flip": True}}, experts={"epochs": 4})
    network, rival = stages[NETWORK], stages["rivals/other/network"]
    control = rival.config["trunk"]
    assert {key: control[key] for key in network.config["training"]} == network.config["training"]
    assert network.config["training"]["epochs"] == 7
    assert stages["distilled/decoder"].inputs["trunk"] == NETWORK
    assert stages_of(distil={**student, "epochs": 2})[NETWORK].config["training"]["epochs"] == 2


def test_experts_are_read_where_the_network_sees_augmented_images() -> None:
    def experts_of(**sections: Any) -> set[str]:
        return {name for name in stages_of(**sections)[NETWORK].inputs.values() if name.startswith("experts/")}

    assert experts_of(distil={}) == set()
    flipped, four = {"augment": {"flip": True}}, {"experts": 4}
    assert len(experts_of(distil={}, experts=flipped, partition=four)) == 4
    assert experts_of(distil={}, trunk=flipped) == set()
    assert len(experts_of(distil={"init": "random"}, trunk=flipped, partition=four)) == 4


def test_memory_for_experts_bears_no_identity() -> None:
    plain, narrow = (stages_of(distil=student)[NETWORK] for student in ({}, {"memory_gib": 2.0}))
    assert plain.config == narrow.config
    assert narrow.operational["student"] == {"memory_gib": 2.0}


@pytest.mark.parametrize(
    ("recipe", "remedy"),
    [
        ({"distil": {"weight": 0.0, "embedding_weight": 0.0}}, "set weight: 0.5, or take distil out"),
        ({"distil": {"weight": 0.0, "temperature": 2.0}}, "distil: temperature: 2 changes nothing without weight"),
        ({"distil": {"weight": 1.5}}, "distil.weight must be at most 1, not 1.5"),
        ({"distil": {"init": "fresh"}}, "distil.init must be 'trunk' or 'random', not 'fresh'"),
        ({"distil": {"stem": "small"}}, "stem: small describes distil.backbone, which is null"),
        (
            {"distil": {"backbone": "resnet50"}},
            "'resnet50' is not the trunk's 'resnet18'; set distil.init: random",
        ),
        ({"distil": {"temprature": 1.0}}, "unknown key 'distil.temprature'; did you mean 'distil.temperature'?"),
        ({"distil": 3}, "distil must be a section with keys of its own, not 3"),
        (
            {"distil": {}, "decoder": {"loss": "sigmoid"}},
            "set both to the same, or take distil out",
        ),
        (
            {"distil": {"init": "random"}, "decoder": {"loss": "sigmoid"}},
            "distil trains with trunk.loss 'softmax' on the outputs of a decoder fitted with decoder.loss 'sigmoid'",
        ),
        (
            {"distil": {}, "experts": {"loss": "sigmoid", "init": "random"}, "decoder": {"loss": "sigmoid"}},
            "set trunk.loss: sigmoid, or distil.init: random",
        ),
        ({"evaluation": {"rivals": {"distilled": {"backbone": "resnet18"}}}}, "'distilled' is the name of a system"),
    ],
)
def test_what_cannot_be_distilled_is_refused_with_the_remedy(recipe: dict[str, Any], remedy: str) -> None:
    with pytest.raises(RecipeError) as refused:
        parse_recipe(recipe, "recipe.yaml")
    assert remedy in str(refused.value)
    assert "\n" not in str(refused.value)
