"""Which of another run's experts each expert starts from: the one to which that run's gate sends most of the part's images.

A sample of every part's training images, drawn by hash, goes through the other run's trunk to the nearest of its centroids; the
part starts from the expert that gets most, of equal ones from that with the lowest number. So the two runs need not have the same
trunk, number of parts or features. Rejected: the distance between the two routers' centroids, which means something only
within one trunk's space, and refreshed data have a trunk of their own.

Shape letters: n images of a sample, K experts of the other run, D features.
"""

from collections.abc import Generator, Iterator
from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np

from hardmoe.artifacts.other_run import OtherRun
from hardmoe.config import Json
from hardmoe.data.reading import example_shards, read_examples
from hardmoe.hashing import hash_fractions
from hardmoe.partitioning.regroup import load_router
from hardmoe.stage import Completion, DriverContext, Finished, InputArtifact, Phase, Unit, UnitContext
from hardmoe.tables import ids_to_array

if TYPE_CHECKING:
    from hardmoe.training.staging import EncodedImage

SAMPLE = 2048
"""Images of a part, about; a share of one half is then known to 0.02 (two standard deviations)."""


class MatchWork:
    """See the module."""

    def phases(self, context: DriverContext) -> Generator[Phase, list[Completion], Finished]:
        """A unit for every part."""
        sizes: list[int] = context.input("partition").payload["sizes"]["train"]
        units = [Unit(f"part-{part:04d}", {"part": part}, cost=min(size, SAMPLE)) for part, size in enumerate(sizes)]
        done = yield Phase("ask", units)
        images = [each.payload["images"] for each in done]
        # NumPy's argmax takes the first of equals.
        experts = [int(np.argmax(counts)) for counts in images]
        return Finished({"experts": experts, "images": images})

    def run(self, context: UnitContext) -> Json:
        """How many of a part's images the other run's experts would each get."""
        # Not for the driver, which only counts.
        from hardmoe.training.determinism import deterministic
        from hardmoe.training.inference import predict_batches
        from hardmoe.training.network import architecture_of, load_network, unit_device
        from hardmoe.training.staging import Staging, inference_batch_size, staged_batches

        other = OtherRun.open_same(context.stage.operational["root"], context.stage.config["start"])
        seen, router, device = architecture_of(other.trunk), load_router(other.router), unit_device(context)
        staging = Staging(seen.image_size, inference_batch_size(seen.image_size, device), 1, device, seen.reduced)
        images_K = np.zeros(router.num_experts, np.int64)
        backbone = load_network(other.trunk).backbone.to(device)
        images = _sample(context.input("partition"), context.unit.arguments["part"], context.stage.config["seed"])
        with deterministic(1, device), closing(staged_batches(images, staging)) as batches:
            for features_nD in predict_batches(backbone, batches):
                rounded_nD = features_nD.cpu().numpy().astype(np.float16).astype(np.float32)
                images_K += np.bincount(router.route(rounded_nD).primary_N, minlength=len(images_K))
        return {"images": images_K.tolist()}


def _sample(partition: InputArtifact, part: int, seed: int) -> "Iterator[EncodedImage]":
    from hardmoe.training.staging import EncodedImage

    share = SAMPLE / max(1, partition.payload["sizes"]["train"][part])
    for table in read_examples(partition, example_shards(partition, "train", part), columns=["example_id", "image"], rows=64):
        ids_n16 = ids_to_array(table.column("example_id"))
        chosen = np.flatnonzero(hash_fractions(ids_n16, seed, "match") < share)
        for row in chosen.tolist():
            yield EncodedImage(ids_n16[row].tobytes(), table.column("image")[row].as_py())
