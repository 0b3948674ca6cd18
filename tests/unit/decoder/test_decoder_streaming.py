"""Embeddings on disk: the same batches, the same fit, in less memory."""

import json
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from embedding_rows import embedding_rows
from memory import run_measured

from hardmoe.decoder.config import DecoderConfig
from hardmoe.decoder.embeddings import EmbeddingSet
from hardmoe.decoder.fit import fit, fit_seed
from hardmoe.decoder.streaming import SpilledEmbeddings, example_bytes, num_buckets_for
from hardmoe.errors import StorageError
from hardmoe.models.shared_decoder import SharedDecoder
from hardmoe.storage import LocalStorage
from hardmoe.training.checkpoint import Checkpoints
from hardmoe.training.metrics_log import MetricsLog
from hardmoe.training.reporting import TrainingSinks

K, E, V, N = 3, 6, 8, 101


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def examples_in_memory(seed: int = 0) -> EmbeddingSet:
    return EmbeddingSet.from_rows(*embedding_rows(N, E, V, seed))


@pytest.fixture
def spilled():
    with ExitStack() as stack:

        def spill(examples: EmbeddingSet, folder, num_buckets: int = 5, seed: int = 4, size: int = 17) -> SpilledEmbeddings:
            pieces = (examples.take(np.arange(at, min(at + size, len(examples)))) for at in range(0, len(examples), size))
            streamed = SpilledEmbeddings(pieces, E, num_buckets, folder, seed)
            stack.callback(streamed.close)
            return streamed

        yield spill


def assert_same(found, expected) -> None:
    found, expected = list(found), list(expected)
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        for name in ("ids_N16", "embeddings_NE", "experts_N", "label_indices_L", "label_offsets"):
            x, y = getattr(a, name), getattr(b, name)
            assert x.dtype == y.dtype
            assert x.tobytes() == y.tobytes(), name


@pytest.mark.parametrize("num_buckets", [1, 5, 60, 300])
def test_batches_are_those_from_memory(tmp_path, spilled, num_buckets):
    examples = examples_in_memory()
    streamed = spilled(examples, tmp_path, num_buckets)
    assert list(tmp_path.iterdir()) == [], "the scratch file has no name"
    for epoch, batch_size, first in [(0, 10, 0), (0, 10, 7), (1, 200, 0), (3, 1, 50), (3, 33, 3), (0, 12, 0)]:
        assert_same(streamed.batches(4, epoch, batch_size, first), examples.batches(4, epoch, batch_size, first))
    assert list(streamed.batches(4, 0, 10, 11)) == []
    assert len(streamed) == N
    assert streamed.content() == examples.content()
    assert streamed.tag_counts(V + 2).tolist() == examples.tag_counts(V + 2).tolist()


def test_content_is_that_of_the_examples_and_not_of_their_order():
    examples = examples_in_memory()
    order = np.random.default_rng(1).permutation(N)
    assert examples.take(order).content() == examples.content()
    bits, labels = examples.embeddings_NE.view(np.uint16).copy(), examples.label_indices_L.copy()
    bits[-1, -1] ^= 1
    many = np.flatnonzero(np.diff(examples.label_offsets) > 1)[0]
    at = examples.label_offsets[many]
    labels[[at, at + 1]] = labels[[at + 1, at]]
    experts = examples.experts_N.copy()
    experts[[0, np.argmax(experts != experts[0])]] = experts[[np.argmax(experts != experts[0]), 0]]
    changed = [
        EmbeddingSet(
            examples.ids_N16, bits.view(np.float16), examples.experts_N, examples.label_indices_L, examples.label_offsets
        ),
        EmbeddingSet(examples.ids_N16, examples.embeddings_NE, examples.experts_N, labels, examples.label_offsets),
        EmbeddingSet(examples.ids_N16, examples.embeddings_NE, experts, examples.label_indices_L, examples.label_offsets),
        EmbeddingSet(
            examples.ids_N16[::-1], examples.embeddings_NE, examples.experts_N, examples.label_indices_L, examples.label_offsets
        ),
        examples.take(np.arange(1, N)),
    ]
    assert len({some.content() for some in [examples, *changed]}) == 6


