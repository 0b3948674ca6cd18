"""The evaluation stage: every system over the test split, from cached embeddings, in mergeable sums.

One unit per system and shard of its embeddings. Each system's tables are read where they lie, in their own order: sums and
bootstrap weights are functions of the examples, so systems stay paired without ever being joined. Further phases, one unit per
system each, compute `map`, which needs all scores of a tag together, what is near what in the system's space, and its costs.

Shape letters: N examples, D features, V tags, B replicates.
"""

import io
import json
from collections.abc import Callable, Generator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from hardmoe.arrays import load_arrays, save_arrays
from hardmoe.config import Json
from hardmoe.data.reading import labels_of, tag_counts
from hardmoe.errors import DataError
from hardmoe.evaluation.abstention import RESULTS_FILE as ABSTENTION_FILE
from hardmoe.evaluation.average_precision import AveragePrecisionScores, merged
from hardmoe.evaluation.bootstrap import BOOTSTRAP_SEED, interval_result, null_result, paired_result
from hardmoe.evaluation.breakdown import Breakdown, frequency_bands
from hardmoe.evaluation.chosen import build_chosen_scorer
from hardmoe.evaluation.config import EvaluationConfig
from hardmoe.evaluation.costs import cost_of
from hardmoe.evaluation.metrics import METRICS, RankingSums, paired_difference
from hardmoe.evaluation.metrics import Labels as TagRows
from hardmoe.evaluation.probe_work import RESULTS_FILE as PROBED_FILE
from hardmoe.evaluation.retrieval import share_results
from hardmoe.evaluation.scoring import build_scorer
from hardmoe.evaluation.spaces import read_rows, retrieve
from hardmoe.evaluation.stage import ABSTENTION, COMPARED, OWN_IMAGES, SECOND_DATASET
from hardmoe.evaluation.topk import build_topk_scorer, read_topk
from hardmoe.stage import Completion, Context, DriverContext, Finished, Phase, Unit, UnitContext
from hardmoe.storage import Storage
from hardmoe.training.determinism import deterministic

METRICS_FILE, REPLICATES_FILE = "metrics.json", "replicates.npy"
_BATCH = 1024
Scores = NDArray[np.float32]


class EvaluationWork:
    """See the module."""

    def phases(self, context: DriverContext) -> Generator[Phase, list[Completion], Finished]:
        """Sums per system and shard, then `map` per system."""
        config = context.stage.section(EvaluationConfig, "evaluation")
        systems = list(context.stage.config["systems"])
        units = [
            Unit(f"{system}-{index:05d}", {"system": system, "path": path})
            for system in systems
            for index, path in enumerate(context.input(f"{system}:embeddings").files("split=test/"))
        ]
        scored = yield Phase("score", units)
        by_system: dict[str, list[Completion]] = {system: [] for system in systems}
        for unit, done in zip(units, scored, strict=True):
            by_system[unit.arguments["system"]].append(done)
        sums = {system: _merged_sums(context.storage, done) for system, done in by_system.items()}
        _check(sums)
        map_units = [Unit(name, {"parts": [dict(d.scratch) for d in done]}) for name, done in by_system.items()]
        averaged = yield Phase("map", map_units)
        maps = {system: done.payload for system, done in zip(systems, averaged, strict=True)}
        usable = [system for system in systems if "chosen_by" not in context.stage.config["systems"][system]]
        counted = yield Phase("cost", [Unit(system, {"system": system}) for system in usable])
        results = _results(config, sums, maps)
        bands_V = frequency_bands(tag_counts(context.input("vocabulary")))
        results["breakdown"] = {system: _breakdown(context.storage, by_system[system]).results(bands_V) for system in systems}
        results["costs"] = {system: done.payload for system, done in zip(usable, counted, strict=True)}
        if config.retrieval_sample:
            with_space = [system for system in systems if has_one_space(context, system)]
            # All systems were judged on the same examples, so any of them knows how many there are.
            fraction = config.retrieval_sample / float(next(iter(sums.values())).column("examples")[0])
            near = yield Phase("retrieve", [Unit(system, {"system": system, "fraction": fraction}) for system in with_space])
            shares = {system: done.payload for system, done in zip(with_space, near, strict=True)}
            results["retrieval"] = {system: share_results(shares[system], None) for system in with_space}
            results["retrieval_differences"] = {
                f"{COMPARED} - {system}": share_results(shares[system], shares[COMPARED])
                for system in with_space
                if system != COMPARED
            }
        if probed := [role for role in (OWN_IMAGES, SECOND_DATASET) if role in context.stage.inputs]:
            results["transfer"] = {role: _told(context, role, PROBED_FILE) for role in probed}
        if ABSTENTION in context.stage.inputs:
            results["abstention"] = _told(context, ABSTENTION, ABSTENTION_FILE)
        results["replicates"] = {"systems": systems, "metrics": list(METRICS)}
        body = json.dumps(results, indent=1) + "\n"
        files = {METRICS_FILE: body.encode(), REPLICATES_FILE: _replicates([sums[system] for system in systems])}
        return Finished({"num_test_examples": results["num_test_examples"]}, files)

    def run(self, context: UnitContext) -> Json:
        """One shard of one system, or one system's `map`."""
        with deterministic(context.stage.resources.num_cpus, torch.device("cpu")):
            return {"score": _score, "map": _average_precision, "cost": _cost, "retrieve": retrieve}[context.phase](context)


