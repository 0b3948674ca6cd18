"""The report stage: one unit that gathers from the artifacts what the page shows, as `data.json`.

Only deterministic things: what the record vouches for. Times and hosts join when the page is rendered. Where parts are
large, images and tags are judged on a sample drawn by hash, and of all images only a few shards' are read: what grows with
the collection is a pass over ids and assignments.

Shape letters: N examples of the sample, V tags.
"""

import json
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardmoe.artifacts.names import ROUNDS
from hardmoe.config import Json
from hardmoe.data.agreement import tag_information
from hardmoe.data.ids import sortable
from hardmoe.data.images import thumbnail_data_uri
from hardmoe.data.reading import Labels, example_shards, labels_of, read_examples, tag_names
from hardmoe.data.schemas import ASSIGNMENTS, SPLITS
from hardmoe.hashing import hash_fractions
from hardmoe.report.distances import bordering_share, count_distances, count_part_distances
from hardmoe.report.schema import (
    Balance,
    CurvePoint,
    DatasetFacts,
    Distances,
    Exemplar,
    Metrics,
    Network,
    Part,
    PartitionFacts,
    ReportData,
    RouterFit,
    TagLift,
)
from hardmoe.stage import Completion, Context, DriverContext, Finished, InputArtifact, Phase, Unit, UnitContext
from hardmoe.tables import ids_to_array, read_table

DATA_FILE = "data.json"
NUM_TYPICAL = 24
NUM_BORDERLINE = 12
NUM_TAGS = 12
THUMBNAIL = 64
"""Side of an image on the page, in pixels."""
SAMPLE = 200_000
"""At most about so many training examples are looked at."""
_LEAST_COUNT = 5
_LEAST_SHARE = 0.01


