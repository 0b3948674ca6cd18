"""Weights from files: hardmoe's own and others', and what does not fit."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor

from hardmoe.errors import DataError, RecipeError
from hardmoe.models.backbones import TagClassifier, build_backbone, normalise_images
from hardmoe.training.pretrained import fitting_weights, read_weights, translated_decoder


def make_model(name: str = "quicknet_w4", num_tags: int = 6, seed: int = 1, stem: str = "auto") -> TagClassifier:
    return TagClassifier(build_backbone(name, image_size=32, seed=seed, stem=stem), num_tags, seed=seed)


def loaded(model: TagClassifier, tensors: dict[str, Tensor]) -> TagClassifier:
    model.load_state_dict({**model.state_dict(), **tensors})
    return model.eval()


def test_file_of_the_same_network_is_taken_whole() -> None:
    start, model = make_model(seed=3), make_model()
    found = fitting_weights(model, start.state_dict(), "a.safetensors", "quicknet_w4")
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, start.state_dict()[name]) for name, tensor in found.items())


def test_decoder_of_another_vocabulary_is_left_and_the_backbone_taken() -> None:
    found = fitting_weights(make_model(), make_model(num_tags=9, seed=3).state_dict(), "a.safetensors", "quicknet_w4")
    assert not any(name.startswith("decoder.") for name in found)
    assert "backbone.network.stem.0.weight" in found


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_torchvisions_own_file_gives_torchvisions_own_features(name: str) -> None:
    """The oracle is torchvision's model with its head cut off; older files lack batch normalisation's counters."""
    torch.manual_seed(0)
    oracle = torchvision.models.get_model(name, weights=None).eval()
    tensors = {key: tensor for key, tensor in oracle.state_dict().items() if "num_batches_tracked" not in key}
    stem = "imagenet" if name == "resnet18" else "auto"
    model = make_model(name, stem=stem)
    model = loaded(model, fitting_weights(model, tensors, "a.safetensors", name))
    head = "fc" if name == "resnet18" else "classifier"
    last = oracle.fc if name == "resnet18" else oracle.classifier[-1]
    if head == "fc":
        oracle.fc = torch.nn.Identity()
    else:
        oracle.classifier[-1] = torch.nn.Identity()
    assert isinstance(last, torch.nn.Linear)
    images_B3SS = normalise_images(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
    with torch.inference_mode():
        torch.testing.assert_close(model(images_B3SS)[0], oracle(images_B3SS))


def test_file_of_another_network_is_refused_by_the_first_tensor_that_differs() -> None:
    with pytest.raises(RecipeError) as refused:
        fitting_weights(make_model(), make_model("quicknet_w6").state_dict(), "a.safetensors", "quicknet_w4")
    assert str(refused.value) == (
        "a.safetensors does not hold the weights of the backbone 'quicknet_w4': stem.0.weight has the shape [6, 3, 3, 3] and not "
        "[4, 3, 3, 3]; give a file of this network, or set experts.backbone (and experts.stem) to the file's"
    )
    with pytest.raises(RecipeError, match=r"conv1\.weight has the shape \[64, 3, 7, 7\] and not \[64, 3, 3, 3\]"):
        fitting_weights(make_model("resnet18"), torchvision.models.resnet18().state_dict(), "a.safetensors", "resnet18")


def test_file_without_one_of_the_backbones_tensors_is_refused() -> None:
    tensors = dict(make_model().state_dict())
    del tensors["backbone.network.blocks.1.conv2.weight"]
    with pytest.raises(RecipeError, match=r"blocks\.1\.conv2\.weight is missing"):
        fitting_weights(make_model(), tensors, "a.safetensors", "quicknet_w4")


def test_file_is_read_only_as_it_was_planned(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors.torch.save({"x": torch.ones(2)}))
    assert read_weights(str(path), "experts.init", None)["x"].tolist() == [1, 1]
    with pytest.raises(DataError, match="changed since the run was begun"):
        read_weights(str(path), "experts.init", "0" * 64)
    path.write_bytes(b"no tensors")
    with pytest.raises(RecipeError, match="is not a file of safetensors"):
        read_weights(str(path), "experts.init", None)
    with pytest.raises(DataError, match=r"nowhere\.safetensors cannot be read .*; correct experts\.init"):
        read_weights(str(tmp_path / "nowhere.safetensors"), "experts.init", None)


def test_decoder_is_translated_hashtag_by_hashtag() -> None:
    weights = {
        "decoder.weight": torch.arange(6.0).reshape(3, 2),
        "decoder.bias": torch.tensor([0.5, -2.0, 1.0]),
        "x": torch.ones(1),
    }
    fresh = torch.nn.Linear(2, 4)
    found = translated_decoder(weights, ["cat", "dog", "sun"], fresh, ["sun", "moon", "cat", "tree"])
    assert found["decoder.weight"][[0, 2]].tolist() == [[4, 5], [0, 1]]
    assert torch.equal(found["decoder.weight"][[1, 3]], fresh.weight[[1, 3]])
    assert found["decoder.bias"].tolist() == [1.0, -2.0, 0.5, -2.0], "new hashtags begin as the rarest"
    assert torch.equal(found["x"], weights["x"])
