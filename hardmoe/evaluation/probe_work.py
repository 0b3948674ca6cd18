"""The probe stage: what a linear probe and the nearest neighbours make of every system's space, by one collection's own tags.

It runs over this run's images (`evaluation.probe`) and over a second, labelled dataset that no network was trained on
(`evaluation.transfer`), with the same code. Every system's probe sees the same training images, is chosen on the same validation
images and judged on all test images, with the metrics and the bootstrap weights of the evaluation, so differences are paired.

    sample      per system and shard: its part of the training and validation samples, in the system's space
    fit         per system: the probe and the number of neighbours, chosen on validation
    score       per system and test shard: mergeable sums
    retrieve    per system, of a second dataset only: its neighbours among the test images; the evaluation has the run's own

Shape letters: N images, D dims, V tags.
"""

import json
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hardmoe.arrays import load_arrays, save_arrays
from hardmoe.config import Json
from hardmoe.data.reading import Labels, labels_of, num_tags
from hardmoe.evaluation.bootstrap import BOOTSTRAP_SEED, null_result
from hardmoe.evaluation.config import EvaluationConfig
from hardmoe.evaluation.metrics import METRICS, RankingSums, paired_difference
from hardmoe.evaluation.probe import Images, LinearProbe, Standardized, Voters, fit_linear_probe
from hardmoe.evaluation.retrieval import share_results
from hardmoe.evaluation.spaces import aligned, read_rows, retrieve, sampled_rows
from hardmoe.evaluation.stage import COMPARED
from hardmoe.stage import Completion, DriverContext, Finished, Phase, Unit, UnitContext
from hardmoe.storage import Storage
from hardmoe.training.determinism import deterministic

RESULTS_FILE = "results.json"
PROBES = ("linear", "knn")
_FITTED_ON = ("train", "validation")
_BATCH = 256
Sums = dict[str, RankingSums]


class ProbeWork:
    """See the module."""

    def phases(self, context: DriverContext) -> Generator[Phase, list[Completion], Finished]:
        """Samples, fits, sums."""
        config = context.stage.section(EvaluationConfig, "evaluation")
        systems = list(context.stage.config["systems"])
        labelled: dict[str, int] = context.input("vocabulary").payload["labelled"]
        units = [
            Unit(f"{split}-{system}-{index:05d}", {"system": system, "path": path, "split": split, "fraction": fraction})
            for split in _FITTED_ON
            for fraction in [config.probe_sample / max(1, labelled[split])]
            for system in systems
            for index, path in enumerate(context.input(f"{system}:embeddings").files(f"split={split}/"))
        ]
        sampled = yield Phase("sample", units)
        parts: dict[str, dict[str, list[str]]] = {system: {split: [] for split in _FITTED_ON} for system in systems}
        for unit, done in zip(units, sampled, strict=True):
            parts[unit.arguments["system"]][unit.arguments["split"]].append(done.scratch["rows"])
        fitted = yield Phase("fit", [Unit(system, {"system": system, **parts[system]}) for system in systems])
        told = {system: done.payload for system, done in zip(systems, fitted, strict=True)}
        probes = {system: dict(done.scratch) for system, done in zip(systems, fitted, strict=True) if "probe" in done.scratch}
        units = [
            Unit(f"{system}-{index:05d}", {"system": system, "path": path, "probe": probes[system]["probe"], **parts[system]})
            for system in probes
            for index, path in enumerate(context.input(f"{system}:embeddings").files("split=test/"))
        ]
        scored = yield Phase("score", units)
        by_system: dict[str, list[Completion]] = {system: [] for system in probes}
        for unit, done in zip(units, scored, strict=True):
            by_system[unit.arguments["system"]].append(done)
        sums = {system: _merged(context.storage, done) for system, done in by_system.items()}
        results = {"images": labelled, "tags": num_tags(context.input("vocabulary")), **_results(told, sums)}
        if context.stage.config["retrieve"]:
            fraction = config.retrieval_sample / max(1, labelled["test"])
            near = yield Phase("retrieve", [Unit(system, {"system": system, "fraction": fraction}) for system in systems])
            _add_neighbours(results, {system: done.payload for system, done in zip(systems, near, strict=True)})
            dataset = context.input("dataset").payload
            results["dataset"] = {key: dataset[key] for key in ("source", "sizes", "quarantined", "quarantine_reasons")}
        body = json.dumps(results, indent=1) + "\n"
        return Finished({"images": labelled}, {RESULTS_FILE: body.encode()})

    def run(self, context: UnitContext) -> Json:
        """One unit of the phase."""
        with deterministic(context.stage.resources.num_cpus, torch.device("cpu")):
            return {"sample": _sample, "fit": _fit, "score": _score, "retrieve": retrieve}[context.phase](context)


def _sample(context: UnitContext) -> Json:
    arguments = context.unit.arguments
    system, split = arguments["system"], arguments["split"]
    ids_N16, features_ND, experts_N = sampled_rows(context, system, arguments["path"], arguments["fraction"], "probe")
    labels = labels_of(context.input("vocabulary"), ids_N16, split=split)
    rows = Images.of(ids_N16, aligned(context, system, features_ND, experts_N), labels)
    arrays: dict[str, NDArray[Any]] = {
        "ids": rows.ids_N16,
        "vectors": rows.vectors_ND,
        "tags": rows.labels.indices_L,
        "offsets": rows.labels.offsets,
    }
    save_arrays(context.scratch("rows"), arrays)
    return {"rows": len(rows)}


