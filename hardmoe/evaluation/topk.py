"""Several experts on one image: p(tag) = sum over its k nearest experts of w_e p_e(tag), w = softmax(-d^2 / T) over the k.

As c-BTM mixes (Gururangan et al. 2023, arXiv 2303.14177, section 3.3), with d the distance to an expert's centroid in the
router's space. T is fitted on the validation split: of the powers of sqrt(2) between 2^-20 and 2^20 that with the smallest
mean cross-entropy, the smallest of equals. At its lower end only the nearest expert counts, at the upper all alike, so what the
mean gains or loses over the nearest expert alone is known from the same sums. Rejected: mixing the embeddings before they are
decoded, which makes a geometric mean of the experts' probabilities, so that one that is sure a tag is absent decides alone; and
learning a gate, which the validation split is too small for.

Shape letters: N examples, k experts of each, E features of an expert, V tags, L labels, T temperatures.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hardmoe.artifacts.store import ArtifactStore
from hardmoe.config import Json
from hardmoe.data.reading import labels_of
from hardmoe.data.schemas import NEAREST_EMBEDDINGS
from hardmoe.errors import DataError
from hardmoe.models.shared_decoder import SharedDecoder, load_shared_decoder
from hardmoe.stage import Completion, DriverContext, Finished, InputArtifact, Phase, Unit, UnitContext
from hardmoe.tables import ids_to_array, read_table, vectors_to_array
from hardmoe.training.determinism import deterministic

TEMPERATURES_T = 2.0 ** (np.arange(-40, 41) / 2)
_BATCH = 256
LOSS_UNIT = 1 << 24
"""Losses are summed in units of 2^-24, as integers: the same sum however the split is sharded."""

TopkScorer = Callable[[NDArray[np.float32], NDArray[np.int64], NDArray[np.float64]], NDArray[np.float32]]
"""Takes features float32 [N, k, E], experts int64 [N, k] and squared distances [N, k]; gives log-probabilities float32 [N, V]."""


def log_weights(squared_distances_Nk: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """Of the mixture, float64 [N, k]: log softmax(-d^2 / T)."""
    scaled_Nk = (squared_distances_Nk.min(axis=1, keepdims=True) - squared_distances_Nk) / temperature
    return np.asarray(scaled_Nk - np.log(np.exp(scaled_Nk).sum(axis=1, keepdims=True)))


def fitted_temperature(store: ArtifactStore, num_experts: int) -> float:
    """T by which a run mixes so many experts of an image; 1 for one, where it does not matter.

    Raises:
        DataError: it has not been fitted.
    """
    if num_experts == 1:
        return 1.0
    temperature = store.find("topk/temperature")
    fitted = None if temperature is None else temperature.record.payload["top_k"]
    if temperature is None or fitted != num_experts:
        raise DataError(
            f"experts={num_experts} needs weights fitted for as many, which this run has "
            f"{'none of' if fitted is None else f'for {fitted}'}; run `hardmoe evaluate` with evaluation.top_k: {num_experts}"
        )
    return float(temperature.record.payload["temperature"])


def build_topk_scorer(decoder: InputArtifact, temperature: InputArtifact) -> TopkScorer:
    """The scorer of `mixture_topk`."""
    model, value = load_shared_decoder(decoder), float(temperature.payload["temperature"])

    def score(
        features_NkE: NDArray[np.float32], experts_Nk: NDArray[np.int64], squared_Nk: NDArray[np.float64]
    ) -> NDArray[np.float32]:
        weights_Nk = torch.from_numpy(log_weights(squared_Nk, value)).float()
        with torch.inference_mode():
            scores_NkV = log_probabilities(model, features_NkE, experts_Nk) + weights_Nk[:, :, None]
            scores_NV: NDArray[np.float32] = scores_NkV.logsumexp(1).numpy()
        return scores_NV

    return score


def log_probabilities(model: SharedDecoder, features_NkE: NDArray[np.float32], experts_Nk: NDArray[np.int64]) -> Tensor:
    """What each of the experts says, float32 [N, k, V]."""
    num_examples, top_k, width = features_NkE.shape
    features = torch.from_numpy(np.ascontiguousarray(features_NkE)).reshape(num_examples * top_k, width)
    logits = model(features, torch.from_numpy(np.ascontiguousarray(experts_Nk)).reshape(-1))
    return torch.log_softmax(logits, dim=1).reshape(num_examples, top_k, -1)


@dataclass(frozen=True)
class TopkShard:
    """Examples with their k nearest experts, the nearest first."""

    ids_N16: NDArray[np.uint8]
    features_NkE: NDArray[np.float32]
    experts_Nk: NDArray[np.int64]
    squared_Nk: NDArray[np.float64]
    """Squared distances to the experts' centroids."""


