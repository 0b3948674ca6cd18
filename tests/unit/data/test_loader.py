"""The examples of one part: decoding, order, batches and targets."""

import io
import re
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from hardmoe.data.loader import EncodedBatch, ExampleSet, batch_slice, epoch_order, num_batches
from hardmoe.errors import DataError, StorageError

SIZE = 4


def random_ids(num: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (num, 16), dtype=np.uint8)


def encode(image_3SS: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image_3SS.transpose(1, 2, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


class Collection:
    """Examples as plain Python, the oracle for what an ExampleSet holds."""

    def __init__(self, num: int, size: int = SIZE) -> None:
        chance = np.random.default_rng(1)
        self.ids = random_ids(num)
        self.pixels = chance.integers(0, 256, (num, 3, size, size), dtype=np.uint8)
        self.labels = [sorted(chance.choice(6, chance.integers(0, 4), replace=False).tolist()) for _ in range(num)]
        self.by_id = sorted(range(num), key=lambda row: self.ids[row].tobytes())

    def stream(self, rows: list[int], piece: int) -> list[EncodedBatch]:
        return [
            EncodedBatch.from_lists(
                self.ids[rows[start : start + piece]],
                [encode(self.pixels[row]) for row in rows[start : start + piece]],
                [self.labels[row] for row in rows[start : start + piece]],
            )
            for start in range(0, len(rows), piece)
        ]

    def build(self, rows: list[int], piece: int = 7, **options: object) -> ExampleSet:
        return ExampleSet.from_stream(self.stream(rows, piece), image_size=SIZE, max_pixels=10_000, **options)


def labels_of(examples: ExampleSet) -> list[list[int]]:
    return [examples.label_indices_L[low:high].tolist() for low, high in pairwise(examples.label_offsets)]


def assert_holds(examples: ExampleSet, collection: Collection, rows: list[int]) -> None:
    assert np.array_equal(examples.ids_N16, collection.ids[rows])
    assert np.array_equal(examples.images_at(np.arange(len(examples))), collection.pixels[rows])
    assert labels_of(examples) == [collection.labels[row] for row in rows]


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("piece", [1, 7, 100])
def test_from_stream_sorts_by_id_whatever_the_order_of_arrival(piece: int, num_threads: int) -> None:
    collection = Collection(40)
    for seed in range(2):
        arrival = np.random.default_rng(seed).permutation(40).tolist()
        assert_holds(collection.build(arrival, piece, num_threads=num_threads), collection, collection.by_id)


def test_from_stream_resizes_to_the_side_asked_for() -> None:
    collection = Collection(3, size=16)
    assert collection.build([0, 1, 2]).images_at(np.arange(3)).shape == (3, 3, SIZE, SIZE)


@pytest.mark.parametrize("limit_images", [1, 13, 64, 139, 140, 200])
def test_from_stream_past_the_memory_limit_pages_from_a_scratch_file_that_leaves_nothing(
    tmp_path: Path, limit_images: int
) -> None:
    collection = Collection(140)
    examples = collection.build(list(range(140)), scratch_path=tmp_path, memory_limit_bytes=limit_images * 3 * SIZE**2)
    assert_holds(examples, collection, collection.by_id)
    assert list(tmp_path.iterdir()) == []
    assert examples.storage_M3SS.flags.writeable == (limit_images >= 140)


def test_from_stream_into_a_missing_scratch_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=re.escape(str(tmp_path / "absent"))):
        Collection(3).build([0, 1, 2], scratch_path=tmp_path / "absent", memory_limit_bytes=1)


def test_from_stream_of_nothing_is_an_empty_set() -> None:
    examples = Collection(1).build([])
    assert len(examples) == len(examples.labelled()) == 0
    assert list(examples.training_batches(4, 2, seed=0)) == []


def test_from_stream_names_the_example_that_cannot_be_decoded() -> None:
    batch = EncodedBatch.from_lists(random_ids(1), [b"no image"], [[0]])
    with pytest.raises(DataError, match=random_ids(1).tobytes().hex()):
        ExampleSet.from_stream([batch], image_size=SIZE, max_pixels=100)


def test_from_stream_refuses_an_id_that_repeats() -> None:
    with pytest.raises(ValueError, match="twice"):
        Collection(3).build([0, 1, 0])


def test_encoded_batch_refuses_pieces_of_different_lengths() -> None:
    with pytest.raises(ValueError, match="2 ids, 1 images"):
        EncodedBatch.from_lists(random_ids(2), [b""], [[], []])


def test_labelled_keeps_exactly_the_examples_with_labels_and_copies_no_pixels() -> None:
    collection = Collection(40)
    examples = collection.build(list(range(40)))
    labelled = examples.labelled()
    assert_holds(labelled, collection, [row for row in collection.by_id if collection.labels[row]])
    assert 0 < len(labelled) < 40
    assert labelled.storage_M3SS is examples.storage_M3SS


@given(st.integers(1, 400), st.integers(1, 64))
def test_batches_of_an_epoch_cover_it_once_in_sizes_that_differ_by_one_at_most(num: int, batch_size: int) -> None:
    slices = [batch_slice(num, batch_size, index) for index in range(num_batches(num, batch_size))]
    sizes = [piece.stop - piece.start for piece in slices]
    assert [position for piece in slices for position in range(piece.start, piece.stop)] == list(range(num))
    assert len(slices) == int(np.ceil(num / batch_size))
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1


def test_epoch_order_is_a_permutation_of_ids_that_no_sharding_changes() -> None:
    ids = random_ids(200)
    order = epoch_order(ids, seed=3, epoch=1)
    assert sorted(order.tolist()) == list(range(200))
    shuffled = np.random.default_rng(0).permutation(200)
    assert np.array_equal(ids[shuffled][epoch_order(ids[shuffled], 3, 1)], ids[order])
    assert not np.array_equal(order, epoch_order(ids, 3, 2))
    assert not np.array_equal(order, epoch_order(ids, 4, 1))


def test_epoch_order_of_a_part_is_the_order_of_the_whole_restricted_to_it() -> None:
    ids = random_ids(60)
    whole = [row for row in epoch_order(ids, 0, 0).tolist() if row < 20]
    assert epoch_order(ids[:20], 0, 0).tolist() == whole


def test_training_batches_show_every_example_once_an_epoch_with_its_own_pixels_and_labels() -> None:
    collection = Collection(23)
    examples = collection.build(list(range(23)))
    batches = list(examples.training_batches(batch_size=5, epochs=2, seed=0))
    assert [len(batch.images_B3SS) for batch in batches[:5]] == [4, 5, 4, 5, 5]
    for epoch in range(2):
        rows = [collection.by_id[position] for position in epoch_order(examples.ids_N16, 0, epoch)]
        here = batches[5 * epoch : 5 * epoch + 5]
        assert np.array_equal(torch.cat([batch.images_B3SS for batch in here]).numpy(), collection.pixels[rows])
        targets = torch.cat([batch.targets.dense(6, torch.device("cpu")) for batch in here]).numpy()
        expected = np.zeros((23, 6))
        for place, row in enumerate(rows):
            expected[place, collection.labels[row]] = 1 / max(1, len(collection.labels[row]))
        np.testing.assert_allclose(targets, expected, rtol=1e-6)


@pytest.mark.parametrize("start_step", [0, 1, 4, 5, 6, 9, 10])
def test_training_batches_from_a_step_on_equal_those_of_the_whole(start_step: int) -> None:
    examples = Collection(23).build(list(range(23)))
    whole = islice(examples.training_batches(5, 2, seed=1), start_step, None)
    rest = examples.training_batches(5, 2, seed=1, start_step=start_step)
    for expected, found in zip(whole, rest, strict=True):
        assert torch.equal(expected.images_B3SS, found.images_B3SS)
        assert torch.equal(expected.targets.indices_L, found.targets.indices_L)


def test_sequential_images_are_all_images_in_order_of_ids() -> None:
    collection = Collection(11)
    pieces = list(collection.build(list(range(11))).sequential_images(4))
    assert [len(piece) for piece in pieces] == [4, 4, 3]
    assert np.array_equal(np.concatenate(pieces), collection.pixels[collection.by_id])
