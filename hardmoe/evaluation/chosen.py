"""One of several experts for an image, chosen in the two ways that say what routing is worth.

`best_single_expert` is the expert with the smallest mean loss on the whole validation split: what its images get from an expert
that was not chosen for them. `oracle_expert` is, for every image, the expert that gives its own hashtags the largest mean
log-probability: no rule that chooses one expert per image can have a smaller loss, and none can know it.

Shape letters: N examples, k experts of each, K experts, E features of an expert, V tags, L labels.
"""

from collections.abc import Callable, Generator

import numpy as np
import torch
from numpy.typing import NDArray

from hardmoe.config import Json
from hardmoe.data.reading import labels_of
from hardmoe.evaluation.metrics import Labels
from hardmoe.evaluation.topk import LOSS_UNIT, log_probabilities, read_topk
from hardmoe.models.shared_decoder import load_shared_decoder
from hardmoe.stage import Completion, DriverContext, Finished, InputArtifact, Phase, Unit, UnitContext
from hardmoe.training.determinism import deterministic

_BATCH = 256

ChosenScorer = Callable[[NDArray[np.float32], NDArray[np.int64], Labels], NDArray[np.float32]]
"""Takes features float32 [N, k, E], experts int64 [N, k] and the labels; gives log-probabilities float32 [N, V]."""


def build_chosen_scorer(decoder: InputArtifact, losses: Json | None) -> ChosenScorer:
    """The scorer of a system that chooses.

    Args:
        decoder: the shared decoder.
        losses: payload of `LossesWork`, to take the best expert of all for every image; None for the best of each image.
    """
    model = load_shared_decoder(decoder)
    best = None if losses is None else int(np.argmin(losses["loss_units"]))

    def score(features_NkE: NDArray[np.float32], experts_Nk: NDArray[np.int64], labels: Labels) -> NDArray[np.float32]:
        if best is not None:
            own_N = (experts_Nk == best).argmax(axis=1)
            rows_N = np.arange(len(own_N))
            features_NkE, experts_Nk = features_NkE[rows_N, own_N][:, None], experts_Nk[rows_N, own_N][:, None]
        with torch.inference_mode():
            said_NkV = log_probabilities(model, features_NkE, experts_Nk).numpy()
        own_N = label_losses(said_NkV, experts_Nk, labels).argmin(axis=1)
        scores_NV: NDArray[np.float32] = said_NkV[np.arange(len(own_N)), own_N]
        return scores_NV

    return score


def label_losses(said_NkV: NDArray[np.float32], experts_Nk: NDArray[np.int64], labels: Labels) -> NDArray[np.float64]:
    """Minus the mean log-probability of each image's tags, by each of its experts, float64 [N, k]; 0 for images without one."""
    indices_L, offsets = labels
    lengths_N = np.diff(offsets)
    rows_L = np.repeat(np.arange(len(lengths_N)), lengths_N)
    losses_Nk = np.zeros(experts_Nk.shape)
    np.subtract.at(losses_Nk, rows_L, said_NkV[rows_L, :, indices_L].astype(np.float64) / lengths_N[rows_L, None])
    return losses_Nk


class LossesWork:
    """Every expert's loss on the validation split."""

    def phases(self, context: DriverContext) -> Generator[Phase, list[Completion], Finished]:
        """Sums over its shards, as integers."""
        shards = context.input("embeddings").files("split=validation/")
        units = [Unit(f"{index:05d}", {"path": path, "index": index, "of": len(shards)}) for index, path in enumerate(shards)]
        done = yield Phase("measure", units)
        experts: int = context.input("embeddings").payload["top_k"]
        sums = [sum(d.payload["loss_units"][expert] for d in done) for expert in range(experts)]
        return Finished({"examples": sum(d.payload["examples"] for d in done), "loss_units": sums})

    def run(self, context: UnitContext) -> Json:
        """One shard."""
        arguments, model = context.unit.arguments, load_shared_decoder(context.input("decoder"))
        shard = read_topk(context.input("embeddings"), arguments["path"])
        near = (arguments["index"], arguments["of"])
        labels = labels_of(context.input("vocabulary"), shard.ids_N16, split="validation", near=near)
        units_K = np.zeros(shard.experts_Nk.shape[1], np.int64)
        with deterministic(context.stage.resources.num_cpus, torch.device("cpu")), torch.inference_mode():
            for start in range(0, len(shard.ids_N16), _BATCH):
                some = slice(start, min(start + _BATCH, len(shard.ids_N16)))
                offsets = labels.offsets[some.start : some.stop + 1]
                tags = labels.indices_L[offsets[0] : offsets[-1]], offsets - offsets[0]
                experts_Nk = shard.experts_Nk[some]
                said_NkV = log_probabilities(model, shard.features_NkE[some], experts_Nk).numpy()
                losses_Nk = label_losses(said_NkV, experts_Nk, tags)
                np.add.at(units_K, experts_Nk, np.rint(losses_Nk * LOSS_UNIT).astype(np.int64))
        return {"examples": int((np.diff(labels.offsets) > 0).sum()), "loss_units": units_K.tolist()}