def _told(context: DriverContext, role: str, file: str) -> Json:
    """The results of an input."""
    artifact = context.input(role)
    return json.loads(artifact.storage.read_bytes(artifact.path(file)))


def _score(context: UnitContext) -> Json:
    config = context.stage.section(EvaluationConfig, "evaluation")
    system = context.unit.arguments["system"]
    described = context.stage.config["systems"][system]
    ids_N16, score_rows = _scored_rows(context, system, described)
    shards = context.input(f"{system}:embeddings").files("split=test/")
    near = (shards.index(context.unit.arguments["path"]), len(shards))
    labels = labels_of(context.input("vocabulary"), ids_N16, split="test", near=near)
    bands_V = frequency_bands(tag_counts(context.input("vocabulary")))
    sums: list[RankingSums] = []
    broken_down: list[Breakdown] = []
    kept: list[AveragePrecisionScores] = []
    for start in range(0, len(ids_N16), _BATCH):
        rows = slice(start, min(start + _BATCH, len(ids_N16)))
        some = labels.rows(rows)
        scores_NV = score_rows(rows, some)
        sums.append(RankingSums.from_scores(scores_NV, some, ids_N16[rows], config.bootstrap_replicates, BOOTSTRAP_SEED))
        broken_down.append(Breakdown.of(scores_NV, some, bands_V))
        kept.append(AveragePrecisionScores.from_scores(scores_NV, some, ids_N16[rows]))
        context.progress(rows.stop, len(ids_N16))
    total = sums[0]
    for more in sums[1:]:
        total = total + more
    apart = broken_down[0]
    for more_apart in broken_down[1:]:
        apart = apart + more_apart
    save_arrays(context.scratch("sums"), {"sums": total.sums_RC, "bins": apart.bins_C3, "bands": apart.bands_F2})
    scores = merged(kept)
    save_arrays(context.scratch("scores"), {"ids": scores.ids_N16, "keys": scores.keys_NV, "positives": scores.positives_M2})
    facts = {"num_tags": total.num_tags, "num_unlabelled": total.num_unlabelled, "num_examples": scores.num_examples}
    with context.scratch("facts") as out:
        out.write(json.dumps(facts).encode())
    return facts


def _scored_rows(
    context: UnitContext, system: str, described: Json
) -> tuple[NDArray[np.uint8], Callable[[slice, TagRows], Scores]]:
    """The ids of one shard [N, 16], and what scores some of its rows, given their hashtags: float32 [n, V]."""
    decoders = [context.input(f"{system}:decoder-{index:04d}") for index in range(described["decoders"])]
    if described.get("topk"):
        shard = read_topk(context.input(f"{system}:embeddings"), context.unit.arguments["path"])
        if "chosen_by" in described:
            losses = context.input(f"{system}:losses").payload if described["chosen_by"] == "validation" else None
            chosen = build_chosen_scorer(decoders[0], losses)
            return shard.ids_N16, lambda rows, tags: chosen(shard.features_NkE[rows], shard.experts_Nk[rows], tags)
        mixed = build_topk_scorer(decoders[0], context.input(f"{system}:temperature"))
        return shard.ids_N16, lambda rows, _: mixed(shard.features_NkE[rows], shard.experts_Nk[rows], shard.squared_Nk[rows])
    scorer = build_scorer(decoders, described["shared"])
    ids_N16, features_ND, experts_N = read_rows(context, system, context.unit.arguments["path"])
    return ids_N16, lambda rows, _: scorer(features_ND[rows], experts_N[rows])