class ReportWork:
    """See the module."""

    def phases(self, context: DriverContext) -> Generator[Phase, list[Completion], Finished]:
        """A single unit."""
        (done,) = yield Phase("collect", [Unit("report")])
        return Finished(done.payload)

    def run(self, context: UnitContext) -> Json:
        """Gather."""
        data = collect(context)
        with context.output(DATA_FILE) as out:
            out.write((json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n").encode())
        return {"experts": len(data["parts"]), "systems": len(data["metrics"]["systems"])}


def collect(context: Context) -> ReportData:
    """Everything on the page that the run's artifacts decide."""
    sample = _load_sample(context)
    partition = _partition_facts(context, sample)
    data: ReportData = {
        "recipe": dict(context.stage.config["recipe"]),
        "dataset": _dataset_facts(context),
        "metrics": _metrics(context),
        "router": _router(context),
        "partition": partition,
        "parts": _parts(context, sample, partition["distances"]),
        "curves": _curves(context),
        "networks": _networks(context),
    }
    if balance := context.input("partition").payload.get("balance"):
        data["balance"] = {name: balance[name] for name in Balance.__annotations__}  # type: ignore[typeddict-item]
    return data


def _dataset_facts(context: Context) -> DatasetFacts:
    dataset, vocabulary = context.input("dataset").payload, context.input("vocabulary").payload
    return {
        "sizes": dataset["sizes"],
        "source": dataset["source"],
        "quarantined": dataset["quarantined"],
        "quarantine_reasons": dataset["quarantine_reasons"],
        "without_tags": vocabulary["without_hashtags"] + vocabulary["outside_vocabulary"],
        "copies_merged": dataset["copies_merged"],
        "near_duplicates_removed": sum(near["removed"].values()) if (near := dataset["near_duplicates"]) else None,
        "num_tags": vocabulary["num_tags"],
        "top_tags": vocabulary["top_tags"],
        "dropped_tags": sum(vocabulary["dropped"].values()),
        "dropped_reasons": {reason: count for reason, count in vocabulary["dropped"].items() if count},
    }


def _metrics(context: Context) -> Metrics:
    evaluation = context.input("evaluation")
    body: Metrics = json.loads(evaluation.storage.read_bytes(evaluation.path("metrics.json")))
    keys = (
        "systems",
        "num_test_examples",
        "differences",
        "breakdown",
        "costs",
        "retrieval",
        "retrieval_differences",
        "transfer",
        "abstention",
    )
    return {key: body[key] for key in keys if key in body}  # type: ignore[return-value, literal-required]


def _router(context: Context) -> RouterFit:
    if "router" not in context.stage.inputs:
        experts = context.input("partition").payload["experts"]
        return {"objective": [], "converged": True, "reseeded": [], "experts": experts, "zero_vectors": None}
    payload = context.input("router").payload
    found: RouterFit = {
        "objective": payload["objective"],
        "converged": payload["converged"],
        "reseeded": payload["reseeded"],
        "experts": payload["experts"],
        "zero_vectors": payload.get("zero_vectors"),
    }
    if "transform" in payload:
        found["transform"] = payload["transform"]
    if "fine_clusters" in payload:
        found["fine_clusters"] = payload["fine_clusters"]
    return found


@dataclass(frozen=True)
class _Sample:
    """Assignments and labels of the training examples that are looked at."""

    ids_N16: NDArray[np.uint8]
    expert_N: NDArray[np.int32]
    distance_N: NDArray[np.float32]
    second_N: NDArray[np.int32]
    second_distance_N: NDArray[np.float32]
    labels: Labels

    def tag_counts(self, rows: NDArray[np.bool_], num_tags: int) -> NDArray[np.int64]:
        """How many of these examples carry each tag, int64 [V]."""
        chosen_L = np.repeat(rows, np.diff(self.labels.offsets))
        return np.bincount(self.labels.indices_L[chosen_L], minlength=num_tags)

    def tags_of(self, row: int) -> NDArray[np.int32]:
        """Tag indices of one example."""
        return self.labels.indices_L[self.labels.offsets[row] : self.labels.offsets[row + 1]]


def _partition_facts(context: Context, sample: _Sample) -> PartitionFacts:
    information = tag_information(sample.labels, sample.expert_N, sample.ids_N16, context.stage.config["recipe"]["seed"])
    sizes = context.input("partition").payload["sizes"]["train"]
    is_routed = "router" in context.stage.inputs
    return {
        "looked_at": len(sample.expert_N),
        "variation": float(np.std(sizes) / np.mean(sizes)) if sum(sizes) else None,
        "bordering": bordering_share(sample.distance_N, sample.second_distance_N) if is_routed else None,
        "tag_bits": information.bits,
        "tag_chance_bits": information.chance_bits,
        "tag_entropy_bits": information.entropy_bits,
        "distances": count_distances(sample.distance_N) if is_routed else None,
    }


def _networks(context: Context) -> list[Network]:
    found: list[Network] = []
    for name in context.stage.inputs:
        payload = context.input(name).payload
        if isinstance(payload, dict) and "architecture" in payload:
            network: Network = {
                "name": name,
                "backbone": payload["architecture"]["backbone"],
                "parameters": payload["parameters"],
                "unique_examples": payload["unique_examples"],
                "samples_per_epoch": sum(payload["samples_per_epoch"]) / len(payload["samples_per_epoch"]),
                "examples_seen": payload["examples_seen"],
                "features": payload["num_features"],
            }
            found.append(network)
    return found


def _curves(context: Context) -> dict[str, list[CurvePoint]]:
    curves = {}
    for name in context.stage.inputs:
        if name.startswith(("baselines/random/experts/", "baselines/random/rounds/", ROUNDS)):
            continue  # the control's decoder has its curve; as many more lines again would hide the experts' own
        artifact = context.input(name)
        for path in artifact.files("metrics.jsonl"):
            rows = [json.loads(line) for line in artifact.storage.read_bytes(path).decode().splitlines()]
            curves[curve_name(name)] = _merged_rows(rows)
    return curves


def curve_name(artifact: str) -> str:
    """What a network's or a decoder's curve is called, by its artifact."""
    for place in ("experts/", "baselines/", "rivals/"):
        artifact = artifact.removeprefix(place)
    return artifact.removesuffix("/network")


def _merged_rows(rows: Sequence[dict[str, Any]]) -> list[CurvePoint]:
    """One point per step: the validation row of an epoch joins the training row of the same step."""
    points: dict[int, dict[str, Any]] = {}
    for row in rows:
        points.setdefault(row["step"], {"step": row["step"], "examples": 0, "loss": None}).update(row)
    examples = 0
    for step in sorted(points):
        examples = points[step]["examples"] = max(examples, points[step]["examples"])
    wanted = ("step", "examples", "loss", "validation_precision@1")
    return [{name: points[s][name] for name in wanted if name in points[s]} for s in sorted(points)]  # type: ignore[misc]


def _load_sample(context: Context) -> _Sample:
    partition = context.input("partition")
    fraction = min(1.0, SAMPLE / max(1, sum(partition.payload["sizes"]["train"])))
    kept = []
    for path in partition.files("assignments/"):
        table = read_table(partition.storage, path, ASSIGNMENTS)
        ids_N16 = ids_to_array(table.column("example_id"))
        training_N = table.column("split").to_numpy(zero_copy_only=False) == "train"
        primary_N = table.column("primary").to_numpy(zero_copy_only=False).astype(bool)
        rows = np.flatnonzero(training_N & primary_N & (hash_fractions(ids_N16, 0, "report") < fraction))
        names = ("expert", "distance", "second", "second_distance")
        kept.append((ids_N16[rows], *(table.column(name).to_numpy(zero_copy_only=False)[rows] for name in names)))
    ids, expert, distance, second, second_distance = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    return _Sample(ids, expert, distance, second, second_distance, labels_of(context.input("vocabulary"), ids))


def _parts(context: Context, sample: _Sample, overall: Distances | None) -> list[Part]:
    partition, vocabulary = context.input("partition"), context.input("vocabulary")
    names = tag_names(vocabulary)
    overall_V = sample.tag_counts(np.ones(len(sample.expert_N), bool), len(names))
    parts: list[Part] = []
    for expert in range(partition.payload["experts"]):
        in_part_N = sample.expert_N == expert
        typical, borderline = _choose(sample, in_part_N)
        images = _thumbnails(partition, expert, sample.ids_N16[[*typical, *borderline]])
        part: Part = {
            "expert": expert,
            "sizes": {split: partition.payload["sizes"][split][expert] for split in SPLITS},  # type: ignore[typeddict-item]
            "mean_distance": partition.payload["mean_distance"][expert],
            "distances": count_part_distances(sample.distance_N[in_part_N], overall) if overall else None,
            "tags": _characteristic_tags(sample.tag_counts(in_part_N, len(names)), overall_V, in_part_N, names),
            "typical": [_exemplar(sample, row, images, names) for row in typical],
            "borderline": [_borderline(sample, row, images, names) for row in borderline],
        }
        if "extra" in partition.payload:
            part["extra"] = sum(counts[expert] for counts in partition.payload["extra"].values())
        parts.append(part)
    return parts


def _choose(sample: _Sample, in_part_N: NDArray[np.bool_]) -> tuple[list[int], list[int]]:
    """Rows of the images nearest to the centroid, and of those almost as near to another one."""
    rows = np.flatnonzero(in_part_N)
    by_id = rows[np.argsort(sortable(sample.ids_N16[rows]))]  # ties are broken by id, so the page does not depend on the sharding
    typical = by_id[np.argsort(sample.distance_N[by_id], kind="stable")][:NUM_TYPICAL]
    bordering = by_id[sample.second_N[by_id] >= 0]
    # Of balanced parts some images are nearer to another centroid, and those that are so by far lie on no border.
    gap = np.abs(sample.second_distance_N[bordering] - sample.distance_N[bordering])
    return typical.tolist(), bordering[np.argsort(gap, kind="stable")][:NUM_BORDERLINE].tolist()


def _characteristic_tags(
    counts_V: NDArray[np.int64], overall_V: NDArray[np.int64], in_part_N: NDArray[np.bool_], names: Sequence[str]
) -> list[TagLift]:
    """Tags whose share in the part most exceeds their share overall; rare ones, whose lift is chance, are left out."""
    size = int(in_part_N.sum())
    frequent = np.flatnonzero(counts_V >= max(_LEAST_COUNT, _LEAST_SHARE * size))
    lift = (counts_V[frequent] / max(1, size)) / (overall_V[frequent] / len(in_part_N))
    best = frequent[np.lexsort((frequent, -lift))][:NUM_TAGS]
    lifts = dict(zip(frequent.tolist(), lift.tolist(), strict=True))
    return [{"tag": names[tag], "count": int(counts_V[tag]), "lift": lifts[tag]} for tag in best.tolist()]


def _thumbnails(partition: InputArtifact, expert: int, ids_n16: NDArray[np.uint8]) -> dict[bytes, str]:
    """Images of these examples as data URIs, by id; of the part's shards only those that hold some of them are read."""
    wanted = {row.tobytes() for row in ids_n16}
    found: dict[bytes, str] = {}
    for path in example_shards(partition, "train", expert):
        if wanted.isdisjoint(_ids(partition, path)):
            continue
        for table in read_examples(partition, [path], columns=["example_id", "image"]):
            ids = table.column("example_id").to_pylist()
            for position in [at for at, identity in enumerate(ids) if identity in wanted]:
                found[ids[position]] = thumbnail_data_uri(table.column("image")[position].as_py(), THUMBNAIL)
    return found


def _ids(partition: InputArtifact, path: str) -> Iterator[bytes]:
    for table in read_examples(partition, [path], columns=["example_id"]):
        yield from table.column("example_id").to_pylist()


def _exemplar(sample: _Sample, row: int, images: dict[bytes, str], names: Sequence[str]) -> Exemplar:
    identity = sample.ids_N16[row].tobytes()
    return {
        "example_id": identity.hex(),
        "tags": [names[tag] for tag in sample.tags_of(row)],
        "image": images[identity],
        "distance": float(sample.distance_N[row]),
    }


def _borderline(sample: _Sample, row: int, images: dict[bytes, str], names: Sequence[str]) -> Exemplar:
    second = float(sample.second_distance_N[row])
    ratio = float(sample.distance_N[row]) / second if second else 1.0
    return {**_exemplar(sample, row, images, names), "second": int(sample.second_N[row]), "ratio": ratio}
