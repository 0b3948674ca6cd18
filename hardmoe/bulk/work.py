"""The code of the bulk stages: a unit per shard of the source.

A worker opens a mixture once and keeps it, so that experts stay in memory from unit to unit as far as the budget lets them.
Rejected: a unit per expert, which needs all images put by in the root before the first tag is known.
"""

from collections import Counter
from collections.abc import Generator
from contextlib import ExitStack
from functools import lru_cache

import numpy as np

from hardmoe.bulk.answers import Decoding, answer
from hardmoe.bulk.writing import write_bad, write_embeddings, write_predictions
from hardmoe.config import Json
from hardmoe.data.config import DatasetConfig
from hardmoe.data.inventory import take_inventory
from hardmoe.data.isolation import IsolatedDecoder
from hardmoe.data.sources.base import SourceShard
from hardmoe.data.sources.registry import open_source
from hardmoe.errors import DataError
from hardmoe.mixture import Mixture, UseOptions
from hardmoe.stage import Completion, Context, DriverContext, Finished, Phase, Unit, UnitContext
from hardmoe.storage import Storage
from hardmoe.training.determinism import deterministic

_REASONS = 20


class BulkWork:
    """See the module."""

    def phases(self, context: DriverContext) -> Generator[Phase, list[Completion], Finished]:
        """Every shard."""
        shards = open_source(_config(context)).shards()
        units = [
            Unit(f"{i:05d}", {"shard": {"name": each.name, "items": each.items}, "index": i, "of": len(shards)}, can_isolate=True)
            for i, each in enumerate(shards)
        ]
        done = yield Phase("answer", units)
        _check_source(context)
        reasons: Counter[str] = Counter()
        experts: Counter[str] = Counter()
        for each in done:
            reasons.update(each.payload["reasons"])
            experts.update(each.payload["experts"])
        rows = sum(each.payload["rows"] for each in done)
        told = dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))[:_REASONS])
        return Finished(
            {
                "rows": rows,
                "quarantined": reasons.total(),
                "quarantine_reasons": told,
                "experts": {name: experts[name] for name in sorted(experts, key=int)},
            }
        )

    def run(self, context: UnitContext) -> Json:
        """One shard."""
        arguments, config, asked = context.unit.arguments, _config(context), context.stage.config["asked"]
        shard = SourceShard(arguments["shard"]["name"], arguments["shard"]["items"])
        mixture, kind, threads = _mixture_of(context), asked["format"], context.stage.resources.num_cpus
        with ExitStack() as stack:
            stack.enter_context(deterministic(threads, mixture.device))
            check = stack.enter_context(IsolatedDecoder(config.max_pixels)) if context.is_isolated else None
            decoding = Decoding(config.max_pixels, threads if check is None else 1, check)

            def tell(done: int) -> None:
                context.progress(done, max(done + 1, config.shard_rows))

            answers = answer(mixture, open_source(config).read(shard), decoding, tell)
            name = f"part-{arguments['index']:05d}-of-{arguments['of']:05d}.{kind}"
            if "k" in asked:
                write_predictions(context.output(name), mixture, answers, asked["k"], kind)
            else:
                write_embeddings(context.output(name), answers, kind)
            if answers.bad:
                write_bad(context.output(f"quarantine/{name}"), answers.bad, kind)
        experts, counts = np.unique(answers.experts_N, return_counts=True)
        return {
            "rows": len(answers.uris),
            "reasons": dict(sorted(Counter(row.reason.partition("(")[0].strip() for row in answers.bad).items())),
            "experts": {str(expert): count for expert, count in zip(experts.tolist(), counts.tolist(), strict=True)},
        }


def _config(context: Context) -> DatasetConfig:
    return context.stage.section(DatasetConfig, "dataset")


def source_digest(config: DatasetConfig, storage: Storage, name: str) -> str:
    """The identity of a source's files; their digests are remembered in the output's root, beside the artifact of that name."""
    return take_inventory(open_source(config).files(), storage, f"{name}/_progress/inventory.json").digest()


def _check_source(context: Context) -> None:
    """The files must still be those that were asked about.

    Raises:
        DataError: some were written to, added or removed meanwhile.
    """
    if source_digest(_config(context), context.storage, context.stage.name) != context.stage.config["source"]["sha256"]:
        raise DataError("images changed, appeared or vanished while they were read; run again with another --out")


def _mixture_of(context: UnitContext) -> Mixture:
    operational, coverage = context.stage.operational, context.stage.config["asked"].get("coverage")
    mixture = _open(operational["root"], operational["memory_gib"], context.use_gpu, coverage)
    if mixture.identity() != context.stage.config["mixture"]:
        _open.cache_clear()
        raise DataError(
            f"the mixture in {context.stage.operational['root']} was built anew meanwhile; run again with another --out"
        )
    return mixture


@lru_cache(maxsize=1)
def _open(root: str, memory_gib: float | None, use_gpu: bool, coverage: float | None) -> Mixture:
    return Mixture.load(root, UseOptions(device="cuda" if use_gpu else "cpu", memory_gib=memory_gib, coverage=coverage))
