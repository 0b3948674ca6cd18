"""What a sweep over K is measured on: the router's own sample of the training features, with the hashtags of its examples.

Drawn once, by the rule by which the router draws its sample, and kept as one file, in the order of the ids: every fit of a
sweep, and of the next one, reads it whole instead of the features, and knows nothing of how they are sharded. It is as large
as the sample's features (268 MB for 262,144 of 512 dimensions). Principal directions, where the transform has any, are those
of the sample, and kept beside it. Rejected: leaving the shards' samples as they are, which
makes every fit open as many files as there are shards.

Shape letters: S examples of the sample, D feature dim, L labels.
"""

import json
import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardmoe.arrays import load_arrays, save_arrays
from hardmoe.config import Json
from hardmoe.data.ids import sortable
from hardmoe.data.reading import Labels, labels_of
from hardmoe.data.schemas import SPLITS
from hardmoe.errors import CorruptFileError, DataError
from hardmoe.hashing import hash_fractions
from hardmoe.neighbours.assignment import assign
from hardmoe.neighbours.engine import choose_engine
from hardmoe.partitioning.fit import read_features
from hardmoe.partitioning.in_memory import fit
from hardmoe.partitioning.moments import Moments
from hardmoe.partitioning.router import TRANSFORM_FILE
from hardmoe.partitioning.scan import blas_threads
from hardmoe.partitioning.transform import PROJECTIONS, FeatureTransform
from hardmoe.partitioning.transform_fit import fit_transform, read_transform
from hardmoe.stage import Completion, Context, DriverContext, Finished, Phase, Unit, UnitContext

SAMPLE_FILE = "sample.safetensors"


@dataclass(frozen=True)
class Sample:
    """Examples of the sample, in ascending order of their ids."""

    ids_S16: NDArray[np.uint8]
    features_SD: NDArray[np.float32]
    """After the router's transform."""
    labels: Labels


class SampleWork:
    """See the module."""

    def phases(self, context: DriverContext) -> Generator[Phase, list[Completion], Finished]:
        """Draw from every training shard; put together."""
        features, vocabulary = context.input("features"), context.input("vocabulary")
        paths, tables = features.files("split=train/"), vocabulary.files("labels/")
        if len(tables) != sum(len(features.files(f"split={split}/")) for split in SPLITS):
            raise CorruptFileError(
                f"{vocabulary.storage.where(vocabulary.path('labels'))} has another number of tables than the features; "
                "delete both and run again"
            )
        num_examples: int = features.payload["rows"]["train"]
        fraction = min(1.0, context.stage.config["partition"]["sample_size"] / max(1, num_examples))
        # Features and labels have one table for each shard of the dataset, the training split's first.
        arguments = [{"path": path, "labels": tables[i], "fraction": fraction} for i, path in enumerate(paths)]
        drawn = yield Phase("draw", [Unit(f"{i:05d}", each) for i, each in enumerate(arguments)])
        pieces = context.share("pieces.json", json.dumps([done.scratch["sample"] for done in drawn]).encode())
        (joined,) = yield Phase("join", [Unit("all", {"pieces": pieces})])
        payload = {**joined.payload, "of": num_examples}
        check_counts([context.stage.operational["largest"]], payload)
        return Finished(payload)

    def run(self, context: UnitContext) -> Json:
        """A shard's share of the sample, or the whole."""
        return _draw(context) if context.phase == "draw" else _join(context)


def load_sample(context: Context) -> Sample:
    """The sample, as a stage's input `sample` has it."""
    artifact = context.input("sample")
    arrays = load_arrays(artifact.storage, artifact.path(SAMPLE_FILE))
    kind, path = context.stage.config["partition"]["transform"], artifact.path(TRANSFORM_FILE)
    transform = read_transform(artifact.storage, path) if kind in PROJECTIONS else FeatureTransform(kind)
    labels = Labels(arrays["tags"], arrays["offsets"])
    return Sample(arrays["ids"], transform(arrays["features"].astype(np.float32)), labels)


