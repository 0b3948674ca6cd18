"""The partition stage: every example to its part, and every part to files of its own.

Two durable steps. `assign` routes one feature shard, writes its assignments and one file of the shard's examples sorted by
expert, a row group each. `merge` reads one part's row groups from all these files, so that an expert later streams only its
own shards; it holds one shard at a time, however large the part is. The parts hold the images themselves even where the
dataset only refers to them: an expert that read its share through references would read the whole source for it. That every
example arrives, exactly once, is checked by count and by an order-free checksum of the ids. Rejected: one small file per
(shard, expert), which is thousands of files where there are many of both, and leaving the examples where they are, which
makes every expert read everything. Where the training parts are to be balanced, `balance_phases` finds out beforehand, before
anything else, who goes where.

Where experts train on examples of other parts as well (`extras`), these copies go the same way beside, to `extra/expert=…`,
and only the experts' training reads them. To draw them one must know how large the parts are, so `count` routes the training
features once before: what one more pass of k-means costs. Rejected: drawing after the parts are merged, which would read every
image a second time.

Shape letters: N examples, P pairs of an example and an expert, D feature dim, K experts.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hardmoe.config import Json
from hardmoe.data.reading import open_examples, read_examples
from hardmoe.data.schemas import ASSIGNMENTS, EXTRA_FOLDER, SPLITS
from hardmoe.hashing import hash_ids
from hardmoe.neighbours.assignment import Assignment
from hardmoe.partitioning.balance_phases import balance_phases, run_balance
from hardmoe.partitioning.balance_placement import Balanced, place_shard, summarise
from hardmoe.partitioning.extras import ExtraCopies, chances_to_be_drawn, extra_copies, overlaps
from hardmoe.partitioning.fit import read_features
from hardmoe.partitioning.given import aligned_parts, read_parts
from hardmoe.partitioning.parts import Membership, check_complete, merge, merge_unit, write_regrouped
from hardmoe.partitioning.router import CENTROIDS_FILE, DESCRIPTION_FILE, TRANSFORM_FILE, Router
from hardmoe.stage import Completion, DriverContext, Finished, InputArtifact, Phase, Unit, UnitContext, name_within
from hardmoe.tables import build_table, ids_from_array, write_table

_PRIMARY, _EXTRA = "regrouped", "extra"
"""Scratch files of a shard: its examples by their own part, and the copies for further experts."""
_KINDS = ("overlap", "out_of_part")
"""Of copies, as the record counts them."""
_DISTANCE_UNIT = 1 << 20


class PartitionWork:
    """See the module."""

    def phases(self, context: DriverContext) -> Generator[Phase, list[Completion], Finished]:
        """Assign every shard, then merge every part."""
        config: Json = context.stage.config["partition"]
        balanced: Balanced | None = None
        features = context.input("features")
        shards = [(split, path) for split in SPLITS for path in features.files(f"split={split}/")]
        units = [
            Unit(f"{i:05d}", {"path": name_within(features, path), "split": split, "index": i, "of": len(shards)})
            for i, (split, path) in enumerate(shards)
        ]
        training = [unit for unit in units if unit.arguments["split"] == "train"]
        if config["method"] == "balanced":
            balanced = yield from balance_phases(context, load_router(context.input("router")), training)
            units = [_told(unit, plan=balanced.path) for unit in units]
            training = [_told(unit, plan=balanced.path) for unit in training]
        if "out_of_part_fraction" in config:
            counted = yield Phase("count", training)
            units = [_told(unit, chances=_chances(config, counted)) for unit in units]
        assigned = yield Phase("assign", units)
        merges = [_merge_unit(split, expert, units, assigned) for split in SPLITS for expert in range(config["experts"])]
        merges = [unit for unit in merges if unit.arguments["rows"]]
        extras = [_extra_unit(expert, assigned) for expert in range(config["experts"])]
        extras = [unit for unit in extras if unit.arguments["rows"]]
        merged = yield Phase("merge", [*merges, *extras])
        where = context.storage.where(context.stage.name)
        check_complete(where, [done.payload for done in assigned], merged[: len(merges)])
        check_complete(where, _extra_payloads(assigned), merged[len(merges) :])
        summary = _summary(config, units, assigned)
        if balanced is not None:
            tallies = [done.payload["balance"] for done in assigned if "balance" in done.payload]
            summary["balance"] = summarise(balanced, tallies, summary["sizes"]["train"])
        return Finished(summary)

    def run(self, context: UnitContext) -> Json:
        """One feature shard, or one part of one split."""
        if context.phase.startswith("balance"):
            return run_balance(context, load_router(context.input("router")))
        if context.phase == "count":
            return _count(context)
        return _assign(context) if context.phase == "assign" else merge(context)


def load_router(router: InputArtifact) -> Router:
    """The fitted router."""
    names = (CENTROIDS_FILE, TRANSFORM_FILE, DESCRIPTION_FILE)
    return Router.from_files({name: router.read(name) for name in names})


def _told(unit: Unit, **arguments: Json) -> Unit:
    """The unit, which is told something more."""
    return Unit(unit.name, {**unit.arguments, **arguments})


def _chances(config: Json, counted: Sequence[Completion]) -> list[float]:
    members_K = [sum(counts) for counts in zip(*(done.payload["members"] for done in counted), strict=True)]
    rows = sum(done.payload["rows"] for done in counted)
    return chances_to_be_drawn(config["out_of_part_fraction"], members_K, rows)


def _merge_unit(split: str, expert: int, units: Sequence[Unit], assigned: Sequence[Completion]) -> Unit:
    """What to merge for one part."""
    here = [done for unit, done in zip(units, assigned, strict=True) if unit.arguments["split"] == split]
    regrouped = [(done.scratch[_PRIMARY], done.payload) for done in here]
    return merge_unit(f"{split}-{expert:04d}", f"split={split}/expert={expert:04d}", expert, regrouped)


def _extra_unit(expert: int, assigned: Sequence[Completion]) -> Unit:
    """What to merge of the copies for one expert."""
    regrouped = [(done.scratch[_EXTRA], done.payload[_EXTRA]) for done in assigned if _EXTRA in done.payload]
    return merge_unit(f"extra-{expert:04d}", f"{EXTRA_FOLDER}/expert={expert:04d}", expert, regrouped)


def _extra_payloads(assigned: Sequence[Completion]) -> list[Json]:
    return [done.payload[_EXTRA] for done in assigned if _EXTRA in done.payload]


def _summary(config: Json, units: Sequence[Unit], assigned: Sequence[Completion]) -> Json:
    experts: int = config["experts"]
    sizes = {split: [0] * experts for split in SPLITS}
    distances = [0] * experts
    elsewhere = dict.fromkeys(SPLITS, 0)
    for unit, done in zip(units, assigned, strict=True):
        elsewhere[unit.arguments["split"]] += done.payload["elsewhere"]
        for expert in range(experts):
            sizes[unit.arguments["split"]][expert] += done.payload["counts"][expert]
            if unit.arguments["split"] == "train":
                distances[expert] += done.payload["distance_units"][expert]
    means = [units / _DISTANCE_UNIT / count if count else None for units, count in zip(distances, sizes["train"], strict=True)]
    summary: dict[str, Json] = {"experts": experts, "sizes": sizes, "mean_distance": means}
    if config["method"] == "given":
        summary["routed_elsewhere"] = elsewhere
    if extras := _extra_payloads(assigned):
        summary["extra"] = {kind: [sum(told[kind][e] for told in extras) for e in range(experts)] for kind in _KINDS}
    return summary


@dataclass(frozen=True)
class _Routed:
    """A feature shard whose examples have their parts.

    Attributes:
        ids_N16: example ids, uint8 [N, 16].
        features_ND: in the router's space, float32 [N, D]; [N, 0] where there is no router.
        router: None for a random partition.
        assignment: `primary_N` is the own part, `second_N` the nearest other one (-1: none).
        second_squared_distance_N: to that one's (nearest) centroid, float64 [N]; NaN where there is none.
        elsewhere: examples of given parts that the router would send elsewhere.
        balance: of a balanced training shard, what `balance_placement.summarise` wants to know.
    """

    ids_N16: NDArray[np.uint8]
    features_ND: NDArray[np.float32]
    router: Router | None
    assignment: Assignment
    second_squared_distance_N: NDArray[np.float64]
    elsewhere: int = 0
    balance: Json | None = None

    def overlaps(self, ratio: float | None) -> NDArray[np.bool_]:
        """Which examples train in the second nearest part as well, bool [N]."""
        return overlaps(self.assignment, self.second_squared_distance_N, ratio)

    def membership(self) -> Membership:
        """Every example in its own part."""
        rows_N = np.arange(len(self.ids_N16))
        return Membership(rows_N, self.assignment.primary_N, _rooted(self.assignment.squared_distance_N))

    def membership_of(self, copies: ExtraCopies) -> Membership:
        """Copies for further experts, as far from their centroids as they are."""
        squared_P = np.zeros(len(copies.rows_P))
        if self.router is not None:
            squared_P = self.router.squared_distances(self.features_ND, copies.rows_P, copies.experts_P)
        return Membership(copies.rows_P, copies.experts_P, _rooted(squared_P))


def _rooted(squared_N: NDArray[np.float64]) -> NDArray[np.float32]:
    return np.sqrt(squared_N).astype(np.float32)


def _route(context: UnitContext) -> _Routed:
    """Route a shard, or hold its features against the parts that it is given."""
    settings, path = context.stage.config["partition"], context.unit.arguments["path"]
    features = context.input("features")
    pieces = list(read_features(features, features.path(path)))
    ids_N16 = np.concatenate([ids for ids, _ in pieces])
    if settings["method"] == "random":
        hashed_N = hash_ids(ids_N16, context.stage.config["seed"], "random-partition")
        primary_N = (hashed_N % np.uint64(settings["experts"])).astype(np.int32)
        assignment = Assignment(primary_N, np.full(len(ids_N16), -1, np.int32), np.zeros(len(ids_N16)))
        return _Routed(ids_N16, np.zeros((len(ids_N16), 0), np.float32), None, assignment, np.full(len(ids_N16), np.nan))
    router = load_router(context.input("router"))
    transformed = [router.transformed(features) for _, features in pieces]
    found = [router.assign(features) for features in transformed]
    assignment = Assignment(
        np.concatenate([a.primary_N for a in found]),
        np.concatenate([a.second_N for a in found]),
        np.concatenate([a.squared_distance_N for a in found]),
    )
    features_ND = np.concatenate(transformed)
    elsewhere, tally = 0, None
    if settings["method"] == "balanced" and context.unit.arguments["split"] == "train":
        assignment, tally = place_shard(context, router, (ids_N16, features_ND), assignment)
    if settings["method"] == "given":
        parts_N = aligned_parts(path, ids_N16, *read_parts(context.input("dataset"), path))
        elsewhere = int(np.count_nonzero(parts_N != assignment.primary_N))
        assignment = _sent_to(parts_N, assignment, features_ND, router)
    second_N = np.full(len(ids_N16), np.nan)
    if router.num_experts > 1:
        second_N = router.squared_distances(features_ND, np.arange(len(ids_N16)), assignment.second_N)
    return _Routed(ids_N16, features_ND, router, assignment, second_N, elsewhere, tally)


def _sent_to(parts_N: NDArray[np.int32], nearest: Assignment, features_ND: NDArray[np.float32], router: Router) -> Assignment:
    """The assignment to these parts, whatever is nearest; where that is another part, it is the second now."""
    rows = np.flatnonzero(parts_N != nearest.primary_N)
    second_N, squared_N = nearest.second_N.copy(), nearest.squared_distance_N.copy()
    second_N[rows] = nearest.primary_N[rows]
    squared_N[rows] = router.squared_distances(features_ND, rows, parts_N[rows])
    return Assignment(parts_N, second_N, squared_N)


def _count(context: UnitContext) -> Json:
    """How many training examples of a shard every expert has, without any that are drawn from other parts."""
    settings, routed = context.stage.config["partition"], _route(context)
    second_P = routed.assignment.second_N[routed.overlaps(settings.get("overlap"))]
    members = np.concatenate([routed.assignment.primary_N, second_P])
    return {"rows": len(routed.ids_N16), "members": np.bincount(members, minlength=settings["experts"]).tolist()}


def _assign(context: UnitContext) -> Json:
    arguments, settings = context.unit.arguments, context.stage.config["partition"]
    experts: int = settings["experts"]
    routed = _route(context)
    memberships = {_PRIMARY: routed.membership()}
    kinds: dict[str, Json] = {}
    if arguments["split"] == "train" and ("overlap" in settings or "out_of_part_fraction" in settings):
        overlaps_N = routed.overlaps(settings.get("overlap"))
        chances = arguments.get("chances", [])
        copies = extra_copies(routed.ids_N16, routed.assignment, overlaps_N, chances, context.stage.config["seed"])
        memberships[_EXTRA] = routed.membership_of(copies)
        chosen = (copies.experts_P[copies.overlaps_P], copies.experts_P[~copies.overlaps_P])
        kinds = {kind: np.bincount(of, minlength=experts).tolist() for kind, of in zip(_KINDS, chosen, strict=True)}
    _write_assignments(context, routed, memberships)
    dataset = open_examples(context, "dataset")
    rows = read_examples(dataset, [dataset.path(arguments["path"])])
    told = write_regrouped(context, rows, routed.ids_N16, memberships, experts)
    primary_N, distance_N = memberships[_PRIMARY].experts_P, memberships[_PRIMARY].distance_P
    fixed_N = np.rint(distance_N.astype(np.float64) * _DISTANCE_UNIT).astype(np.int64)
    totals = [int(fixed_N[primary_N == expert].sum()) for expert in range(experts)]
    payload = {**told[_PRIMARY], "distance_units": totals, "elsewhere": routed.elsewhere}
    if routed.balance is not None:
        payload["balance"] = routed.balance
    if _EXTRA in told:
        payload[_EXTRA] = {**told[_EXTRA], **kinds}
    return payload


def _write_assignments(context: UnitContext, routed: _Routed, memberships: Mapping[str, Membership]) -> None:
    """A row for every example, then one for every copy of it in a further part, which has no second."""
    arguments = context.unit.arguments
    every = list(memberships.values())
    rows_P = np.concatenate([membership.rows_P for membership in every])
    second_P, second_distance_P = np.full(len(rows_P), -1, np.int32), np.full(len(rows_P), np.nan, np.float32)
    num_rows = len(routed.ids_N16)
    second_P[:num_rows] = routed.assignment.second_N
    second_distance_P[:num_rows] = _rooted(routed.second_squared_distance_N)
    columns = {
        "example_id": ids_from_array(routed.ids_N16[rows_P]),
        "split": pa.array([arguments["split"]] * len(rows_P)),
        "expert": np.concatenate([membership.experts_P for membership in every]).astype(np.int32),
        "distance": np.concatenate([membership.distance_P for membership in every]),
        "second": second_P,
        "second_distance": second_distance_P,
        "primary": np.arange(len(rows_P)) < num_rows,
    }
    name = f"assignments/part-{arguments['index']:05d}-of-{arguments['of']:05d}.parquet"
    write_table(context.output(name), build_table(ASSIGNMENTS, columns))
