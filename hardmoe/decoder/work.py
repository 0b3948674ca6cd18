"""The decoder stage: one unit that fits alignment and decoder over cached embeddings. No expert is run, or even read."""

from collections.abc import Generator

import numpy as np
import safetensors.torch

from hardmoe.config import Json
from hardmoe.data.reading import labels_of
from hardmoe.data.schemas import EMBEDDINGS
from hardmoe.decoder.config import DecoderConfig
from hardmoe.decoder.fit import EmbeddingSet, fit
from hardmoe.models.shared_decoder import DECODER_FILE, SharedDecoder
from hardmoe.stage import Completion, DriverContext, Finished, InputArtifact, Phase, Unit, UnitContext
from hardmoe.tables import ids_to_array, read_table, vectors_to_array
from hardmoe.training.checkpoint import Checkpoints
from hardmoe.training.loop import TrainingSinks
from hardmoe.training.metrics_log import MetricsLog
from hardmoe.training.network import METRICS_FILE, load_weights, progress_teller, unit_device


class DecoderWork:
    """See the module."""

    def phases(self, context: DriverContext) -> Generator[Phase, list[Completion], Finished]:
        """A single unit."""
        (done,) = yield Phase("fit", [Unit(context.stage.name.rpartition("/")[2])])
        return Finished(done.payload)

    def run(self, context: UnitContext) -> Json:
        """Fit."""
        config = context.stage.section(DecoderConfig, "decoder")
        experts, seed = context.stage.config["experts"], context.stage.config["seed"]
        embeddings, vocabulary = context.input("embeddings"), context.input("vocabulary")
        training = load_embeddings(embeddings, vocabulary, "train")
        validation = load_embeddings(embeddings, vocabulary, "validation")
        start = load_weights(context.input("trunk"))
        model = SharedDecoder.initial(
            experts, embeddings.payload["dim"], config.dim, start["decoder.weight"], start["decoder.bias"], seed, config.align
        ).to(unit_device(context))
        log = MetricsLog()
        checkpoints = Checkpoints(context.storage, context.checkpoint_prefix)
        sinks = TrainingSinks(checkpoints, log, progress_teller(context), context.asked_to_stop)
        result = fit(model, training, validation, config, seed, sinks)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        with context.output(DECODER_FILE) as out:
            out.write(safetensors.torch.save(tensors))
        with context.output(METRICS_FILE) as out:
            out.write(log.to_bytes())
        return {
            "experts": experts,
            "num_features": embeddings.payload["dim"],
            "dim": model.dim,
            "num_tags": model.num_tags,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "examples_seen": result.examples_seen,
            "final_loss": result.final_loss,
            "validation_precision@1": result.validation_precision_at_1,
        }


def load_embeddings(embeddings: InputArtifact, vocabulary: InputArtifact, split: str) -> EmbeddingSet:
    """A split's cached embeddings with their labels."""
    tables = [read_table(embeddings.storage, path, EMBEDDINGS) for path in embeddings.files(f"split={split}/")]
    dim: int = embeddings.payload["dim"]
    ids_N16 = np.concatenate([np.zeros((0, 16), np.uint8), *(ids_to_array(t.column("example_id")) for t in tables)])
    vectors_NE = np.concatenate([np.zeros((0, dim), np.float16), *(vectors_to_array(t.column("embedding")) for t in tables)])
    experts_N = np.concatenate([np.zeros(0, np.int32), *(t.column("expert").to_numpy() for t in tables)]).astype(np.int32)
    labels = labels_of(vocabulary, ids_N16, split=split)
    return EmbeddingSet.from_rows(ids_N16, vectors_NE, experts_N, labels.indices_L, labels.offsets)
