"""The sweep's work: networks with layers of experts, given other limits, over the test split.

Images go through in batches without the blanks that fill up elsewhere, as with few slots and priority a blank could take an
image's; so the last bits may differ from what the evaluation has of the same network.

Shape letters: N examples, B batch, S side in pixels, D features, V tags.
"""

from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hardmoe.arrays import load_arrays, save_arrays
from hardmoe.config import Json
from hardmoe.data.reading import example_shards, labels_of, open_examples, read_examples
from hardmoe.errors import DataError
from hardmoe.evaluation.bootstrap import BOOTSTRAP_SEED
from hardmoe.evaluation.metrics import RankingSums
from hardmoe.models.flops import measure_backbone
from hardmoe.models.moe.config import MoeConfig
from hardmoe.models.moe.layer import replan
from hardmoe.models.moe.statistics import Usage, observed
from hardmoe.stage import Completion, Context, DriverContext, Finished, Phase, Unit, UnitContext, name_within
from hardmoe.tables import ids_to_array
from hardmoe.training.determinism import deterministic
from hardmoe.training.inference import normalised
from hardmoe.training.network import Architecture, architecture_of, load_network, unit_device
from hardmoe.training.staging import EncodedImage, Staging, inference_batch_size, staged_batches

_COLUMNS = ["example_id", "image"]


class MoeSweepWork:
    """See the module."""

    def phases(self, context: DriverContext) -> Generator[Phase, list[Completion], Finished]:
        """Every shard of every network, as sums."""
        examples, config = context.input("examples"), context.stage.config
        pairs = [
            (network, name_within(examples, path))
            for network in range(config["networks"])
            for path in example_shards(examples, "test", network if config["partitioned"] else None)
        ]
        units = [Unit(f"{index:05d}", {"network": network, "path": path}) for index, (network, path) in enumerate(pairs)]
        done = yield Phase("judge", units)
        if not done:
            raise DataError("there are no test examples; raise dataset.test_fraction or correct dataset.split_column")
        sums = [
            RankingSums(
                load_arrays(context.storage, each.scratch["sums"])["sums"], each.payload["tags"], each.payload["unlabelled"]
            )
            for each in done
        ]
        total = reduce(add, sums)
        by_network: dict[int, list[Mapping[str, Usage]]] = {}
        for (network, _), each in zip(pairs, done, strict=True):
            by_network.setdefault(network, []).append(
                {name: Usage.from_json(told) for name, told in each.payload["layers"].items()}
            )
        metrics = {name: value for name, value in total.finish().items() if name in ("precision@1", "hit@5", "recall@10")}
        return Finished({"metrics": metrics, "usage": _mean_usage(by_network.values()), **_costs(context)})

    def run(self, context: UnitContext) -> Json:
        """One shard through one network."""
        network = context.input(f"network-{context.unit.arguments['network']:04d}")
        seen, model = architecture_of(network), load_network(network)
        moe = changed(seen.moe, context.stage.config["setting"])
        replan(model, **_plan_changes(context.stage.config["setting"]))
        device = unit_device(context)
        model.to(device)
        ids_N16 = _ids(context)
        labels = labels_of(context.input("vocabulary"), ids_N16, split="test")
        replicates: int = context.stage.config["replicates"]
        sums: list[RankingSums] = []
        with deterministic(1, device), observed(model) as usages, torch.inference_mode():
            for rows, images_B3SS in _batches(context, replace(seen, moe=moe), device):
                _, logits_BV = model(normalised(images_B3SS))
                scores_BV = torch.log_softmax(logits_BV.float(), dim=1).cpu().numpy()
                sums.append(RankingSums.from_scores(scores_BV, labels.rows(rows), ids_N16[rows], replicates, BOOTSTRAP_SEED))
        none_BV = np.zeros((0, seen.num_tags), np.float32)
        nothing = RankingSums.from_scores(none_BV, labels.rows(slice(0, 0)), ids_N16[:0], replicates, BOOTSTRAP_SEED)
        total = reduce(add, sums) if sums else nothing
        save_arrays(context.scratch("sums"), {"sums": total.sums_RC})
        layers = {name: usage.to_json() for name, usage in usages.items()}
        return {"tags": total.num_tags, "unlabelled": total.num_unlabelled, "layers": layers}


def changed(moe: MoeConfig, setting: Mapping[str, Any]) -> MoeConfig:
    """A network's layers of experts under a setting."""
    names = {"capacity_factor": "inference_capacity_factor"}
    return moe.model_copy(update={names.get(name, name): value for name, value in setting.items() if value is not None})


def _plan_changes(setting: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value for name, value in changed(MoeConfig(), setting).identity().items() if name in setting or "capacity" in name
    }


def _ids(context: UnitContext) -> NDArray[np.uint8]:
    """Of one shard, in its order, [N, 16]."""
    examples = open_examples(context, "examples")
    tables = read_examples(examples, [examples.path(context.unit.arguments["path"])], columns=["example_id"])
    return np.concatenate([np.zeros((0, 16), np.uint8), *(ids_to_array(table.column("example_id")) for table in tables)])


def _batches(context: UnitContext, seen: Architecture, device: torch.device) -> Iterator[tuple[slice, torch.Tensor]]:
    """Which rows of one shard, in its order, and their images uint8 [B, 3, S, S] on the device, without blanks."""
    examples = open_examples(context, "examples")
    path = examples.path(context.unit.arguments["path"])

    def images() -> Iterator[EncodedImage]:
        for table in read_examples(examples, [path], columns=_COLUMNS):
            ids_n16 = ids_to_array(table.column("example_id"))
            for row, data in zip(ids_n16, table.column("image").to_pylist(), strict=True):
                yield EncodedImage(row.tobytes(), data)

    staging = Staging(seen.image_size, inference_batch_size(seen.image_size, device), 1, device, seen.reduced)
    start = 0
    with closing(staged_batches(images(), staging)) as batches:
        for batch in batches:
            yield slice(start, start + batch.rows), batch.images_B3SS[: batch.rows]
            start += batch.rows


def _mean_usage(networks: Any) -> dict[str, float]:
    """Means over all layers of all networks that saw an image."""
    summaries = []
    for shards in networks:
        for name in shards[0]:
            total = reduce(add, (each[name] for each in shards))
            if total.num_items:
                summaries.append(total.summary())
    return {key: float(np.mean([summary[key] for summary in summaries])) for key in summaries[0]} if summaries else {}


def _costs(context: Context) -> dict[str, int]:
    """Of one image in the first network and its decoder; all are of one architecture."""
    network = context.input("network-0000")
    seen = architecture_of(network)
    moe = changed(seen.moe, context.stage.config["setting"])
    size = measure_backbone(seen.backbone, image_size=seen.image_size, stem=seen.stem, moe=moe)
    decoder: int = (network.payload["num_features"] + 1) * seen.num_tags
    return {"flops": size.flops + 2 * decoder, "routed_flops": size.routed_flops}