def _cost(context: UnitContext) -> Json:
    return cost_of(context, context.unit.arguments["system"])


def has_one_space(context: Context, system: str) -> bool:
    """Whether a system gives an image one vector, which several experts to an image do not."""
    return not context.stage.config["systems"][system].get("topk", False)


def _average_precision(context: UnitContext) -> Json:
    """The value in every row of the bootstrap, or the reason why there is none."""
    config = context.stage.section(EvaluationConfig, "evaluation")
    parts = []
    for paths in context.unit.arguments["parts"]:
        facts = json.loads(context.storage.read_bytes(paths["facts"]))
        arrays = load_arrays(context.storage, paths["scores"])
        part = AveragePrecisionScores(
            arrays["ids"], arrays["keys"], arrays["positives"], facts["num_examples"], facts["num_tags"]
        )
        parts.append(part)
    scores = merged(parts)
    if scores.null_reason is not None:
        return {"reason": scores.null_reason}
    return {"values": scores.values(config.map_replicates, BOOTSTRAP_SEED).tolist()}


def _merged_sums(storage: Storage, completions: Sequence[Completion]) -> RankingSums:
    parts = [
        RankingSums(load_arrays(storage, done.scratch["sums"])["sums"], done.payload["num_tags"], done.payload["num_unlabelled"])
        for done in completions
    ]
    if not parts:
        raise DataError("there are no test examples; raise dataset.test_fraction or correct dataset.split_column")
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _breakdown(storage: Storage, completions: Sequence[Completion]) -> Breakdown:
    arrays = [load_arrays(storage, done.scratch["sums"]) for done in completions]
    bins_C3, bands_F2 = (np.sum([each[name] for each in arrays], axis=0) for name in ("bins", "bands"))
    return Breakdown(bins_C3, bands_F2)


def _replicates(sums: Sequence[RankingSums]) -> bytes:
    """Every ranking metric of every system in every row of the bootstrap, as an array file [systems, metrics, R]: by it runs are
    compared that differ in seed or recipe; their test images weigh the same in each row."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([[total.values(metric) for metric in METRICS] for total in sums]), allow_pickle=False)
    return buffer.getvalue()


def _check(sums: Mapping[str, RankingSums]) -> None:
    """All systems must have been judged on the same examples, and on at least one."""
    counts = {system: int(total.column("examples")[0]) for system, total in sums.items()}
    if len(set(counts.values())) > 1:
        raise DataError(f"the systems were evaluated on different numbers of test examples ({counts}); rebuild their embeddings")
    if 0 in counts.values():
        raise DataError("no test example has a tag of the vocabulary; lower hashtags.min_count or raise dataset.test_fraction")


def _results(config: EvaluationConfig, sums: Mapping[str, RankingSums], maps: Mapping[str, Json]) -> dict[str, Json]:
    systems = {system: {**total.finish(), "map": _map_result(maps[system])} for system, total in sums.items()}
    differences = {}
    for system in sums:
        if system != COMPARED and COMPARED in sums:
            rows = {metric: paired_difference(sums[COMPARED], sums[system], metric) for metric in METRICS}
            differences[f"{COMPARED} - {system}"] = {**rows, "map": _map_difference(maps[COMPARED], maps[system])}
    first = next(iter(sums.values()))
    return {
        "systems": systems,
        "differences": differences,
        "num_test_examples": int(first.column("examples")[0]),
        "num_unlabelled": first.num_unlabelled,
        "bootstrap_replicates": config.bootstrap_replicates,
    }


def _map_result(found: Json) -> dict[str, Json]:
    return null_result(found["reason"]) if "reason" in found else interval_result(np.array(found["values"]), centred=True)


def _map_difference(a: Json, b: Json) -> dict[str, Json]:
    for found in (a, b):
        if "reason" in found:
            return null_result(found["reason"])
    return paired_result(np.array(a["values"]), np.array(b["values"]), centred=True)
