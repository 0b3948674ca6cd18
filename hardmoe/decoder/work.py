"""The decoder stage: one unit that fits alignment and decoder over cached embeddings. No expert is run, or even read."""

import tempfile
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from hardmoe.config import Json
from hardmoe.data.reading import labels_of, num_tags
from hardmoe.data.schemas import EMBEDDINGS
from hardmoe.decoder.config import DecoderConfig
from hardmoe.decoder.embeddings import EmbeddingSet, ExampleSource
from hardmoe.decoder.fit import fit, fit_seed
from hardmoe.decoder.objective import VALIDATION_SEED
from hardmoe.decoder.streaming import SpilledEmbeddings, example_bytes, num_buckets_for
from hardmoe.models.shared_decoder import DECODER_FILE, DecoderForm, SharedDecoder
from hardmoe.stage import Completion, DriverContext, Finished, InputArtifact, Phase, Unit, UnitContext
from hardmoe.tables import ids_to_array, read_table, vectors_to_array
from hardmoe.training.losses import log_odds_of_shares
from hardmoe.training.network import load_weights, unit_device
from hardmoe.training.unit_sinks import unit_sinks, write_log


class DecoderWork:
    """See the module."""

    def phases(self, context: DriverContext) -> Generator[Phase, list[Completion], Finished]:
        """A single unit."""
        (done,) = yield Phase("fit", [Unit(context.stage.name.rpartition("/")[2])])
        return Finished(done.payload)

    def run(self, context: UnitContext) -> Json:
        """Fit."""
        config = context.stage.section(DecoderConfig, "decoder")
        seed = context.stage.config["seed"]
        embeddings, vocabulary = context.input("embeddings"), context.input("vocabulary")
        with ExitStack() as stack:
            training = open_embeddings(embeddings, vocabulary, "train", config, fit_seed(seed))
            validation = open_embeddings(embeddings, vocabulary, "validation", config, VALIDATION_SEED)
            for examples in (training, validation):
                if isinstance(examples, SpilledEmbeddings):
                    stack.callback(examples.close)
            return self._fit(context, config, training, validation)

    def _fit(self, context: UnitContext, config: DecoderConfig, training: ExampleSource, validation: ExampleSource) -> Json:
        experts, seed = context.stage.config["experts"], context.stage.config["seed"]
        embeddings, start = context.input("embeddings"), load_weights(context.input("trunk"))
        form = DecoderForm(config.align, config.dim, config.rank, config.temperature)
        model = SharedDecoder.initial(
            experts, embeddings.payload["dim"], start["decoder.weight"], start["decoder.bias"], seed, form
        )
        if config.loss == "sigmoid":
            log_odds_V = log_odds_of_shares(training.tag_counts(model.num_tags), len(training))
            model.decoder.bias.data.copy_(torch.from_numpy(log_odds_V))
        model.to(unit_device(context))
        with unit_sinks(context) as sinks:
            result = fit(model, training, validation, config, seed, sinks)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        with context.output(DECODER_FILE) as out:
            out.write(safetensors.torch.save(tensors))
        write_log(context, sinks)
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


def open_embeddings(
    embeddings: InputArtifact, vocabulary: InputArtifact, split: str, config: DecoderConfig, seed: int
) -> EmbeddingSet | SpilledEmbeddings:
    """A split's labelled examples, in memory if the whole artifact fits into `config.memory_gib` twice, else on disk.

    Args:
        embeddings: the artifact.
        vocabulary: where the labels are.
        split: which.
        config: the recipe's section.
        seed: of the epochs that they will be asked for.
    """
    dim: int = embeddings.payload["dim"]
    pieces = _pieces(embeddings, vocabulary, split)
    num_bytes, memory_bytes = embeddings.payload["rows"] * example_bytes(dim), int(config.memory_gib * 2**30)
    # Twice, since the shards and the array that they are joined in are there at once.
    if 2 * num_bytes > memory_bytes:
        buckets = num_buckets_for(num_bytes, memory_bytes)
        return SpilledEmbeddings(pieces, dim, buckets, Path(tempfile.gettempdir()), seed)
    found = EmbeddingSet.joined([EmbeddingSet.empty(dim), *pieces])
    return EmbeddingSet.from_rows(found.ids_N16, found.embeddings_NE, found.experts_N, found.label_indices_L, found.label_offsets)


def _pieces(embeddings: InputArtifact, vocabulary: InputArtifact, split: str) -> Iterator[EmbeddingSet]:
    """A split's labelled examples, shard by shard, checked."""
    shards, tags = embeddings.files(f"split={split}/"), num_tags(vocabulary)
    for index, path in enumerate(shards):
        table = read_table(embeddings.storage, path, EMBEDDINGS)
        ids_N16 = ids_to_array(table.column("example_id"))
        labels = labels_of(vocabulary, ids_N16, split=split, near=(index, len(shards)))
        experts_N = table.column("expert").to_numpy().astype(np.int32)
        vectors_NE = vectors_to_array(table.column("embedding"))
        some = EmbeddingSet(ids_N16, vectors_NE, experts_N, labels.indices_L, labels.offsets)
        yield some.usable(tags, embeddings.payload["experts"])