def _read_sample(storage: Storage, paths: Sequence[str]) -> Images:
    """The images of several shards' samples, at least one shard's."""
    arrays = [load_arrays(storage, path) for path in paths]
    ids_N16, vectors_ND, indices_L = (np.concatenate([each[name] for each in arrays]) for name in ("ids", "vectors", "tags"))
    lengths_N = np.concatenate([np.diff(each["offsets"]) for each in arrays])
    return Images.of(ids_N16, vectors_ND, Labels(indices_L, np.concatenate([[0], np.cumsum(lengths_N)]).astype(np.int64)))


def _fit(context: UnitContext) -> Json:
    """What was chosen; or the reason why nothing can be."""
    arguments = context.unit.arguments
    if not arguments["train"] or not arguments["validation"]:
        return {"reason": f"no {'validation' if arguments['train'] else 'training'} image to fit a probe by"}
    train, validation = (_read_sample(context.storage, arguments[split]) for split in _FITTED_ON)
    if not len(train) or not len(validation):
        return {"reason": f"no {'validation' if len(train) else 'training'} image of the sample has a tag"}
    try:
        chosen = fit_linear_probe(train, validation)
    except ValueError as error:
        return {"reason": str(error)}
    neighbours, precision = Voters(train, num_tags(context.input("vocabulary"))).choose(validation)
    probe = chosen.probe
    save_arrays(
        context.scratch("probe"),
        {
            "mean": probe.standardized.mean_D,
            "scale": probe.standardized.scale_D,
            "tags": probe.tags_T,
            "weight": probe.weight_TF,
            "neighbours": np.array([neighbours]),
        },
    )
    return {
        "train": len(train),
        "validation": len(validation),
        "dim": train.vectors_ND.shape[1],
        "penalty": chosen.penalty,
        "validation_loss": chosen.validation_loss,
        "converged": chosen.converged,
        "neighbours": neighbours,
        "validation_precision@1": precision,
    }


def _score(context: UnitContext) -> Json:
    """The sums of one test shard, by both probes."""
    config, arguments = context.stage.section(EvaluationConfig, "evaluation"), context.unit.arguments
    system, vocabulary = arguments["system"], context.input("vocabulary")
    count = num_tags(vocabulary)
    arrays = load_arrays(context.storage, arguments["probe"])
    linear = LinearProbe(Standardized(arrays["mean"], arrays["scale"]), arrays["tags"], arrays["weight"])
    voters = Voters(_read_sample(context.storage, arguments["train"]), count)
    ids_N16, features_ND, experts_N = read_rows(context, system, arguments["path"])
    vectors_ND = aligned(context, system, features_ND, experts_N)
    labels = labels_of(vocabulary, ids_N16, split="test")
    sums: dict[str, list[RankingSums]] = {probe: [] for probe in PROBES}
    for start in range(0, max(1, len(ids_N16)), _BATCH):
        rows = slice(start, min(start + _BATCH, len(ids_N16)))
        said = {
            "linear": linear.scores(vectors_ND[rows], count),
            "knn": voters.scores(vectors_ND[rows], [int(arrays["neighbours"][0])])[0],
        }
        for probe, scores_NV in said.items():
            some = RankingSums.from_scores(
                scores_NV, labels.rows(rows), ids_N16[rows], config.bootstrap_replicates, BOOTSTRAP_SEED
            )
            sums[probe].append(some)
        context.progress(rows.stop, len(ids_N16))
    totals = {probe: _total(parts) for probe, parts in sums.items()}
    save_arrays(context.scratch("sums"), {probe: total.sums_RC for probe, total in totals.items()})
    return {"num_tags": count, "num_unlabelled": totals["linear"].num_unlabelled}


def _total(parts: Sequence[RankingSums]) -> RankingSums:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _merged(storage: Storage, completions: Sequence[Completion]) -> Sums:
    """The sums over all test shards, by probe."""
    arrays: list[dict[str, NDArray[Any]]] = [load_arrays(storage, done.scratch["sums"]) for done in completions]
    told = [done.payload for done in completions]
    return {
        probe: _total(
            [RankingSums(each[probe], of["num_tags"], of["num_unlabelled"]) for each, of in zip(arrays, told, strict=True)]
        )
        for probe in PROBES
    }


def _results(told: dict[str, Json], sums: dict[str, Sums]) -> dict[str, Json]:
    """Metrics of every system by both probes, and those of the mixture minus every other one's."""
    systems: dict[str, Json] = {}
    for system, fitted in told.items():
        found: dict[str, Json] = {"fitted": fitted}
        for probe in PROBES:
            nothing = {metric: null_result(fitted["reason"]) for metric in METRICS} if "reason" in fitted else {}
            found[probe] = nothing or sums[system][probe].finish()
        systems[system] = found
    differences = {
        f"{COMPARED} - {system}": {
            probe: {metric: paired_difference(sums[COMPARED][probe], sums[system][probe], metric) for metric in METRICS}
            for probe in PROBES
        }
        for system in sums
        if system != COMPARED and COMPARED in sums
    }
    return {"systems": systems, "differences": differences}


def _add_neighbours(results: dict[str, Json], shares: dict[str, Json]) -> None:
    """Put the shares of right neighbours beside the probes' metrics."""
    for system, of in shares.items():
        results["systems"][system]["neighbours"] = share_results(of, None)
        if system != COMPARED:
            pair = results["differences"].setdefault(f"{COMPARED} - {system}", {})
            pair["neighbours"] = share_results(of, shares[COMPARED])