class KilledError(Exception):
    pass


def test_a_fit_begun_in_memory_goes_on_from_disk_with_the_same_bits(tmp_path, spilled):
    training, validation = examples_in_memory(0), examples_in_memory(1)
    config = DecoderConfig(epochs=3, batch_size=12, checkpoint_every_steps=4)
    models = [SharedDecoder.initial(K, E, torch.ones(V, E), torch.zeros(V), 0) for _ in range(3)]
    sinks = [TrainingSinks(Checkpoints(LocalStorage(tmp_path / name), "c"), MetricsLog()) for name in ("whole", "killed")]

    def kill(progress):
        if progress.step == 15:
            raise KilledError

    expected = fit(models[0], training, validation, config, 0, sinks[0])
    with pytest.raises(KilledError):
        fit(models[1], training, validation, config, 0, TrainingSinks(sinks[1].checkpoints, MetricsLog(), kill))
    steps = []
    resumed = TrainingSinks(sinks[1].checkpoints, sinks[1].log, lambda progress: steps.append(progress.step))
    on_disk = spilled(training, tmp_path, seed=fit_seed(0)), spilled(validation, tmp_path, seed=0)
    assert fit(models[2], *on_disk, config, 0, resumed) == expected

    assert steps[0] == 13
    for name, value in models[0].state_dict().items():
        assert torch.equal(models[2].state_dict()[name], value), name
    assert json.loads(sinks[1].log.to_bytes().splitlines()[-1]) == json.loads(sinks[0].log.to_bytes().splitlines()[-1])


def test_an_id_that_occurs_twice_is_refused(tmp_path, spilled):
    examples = examples_in_memory()
    ids = examples.ids_N16.copy()
    ids[70] = ids[3]
    twice = EmbeddingSet(ids, examples.embeddings_NE, examples.experts_N, examples.label_indices_L, examples.label_offsets)
    with pytest.raises(ValueError, match="occurs twice"):
        list(spilled(twice, tmp_path).batches(4, 0, 10))


def test_a_folder_that_cannot_be_written_is_told(tmp_path, spilled):
    with pytest.raises(
        StorageError, match=r"cannot write the embeddings to the scratch folder .*/no: No such .*decoder\.memory_gib"
    ):
        spilled(examples_in_memory(), tmp_path / "no")


_STREAM = """
import sys
import numpy as np
from memory import peak_bytes
from hardmoe.decoder.embeddings import EmbeddingSet
from hardmoe.decoder.streaming import SpilledEmbeddings, num_buckets_for, example_bytes
from pathlib import Path

rows, width, memory = 200_000, 96, 12 << 20

def pieces():
    generator = np.random.default_rng(0)
    for _ in range(rows // 10_000):
        ids = generator.integers(0, 256, (10_000, 16), dtype=np.uint8)
        vectors = generator.integers(0, 1000, (10_000, width)).astype(np.float16)
        numbers = np.zeros(10_000, np.int32)
        yield EmbeddingSet(ids, vectors, numbers, numbers, np.arange(10_001))

for some in pieces():
    some.content()
    break
before = peak_bytes()
streamed = SpilledEmbeddings(pieces(), width, num_buckets_for(rows * example_bytes(width), memory), Path(sys.argv[1]), 0)
served = sum(len(batch) for epoch in (0, 1) for batch in streamed.batches(0, epoch, 512))
assert served == 2 * rows
print(peak_bytes() - before)
"""


def test_memory_does_not_grow_with_the_number_of_examples(tmp_path):
    """Fifty megabytes of examples, 12 MiB for them."""
    result, _ = run_measured(_STREAM, [str(tmp_path)], tmp_path)
    assert result.returncode == 0, result.stderr
    assert 200_000 * example_bytes(96) > 45 << 20
    assert int(result.stdout) < 16 << 20


def test_buckets_are_few_where_all_fits_and_many_where_it_does_not():
    assert num_buckets_for(100, 10_000) == 1
    assert num_buckets_for(10_000, 10_000) == num_buckets_for(100_000, 100_000) > 1
    assert num_buckets_for(10**12, 4 << 30) * ((4 << 30) // 6) >= 10**12