def check_counts(counts: list[int], payload: Json) -> None:
    """Whether a sample, by its payload, can be cut into so many parts.

    Raises:
        DataError: it holds fewer distinct features.
    """
    most, rows, distinct = max(counts), payload["rows"], payload["distinct"]
    if most > distinct:
        of = "" if distinct == rows else f", {distinct} of them with distinct features"
        remedy = "add data" if rows == payload["of"] else "raise partition.sample_size"
        raise DataError(
            f"--sweep asks for {most} parts, but the sample holds {rows} of the {payload['of']} training examples{of}; "
            f"ask for {distinct} parts at most, or {remedy}"
        )


def _draw(context: UnitContext) -> Json:
    arguments, seed = context.unit.arguments, context.stage.config["seed"]
    ids, kept = [], []
    for ids_N16, features_ND in read_features(context.input("features"), arguments["path"]):
        chosen_N = hash_fractions(ids_N16, seed, "router-sample") < arguments["fraction"]
        ids.append(ids_N16[chosen_N])
        kept.append(features_ND[chosen_N].astype(np.float16))  # what the table holds
    ids_S16 = np.concatenate(ids)
    labels = labels_of(context.input("vocabulary"), ids_S16, [arguments["labels"]])
    arrays = {"ids": ids_S16, "features": np.concatenate(kept), "tags": labels.indices_L, "counts": np.diff(labels.offsets)}
    save_arrays(context.scratch("sample"), arrays)
    return {"rows": len(ids_S16)}


def _join(context: UnitContext) -> Json:
    paths = json.loads(context.storage.read_bytes(context.unit.arguments["pieces"]))
    pieces = []
    for number, path in enumerate(paths):
        pieces.append(load_arrays(context.storage, path))
        context.progress(number + 1, len(paths))
    arrays = _in_order_of_ids({name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]})
    save_arrays(context.output(SAMPLE_FILE), arrays)
    features_SD = _transformed(context, arrays["features"].astype(np.float32))
    distinct = len(np.unique((features_SD + 0.0).view(np.dtype((np.void, features_SD.itemsize * features_SD.shape[1])))))
    return {
        "rows": len(features_SD),
        "dim": features_SD.shape[1],
        "distinct": distinct,
        "occurrences": len(arrays["tags"]),
        "variance": _variance(features_SD, arrays["ids"], context.stage.config["seed"]) if distinct else 0.0,
    }


def _transformed(context: UnitContext, features_SD: NDArray[np.float32]) -> NDArray[np.float32]:
    """The sample after its own transform, which is kept where it was fitted."""
    asked = context.stage.config["partition"]
    if not len(features_SD):
        return features_SD
    if asked["transform"] not in PROJECTIONS:
        return FeatureTransform(asked["transform"])(features_SD)
    with blas_threads(context.stage.resources.num_cpus):
        moments = Moments.from_batch(features_SD)
    transform = fit_transform(moments, asked["transform"], asked.get("components")).transform
    with context.output(TRANSFORM_FILE) as sink:
        sink.write(transform.to_bytes())
    return transform(features_SD)


def _in_order_of_ids(pieces: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    order_S = np.argsort(sortable(pieces["ids"]))
    counts_S = pieces["counts"][order_S]
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts_S, dtype=np.int64)])
    starts_S = np.concatenate([np.zeros(1, np.int64), np.cumsum(pieces["counts"], dtype=np.int64)[:-1]])[order_S]
    source_L = np.repeat(starts_S - offsets[:-1], counts_S) + np.arange(offsets[-1])
    tags_L = pieces["tags"][source_L]
    return {"ids": pieces["ids"][order_S], "features": pieces["features"][order_S], "tags": tags_L, "offsets": offsets}


def _variance(features_SD: NDArray[np.float32], ids_S16: NDArray[np.uint8], seed: int) -> float:
    """Mean squared distance to the mean: what a single part leaves, measured as every K's is."""
    mean_1D = fit(features_SD, ids_S16, 1, seed).centroids_KD
    return math.fsum(assign(features_SD, mean_1D, choose_engine()).squared_distance_N) / len(features_SD)
