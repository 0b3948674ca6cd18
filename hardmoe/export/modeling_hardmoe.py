"""Loads an exported hardmoe mixture: needs torch, safetensors, numpy and Pillow, and hardmoe not at all.

    from modeling_hardmoe import Mixture
    mixture = Mixture("path/of/this/folder")
    for expert, tags, probabilities in mixture.predict(["photo.jpg"], k=5):
        print(expert, tags, probabilities)

or `python modeling_hardmoe.py photo.jpg`. The networks' graph is a `torch.export` program, into which the weights of the trunk or
of an expert are put from their safetensors files; experts are loaded when the first image is routed to them. Rejected: code of
every architecture, of which there are hundreds.

Shape letters: N images, S side in pixels, D features, E features of an expert, Z unified dims, K experts, V tags.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

BATCH = 64


class Mixture:
    """See the module.

    Args:
        folder: the exported folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        self.tags: list[str] = json.loads((self.folder / "tags.json").read_text(encoding="utf-8"))
        self.router: dict[str, Tensor] = load_file(self.folder / "router.safetensors")
        self.decoder: dict[str, Tensor] = load_file(self.folder / "decoder.safetensors")
        self._networks: dict[str, Any] = {}

    def predict(self, images: Sequence[Any], k: int = 10) -> list[tuple[int, list[str], list[float]]]:
        """Of every image the expert that answered, the k most probable tags, and their probabilities."""
        experts_N, unified_NZ = self._answer(images)
        top = self.decode(unified_NZ).sort(dim=1, descending=True, stable=True)
        rows = zip(experts_N.tolist(), top.indices[:, :k].tolist(), top.values[:, :k].tolist(), strict=True)
        return [(expert, [self.tags[index] for index in indices], values) for expert, indices, values in rows]

    def embed(self, images: Sequence[Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Every image's place in the unified space, float32 [N, Z]."""
        return self._answer(images)[1].numpy()

    def route(self, features_ND: Tensor) -> Tensor:
        """The expert of every row of the trunk's features, int64 [N]."""
        x = features_ND.half().double()
        if "directions" in self.router:
            x = (x @ self.router["directions"].double().T - self.router["offset"]) * self.router["scale"]
        if self.config["transform"] != "none":
            length = x.square().sum(1, keepdim=True).sqrt()
            x = x / torch.where(length == 0, torch.ones_like(length), length)
        centroids = self.router["centroids"].double()
        nearest = (centroids.square().sum(1)[None] - 2 * (x.float().double() @ centroids.T)).argmin(1)
        experts_N: Tensor = self.router["groups"][nearest]
        return experts_N

    def decode(self, unified_NZ: Tensor) -> Tensor:
        """Probabilities of all tags, float32 [N, V]."""
        if self.config["cosine"]:
            unified_NZ = functional.normalize(unified_NZ, dim=1)
        logits_NV = functional.linear(unified_NZ, self.decoder["decoder.weight"], self.decoder["decoder.bias"])
        return logits_NV.softmax(1)

    def align(self, features_NE: Tensor, expert: int) -> Tensor:
        """One expert's features in the unified space, float32 [N, Z]."""
        weight = self.decoder.get("alignment.weight")
        if weight is None:
            return features_NE
        bias = self.decoder["alignment.bias"][expert]
        if weight.ndim == 2:
            scaled_NZ: Tensor = features_NE * weight[expert] + bias
            return scaled_NZ
        return functional.linear(features_NE, weight[expert], bias)

    def _answer(self, images: Sequence[Any]) -> tuple[Tensor, Tensor]:
        pixels = torch.stack([self._square(image) for image in images])
        with torch.inference_mode():
            experts = self.route(self._features("trunk", "trunk.safetensors", pixels))
            unified = torch.empty(len(pixels), self.config["dim"])
            for expert in sorted(set(experts.tolist())):
                rows = torch.nonzero(experts == expert)[:, 0]
                features = self._features("expert", f"experts/expert-{expert:04d}.safetensors", pixels[rows])
                unified[rows] = self.align(features, expert)
        return experts, unified

    def _features(self, graph: str, weights: str, pixels: Tensor) -> Tensor:
        if weights not in self._networks:
            network = torch.export.load(self.folder / f"{graph}.pt2").module()
            network.load_state_dict(load_file(self.folder / weights))
            self._networks[weights] = network
        network = self._networks[weights]
        return torch.cat([network(pixels[start : start + BATCH]) for start in range(0, len(pixels), BATCH)])

    def _square(self, image: Any) -> Tensor:
        """An image (path, Pillow's, or array uint8 [height, width, 3]) as the networks were trained on, uint8 [3, S, S]."""
        if isinstance(image, str | Path):
            image = Image.open(image)
        if isinstance(image, Image.Image):
            image = _of_8_bits(ImageOps.exif_transpose(image))
            if image.has_transparency_data:
                white = Image.new("RGBA", image.size, (255, 255, 255, 255))
                image = Image.alpha_composite(white, image.convert("RGBA"))
            image = np.array(image.convert("RGB"))
        height, width, _ = image.shape
        side, size = min(height, width), self.config["image_size"]
        top, left = (height - side) // 2, (width - side) // 2
        square = torch.from_numpy(np.ascontiguousarray(image[top : top + side, left : left + side]))
        # Made four-dimensional first, it is channels last to torch, which then rounds as in training.
        square = square[None].permute(0, 3, 1, 2)
        if side != size:
            square = functional.interpolate(square, (size, size), mode="bilinear", antialias=True)
        return square[0]


def _of_8_bits(image: Image.Image) -> Image.Image:
    """Grey values of 16 bits scaled to 8, 65535 to 255; Pillow itself would clip them."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    grey = np.asarray(image)
    if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
        raise ValueError(f"pixels of mode {image.mode} have no defined brightness; save the image with 8 or 16 bits")
    return Image.fromarray(((grey.astype(np.int64) + 128) // 257).astype(np.uint8))


def main(paths: Sequence[str]) -> None:
    """Print the tags of images."""
    mixture = Mixture(Path(__file__).parent)
    for path, (expert, tags, probabilities) in zip(paths, mixture.predict(paths, k=5), strict=True):
        told = ", ".join(f"{tag} {probability:.3f}" for tag, probability in zip(tags, probabilities, strict=True))
        sys.stdout.write(f"{path}: {told} (expert {expert})\n")


if __name__ == "__main__":
    main(sys.argv[1:])