def read_topk(embeddings: InputArtifact, path: str) -> TopkShard:
    """One shard of `topk/embeddings`."""
    table, top_k = read_table(embeddings.storage, path, NEAREST_EMBEDDINGS), embeddings.payload["top_k"]
    features_PE = vectors_to_array(table.column("embedding")).astype(np.float32)
    ids_N16 = ids_to_array(table.column("example_id"))[::top_k]
    experts_Nk = table.column("expert").to_numpy().astype(np.int64).reshape(-1, top_k)
    squared_Nk = table.column("squared_distance").to_numpy().reshape(-1, top_k)
    return TopkShard(ids_N16, features_PE.reshape(len(ids_N16), top_k, features_PE.shape[1]), experts_Nk, squared_Nk)


class TemperatureWork:
    """See the module."""

    def phases(self, context: DriverContext) -> Generator[Phase, list[Completion], Finished]:
        """The loss at every temperature, summed over the validation shards."""
        embeddings = context.input("embeddings")
        shards = embeddings.files("split=validation/")
        units = [Unit(f"{index:05d}", {"path": path, "index": index, "of": len(shards)}) for index, path in enumerate(shards)]
        done = yield Phase("measure", units)
        count, told = sum(d.payload["examples"] for d in done), {"top_k": embeddings.payload["top_k"]}
        sums_T = [sum(units) for units in zip(*(d.payload["losses"] for d in done), strict=True)]
        if not count:
            # Nothing to fit on: the nearest expert alone, as the mixture itself.
            unknown = {"validation_loss": None, "validation_loss_top1": None}
            return Finished({**told, "temperature": float(TEMPERATURES_T[0]), **unknown})
        best = int(np.argmin(sums_T))
        losses_T = np.array(sums_T, np.float64) / LOSS_UNIT / count
        return Finished(
            {
                **told,
                "temperature": float(TEMPERATURES_T[best]),
                "validation_loss": float(losses_T[best]),
                "validation_loss_top1": float(losses_T[0]),
            }
        )

    def run(self, context: UnitContext) -> Json:
        """One shard."""
        arguments, model = context.unit.arguments, load_shared_decoder(context.input("decoder"))
        shard = read_topk(context.input("embeddings"), arguments["path"])
        ids_N16 = shard.ids_N16
        near = (arguments["index"], arguments["of"])
        labels = labels_of(context.input("vocabulary"), ids_N16, split="validation", near=near)
        lengths_N = np.diff(labels.offsets)
        rows_L = np.repeat(np.arange(len(ids_N16)), lengths_N)
        losses_TN = np.zeros((len(TEMPERATURES_T), len(ids_N16)))
        with deterministic(context.stage.resources.num_cpus, torch.device("cpu")), torch.inference_mode():
            for start in range(0, len(ids_N16), _BATCH):
                some = slice(start, min(start + _BATCH, len(ids_N16)))
                of = slice(labels.offsets[some.start], labels.offsets[some.stop])
                said_NkV = log_probabilities(model, shard.features_NkE[some], shard.experts_Nk[some])
                said_Lk = said_NkV[rows_L[of] - start, :, labels.indices_L[of]].double().numpy()
                for index, temperature in enumerate(TEMPERATURES_T):
                    weights_Lk = log_weights(shard.squared_Nk[some], temperature)[rows_L[of] - start]
                    mixed_L = np.logaddexp.reduce(said_Lk + weights_Lk, axis=1)
                    np.subtract.at(losses_TN[index], rows_L[of], mixed_L / lengths_N[rows_L[of]])
        units_T = np.rint(losses_TN * LOSS_UNIT).astype(np.int64).sum(axis=1)
        return {"examples": int((lengths_N > 0).sum()), "losses": units_T.tolist()}
