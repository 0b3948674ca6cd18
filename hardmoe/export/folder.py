"""Writing the folder: in the layout of model hubs, `config.json` last, so that a folder that has one is whole.

Rejected: one file of everything, which must be loaded whole to answer for one image.
"""

import json
from collections.abc import Callable
from importlib.resources import files as package_files

import safetensors.torch
import torch
from torch import Tensor

from hardmoe.artifacts.names import expert_name
from hardmoe.errors import DataError
from hardmoe.export.card import CARD_BEGINS, model_card
from hardmoe.export.pieces import (
    DecoderPiece,
    ExpertPiece,
    MixturePiece,
    Network,
    RouterPiece,
    decoder_matrix,
    expert_map,
    expert_piece,
    router_tensors,
    trunk_piece,
)
from hardmoe.export.programs import Traced, check_onnx_is_installed
from hardmoe.mixture import Mixture
from hardmoe.storage import Storage, read_if_there

LOADER = "modeling_hardmoe.py"
CONFIG = "config.json"
CARD = "README.md"
MOST_IN_ONE_FILE = 8
"""Of experts: a single-file ONNX sends every image through all of them."""
_EXAMPLES = 3


def export_mixture(mixture: Mixture, out: Storage, *, onnx: bool, programs: bool, say: Callable[[str], None]) -> list[str]:
    """Write a mixture, which is on the CPU, as a folder; returns the names of the files.

    Args:
        mixture: the mixture.
        out: the folder.
        onnx: whether to write ONNX of every piece, each checked with ONNX Runtime.
        programs: whether to write `torch.export` programs of every piece with its weights.
        say: told what is being written.

    Raises:
        DataError: the folder has an export already, or a README of something else, or ONNX Runtime computes
            something else than torch.
        RecipeError: a package that ONNX needs is missing.
    """
    if out.exists(CONFIG):
        raise DataError(f"{out.where()} holds an exported mixture already; name another --out, or delete it")
    card = read_if_there(out, CARD)
    if card is not None and not card.startswith(CARD_BEGINS.encode()):
        raise DataError(f"{out.where(CARD)} is not of an export and would be written over; name another --out")
    if onnx:
        check_onnx_is_installed()
    writer = _Writer(mixture, out, say)
    writer.weights()
    if programs or onnx:
        writer.pieces(onnx=onnx, programs=programs)
    out.write_bytes(LOADER, package_files("hardmoe.export").joinpath(LOADER).read_bytes())
    writer.written[LOADER] = "the loader"
    out.write_bytes(CARD, model_card(mixture, writer.written).encode())
    out.write_bytes(CONFIG, (json.dumps(writer.config(), indent=1, sort_keys=True) + "\n").encode())
    return [*writer.written, CARD, CONFIG]


class _Writer:
    """Writes file after file and remembers what each is."""

    def __init__(self, mixture: Mixture, out: Storage, say: Callable[[str], None]) -> None:
        self._mixture, self._out, self._say = mixture, out, say
        self.written: dict[str, str] = {}
        size = mixture.image_size
        generator = torch.Generator().manual_seed(0)
        self._pixels = torch.randint(0, 256, (_EXAMPLES, 3, size, size), generator=generator, dtype=torch.uint8)

    def config(self) -> dict[str, object]:
        mixture = self._mixture
        return {
            "format": 1,
            "model_type": "hardmoe",
            "backbone": mixture.backbone,
            "experts": mixture.num_experts,
            "image_size": mixture.image_size,
            "pixels": "uint8, the shorter side resized and the centre cropped; the graphs normalise them themselves",
            "decode": "reduced" if mixture.reduced else "full",
            "transform": mixture.router.transform.kind,
            "dim": mixture.decoder.dim,
            "cosine": mixture.decoder.decoder.log_scale is not None,
            "num_tags": len(mixture.tags),
            "mixture": mixture.identity(),
        }

    def weights(self) -> None:
        """All tensors as safetensors, and the graphs of the two networks, which take their weights from there."""
        mixture = self._mixture
        self._write("tags.json", (json.dumps(mixture.tags, ensure_ascii=False) + "\n").encode(), "the hashtags, by index")
        trunk = trunk_piece(mixture)
        self._tensors("trunk.safetensors", trunk.state_dict(), "weights of the trunk")
        self._write("trunk.pt2", self._traced("trunk", trunk).program(), "its graph, for `torch.export.load`")
        for expert in range(mixture.num_experts):
            network = Network(mixture.experts.get(expert).backbone).eval()
            if expert == 0:
                self._write("expert.pt2", self._traced("expert", network).program(), "the graph of every expert")
            self._tensors(f"experts/{expert_name(expert)}.safetensors", network.state_dict(), "weights of an expert")
        self._tensors("router.safetensors", router_tensors(mixture.router), "centroids, and what features go through before")
        weight, bias = decoder_matrix(mixture.decoder)
        tensors = {"decoder.weight": weight, "decoder.bias": bias}
        if mixture.decoder.alignment is not None:
            maps = [expert_map(mixture.decoder.alignment, expert) for expert in range(mixture.num_experts)]
            tensors["alignment.weight"] = torch.stack([each for each, _ in maps if each is not None])
            tensors["alignment.bias"] = torch.stack([each for _, each in maps if each is not None])
        self._tensors("decoder.safetensors", tensors, "alignment of every expert, and decoder")

    def pieces(self, *, onnx: bool, programs: bool) -> None:
        """Trunk, router, experts, decoder, and of few experts the whole, each in a file that needs no other."""
        mixture, pixels = self._mixture, self._pixels
        trunk, router, decoder = trunk_piece(mixture), RouterPiece(mixture.router).eval(), DecoderPiece(mixture.decoder).eval()
        with torch.no_grad():
            features = trunk(pixels)
        places = torch.randn(_EXAMPLES, mixture.decoder.dim, generator=torch.Generator().manual_seed(1))
        few = mixture.num_experts <= MOST_IN_ONE_FILE
        kept: list[ExpertPiece] = []

        def write(name: str, graph: Traced) -> None:
            self._say(name)
            if programs:
                self._write(f"programs/{name}.pt2", graph.program(), f"`torch.export` of the {name}")
            if onnx:
                self._write(f"onnx/{name}.onnx", graph.onnx(), f"ONNX of the {name}")

        write("trunk", self._traced("trunk", trunk))
        write("router", Traced("router", router, features, ("features", ["expert"])))
        graph = None
        for expert in range(mixture.num_experts):
            name, piece = expert_name(expert), expert_piece(mixture, expert)
            if graph is None:
                graph = Traced(name, piece, pixels, ("pixels", ["embedding"]))
            else:
                graph.turned_into(name, piece)
            write(name, graph)
            if few:
                kept.append(piece)
        write("decoder", Traced("decoder", decoder, places, ("embedding", ["probabilities"])))
        if few:
            whole = MixturePiece(trunk, router, kept, decoder).eval()
            write("mixture", Traced("mixture", whole, pixels, ("pixels", ["expert", "embedding", "probabilities"])))

    def _traced(self, name: str, network: Network) -> Traced:
        return Traced(name, network, self._pixels, ("pixels", ["features"]))

    def _tensors(self, name: str, tensors: dict[str, Tensor], words: str) -> None:
        plain = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
        self._write(name, safetensors.torch.save(plain), words)

    def _write(self, name: str, data: bytes, words: str) -> None:
        self._out.write_bytes(name, data)
        self.written[name] = words
