"""`hardmoe export`: the folder loads where hardmoe cannot be imported, and its graphs compute what the mixture computes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import torch
from PIL import Image
from support import invoke, refusal

from hardmoe.export.card import CARD_BEGINS
from hardmoe.mixture import Mixture

_STRANGER = """
import sys, json
sys.modules["hardmoe"] = None  # importing it is an ImportError from here on
sys.path.insert(0, sys.argv[1])
from modeling_hardmoe import Mixture
mixture = Mixture(sys.argv[1])
paths = sys.argv[2:]
print(json.dumps([mixture.predict(paths, k=4), mixture.embed(paths).tolist()]))
"""


def _turned() -> Image.Exif:
    """Metadata of a picture that was taken upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.fixture(scope="module")
def images(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("exported-images")
    data = [image for path in sorted((finished / "photos").iterdir()) for image in pq.read_table(path)["image"].to_pylist()]
    for number, image in enumerate(data[::12]):
        (folder / f"{number:03d}.png").write_bytes(image)
    noise = np.random.default_rng(0)
    deep = noise.integers(0, 2**16, (30, 20)).astype(np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    Image.fromarray(deep).save(folder / "deep.tif")
    Image.fromarray(noise.integers(0, 256, (20, 30, 4), dtype=np.uint8)).save(folder / "alpha.png")
    Image.fromarray(noise.integers(0, 256, (20, 30), dtype=np.uint8)).save(folder / "grey.gif")
    Image.fromarray(noise.integers(0, 256, (20, 30, 4), dtype=np.uint8), "CMYK").save(folder / "print.jpg")
    turned = Image.fromarray(noise.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    turned.save(folder / "turned.png", exif=_turned())
    return [str(path) for path in sorted(folder.iterdir())]


@pytest.fixture(scope="module")
def mixture(finished: Path) -> Mixture:
    return Mixture.load(str(finished / "runs" / "small"))


@pytest.fixture(scope="module")
def folder(exported: Path) -> Path:
    return exported


def by_a_stranger(folder: Path, images: list[str]) -> tuple[list, np.ndarray]:
    """What the folder's own loader says, in a process that cannot import hardmoe."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", _STRANGER, str(folder), *images]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    predictions, vectors = json.loads(result.stdout)
    return predictions, np.array(vectors)


def assert_same(mixture: Mixture, images: list[str], predictions: list, vectors: np.ndarray) -> None:
    np.testing.assert_allclose(vectors, mixture.embed(images), rtol=1e-4, atol=1e-5)
    for (expert, tags, probabilities), expected in zip(predictions, mixture.predict(images, k=4), strict=True):
        assert (expert, tags) == (expected.expert, expected.tags)
        np.testing.assert_allclose(probabilities, expected.probabilities, rtol=1e-4)


def test_folder_loads_without_hardmoe_and_says_what_the_mixture_says(folder: Path, images: list[str], mixture: Mixture) -> None:
    assert_same(mixture, images, *by_a_stranger(folder, images))
    told = subprocess.run(
        [sys.executable, str(folder / "modeling_hardmoe.py"), images[0]], capture_output=True, text=True, timeout=100, check=True
    )
    assert mixture.predict(images[:1])[0].tags[0] in told.stdout


def test_onnx_pieces_put_together_by_hand_are_the_mixture(folder: Path, images: list[str], mixture: Mixture) -> None:
    def run(name: str, **given: np.ndarray) -> list[np.ndarray]:
        session = onnxruntime.InferenceSession(folder / "onnx" / f"{name}.onnx", providers=["CPUExecutionProvider"])
        return session.run(None, given)

    pixels = np.ascontiguousarray(mixture.pixels(images))
    (experts,) = run("router", features=run("trunk", pixels=pixels)[0])
    assert experts.tolist() == mixture.route(images).tolist() and len(set(experts.tolist())) > 1
    vectors = np.concatenate([run(f"expert-{e:04d}", pixels=p[None])[0] for p, e in zip(pixels, experts, strict=True)])
    expected = mixture.embed(images)
    np.testing.assert_allclose(vectors, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    (probabilities,) = run("decoder", embedding=vectors)
    told = mixture.decode(torch.from_numpy(expected)).numpy()
    np.testing.assert_allclose(probabilities, told, rtol=1e-3, atol=1e-6)
    for one, other in zip(run("mixture", pixels=pixels), (experts, vectors, probabilities), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_programs_need_nothing_but_torch(folder: Path, images: list[str], mixture: Mixture) -> None:
    whole = torch.export.load(folder / "programs" / "mixture.pt2").module()
    for some in (images, images[:1]):
        _, vectors, _ = whole(torch.from_numpy(np.ascontiguousarray(mixture.pixels(some))))
        np.testing.assert_allclose(vectors.detach().numpy(), mixture.embed(some), rtol=1e-4, atol=1e-5)
    pixels = np.ascontiguousarray(mixture.pixels(images))
    for expert in range(3):
        program = torch.export.load(folder / "programs" / f"expert-{expert:04d}.pt2").module()
        expected = mixture.embed_seen(mixture.see(pixels), np.full(len(images), expert, np.int32))
        np.testing.assert_allclose(program(torch.from_numpy(pixels)).detach(), expected, rtol=1e-4, atol=1e-5)


def test_no_file_of_the_folder_tells_where_it_was_made(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert [path for path in files if b"site-packages" in path.read_bytes() or b"/torch/" in path.read_bytes()] == []


def test_card_tells_metrics_data_and_licences_of_the_run(folder: Path, finished: Path, mixture: Mixture) -> None:
    card = (folder / "README.md").read_text()
    metrics = json.loads((finished / "runs/small/evaluation/metrics.json").read_text())
    value = 100 * metrics["systems"]["mixture"]["precision@1"]["value"]
    assert f"| mixture | {value:.1f} [" in card and f"On {metrics['num_test_examples']} test examples" in card
    assert "unknown: 5" in card or "unknown: 4" in card, "the licences"
    assert card.startswith("---\n") and "pipeline_tag: image-classification" in card and mixture.tags[0] in card
    for path in folder.rglob("*"):
        if path.is_file() and path.name not in ("README.md", "config.json"):
            assert f"`{path.relative_to(folder)}`" in card


def test_finished_export_is_not_written_over(folder: Path, finished: Path) -> None:
    assert "holds an exported mixture already" in refusal(invoke(finished, "export", "--root", "runs/small", "-o", str(folder)))


def test_readme_of_something_else_is_not_written_over(finished: Path, tmp_path: Path) -> None:
    """`--out .` in a project of one's own once replaced that project's README."""
    (tmp_path / "README.md").write_text("# My pictures\n")
    sentence = refusal(invoke(finished, "export", "--root", "runs/small", "--out", str(tmp_path)))
    assert f"{tmp_path}/README.md is not of an export" in sentence and "another --out" in sentence
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    (tmp_path / "README.md").write_bytes(CARD_BEGINS.encode())  # of an export that was interrupted
    assert invoke(finished, "export", "--root", "runs/small", "--out", str(tmp_path)).returncode == 0
    assert "pip install torch safetensors numpy pillow" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("kind", ["pca", "lowrank", "cosine", "scale", "none"])
def test_other_routers_and_decoders_load_as_well(
    kind: str, tmp_path: Path, images: list[str], changed_mixture: Callable[[str], Mixture]
) -> None:
    from hardmoe.export.folder import export_mixture
    from hardmoe.storage import open_storage

    mixture = changed_mixture(kind)
    export_mixture(mixture, open_storage(str(tmp_path / "hub")), onnx=False, programs=False, say=lambda name: None)
    assert_same(mixture, images, *by_a_stranger(tmp_path / "hub", images))


@pytest.fixture
def changed_mixture(finished: Path) -> Callable[[str], Mixture]:
    """The small mixture with another router or decoder, of random numbers."""
    from hardmoe.models.shared_decoder import SharedDecoder
    from hardmoe.partitioning.router import Router
    from hardmoe.partitioning.transform import FeatureTransform, Projection

    def change(kind: str) -> Mixture:
        mixture = Mixture.load(str(finished / "runs" / "small"))
        generator = torch.Generator().manual_seed(1)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        width, experts, tags = mixture.decoder.dim, 3, len(mixture.tags)
        tensors = {"decoder.weight": random(tags, width), "decoder.bias": random(tags)}
        if kind == "pca":
            directions = np.eye(width, dtype=np.float32)[:5]
            offset, scale = random(5).double().numpy(), np.linspace(0.5, 2, 5)
            transform = FeatureTransform("pca", Projection(directions, offset, scale))
            groups = np.array([0, 2, 1, 1], np.int32)
            mixture.__dict__["router"] = Router(transform, random(4, 5).numpy(), groups)
            return mixture
        if kind == "lowrank":
            maps = {"shared": random(width, width), "left": random(experts, width, 2), "right": random(experts, 2, width)}
            tensors |= {f"alignment.{name}": 0.1 * tensor for name, tensor in maps.items()}
            tensors["alignment.bias"] = random(experts, width)
        elif kind == "scale":
            tensors |= {"alignment.weight": random(experts, width), "alignment.bias": random(experts, width)}
        elif kind == "cosine":
            tensors["decoder.log_scale"] = torch.tensor(1.5)
        mixture.__dict__["decoder"] = SharedDecoder.from_tensors(tensors).eval()
        return mixture

    return change


def test_weights_are_those_of_the_run(folder: Path, mixture: Mixture) -> None:
    tensors = safetensors.numpy.load_file(folder / "experts" / "expert-0001.safetensors")
    for name, value in mixture.experts.get(1).backbone.state_dict().items():
        np.testing.assert_array_equal(tensors[f"backbone.{name}"], value.numpy())
