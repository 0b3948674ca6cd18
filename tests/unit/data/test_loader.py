"""The examples of one part: decoding, order, batches and targets."""

import hashlib
import io
import re
from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from hardmoe.data.images import load_square
from hardmoe.data.loader import EncodedBatch, ExampleSet
from hardmoe.data.resampling import epoch_order, repeats_in_epoch
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
    assert list(examples.training_batches(examples.schedule(4, 2, seed=0))) == []


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


def test_training_batches_show_every_example_once_an_epoch_with_its_own_pixels_and_labels() -> None:
    collection = Collection(23)
    examples = collection.build(list(range(23)))
    batches = list(examples.training_batches(examples.schedule(batch_size=5, epochs=2, seed=0)))
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


@pytest.mark.parametrize("threshold", [None, 0.9])
@pytest.mark.parametrize("start_step", [0, 1, 4, 5, 6, 7, 9, 10, 13, 50])
def test_training_batches_from_a_step_on_equal_those_of_the_whole(start_step: int, threshold: float | None) -> None:
    examples = Collection(23).build(list(range(23)))
    schedule = examples.schedule(5, 2, seed=1, repeat_threshold=threshold)
    whole = islice(examples.training_batches(schedule), start_step, None)
    rest = examples.training_batches(schedule, start_step)
    for expected, found in zip(whole, rest, strict=True):
        assert torch.equal(expected.images_B3SS, found.images_B3SS)
        assert torch.equal(expected.targets.indices_L, found.targets.indices_L)


def test_training_batches_without_repeats_are_those_of_the_first_release() -> None:
    """A golden digest: a training that repeats nothing must not change by a bit because others may repeat."""
    chance = np.random.default_rng(5)
    ids = chance.integers(0, 256, (37, 16), dtype=np.uint8)
    ids = ids[np.lexsort(ids.T[::-1])]
    pixels = chance.integers(0, 256, (37, 3, 4, 4), dtype=np.uint8)
    labels = [sorted(chance.choice(6, chance.integers(1, 4), replace=False).tolist()) for _ in range(37)]
    offsets = np.cumsum([0, *map(len, labels)])
    indices = np.array([tag for tags in labels for tag in tags], np.int32)
    examples = ExampleSet(ids, pixels, np.arange(37), indices, offsets)
    digest = hashlib.sha256()
    for batch in examples.training_batches(examples.schedule(8, 3, seed=11)):
        for tensor in (batch.images_B3SS, batch.targets.rows_L, batch.targets.indices_L, batch.targets.weights_L):
            digest.update(tensor.numpy().tobytes())
    assert digest.hexdigest() == "a69e25de5eb1b1a13b0b3eca2fd69d84d408b2a9edad85209648977a957844f5"


def test_training_batches_with_repeats_show_each_example_as_often_as_its_epoch_says() -> None:
    examples = Collection(60).build(list(range(60))).labelled()
    schedule = examples.schedule(7, 3, seed=2, repeat_threshold=0.9)
    batches = list(examples.training_batches(schedule))
    assert len(batches) == schedule.total_steps
    assert schedule.factors_N is not None
    first = 0
    for epoch, samples in enumerate(schedule.samples_E.tolist()):
        last = first + -(-samples // 7)
        shown = torch.cat([batch.images_B3SS for batch in batches[first:last]]).numpy()
        repeats = repeats_in_epoch(schedule.factors_N, examples.ids_N16, 2, epoch)
        expected = np.repeat(examples.images_at(np.arange(len(examples))), repeats, axis=0)
        assert sorted(image.tobytes() for image in shown) == sorted(image.tobytes() for image in expected)
        assert repeats.max() > 1
        first = last


def shown_times(examples: ExampleSet, epochs: int, threshold: float | None = None) -> list[dict[bytes, int]]:
    """How often each epoch's batches show the pixels of every example."""
    schedule = examples.schedule(7, epochs, seed=2, repeat_threshold=threshold)
    batches = [batch.images_B3SS.numpy() for batch in examples.training_batches(schedule)]
    assert len(batches) == schedule.total_steps
    shown = [Counter[bytes]() for _ in range(epochs)]
    for step, images in enumerate(batches):
        shown[schedule.place(step)[0]].update(image.tobytes() for image in images)
    assert [counts.total() for counts in shown] == schedule.samples_E.tolist()
    return [dict(counts) for counts in shown]


def test_examples_to_be_shown_several_times_are_shown_exactly_so_often_in_every_epoch() -> None:
    examples = Collection(60).build(list(range(60)))
    times = np.random.default_rng(3).integers(1, 4, 60)
    expected = {examples.images_at(np.array([at]))[0].tobytes(): int(count) for at, count in enumerate(times)}
    assert shown_times(examples.shown(times), epochs=3) == [expected] * 3
    kept = np.arange(0, 60, 3)
    some = {examples.images_at(np.array([at]))[0].tobytes(): int(times[at]) for at in kept}
    assert shown_times(examples.shown(times).take(kept), epochs=2) == [some] * 2


def test_examples_shown_several_times_are_repeated_for_rare_tags_on_top_of_that() -> None:
    examples = Collection(60).build(list(range(60))).labelled()
    plain = examples.schedule(7, 3, seed=2, repeat_threshold=0.9)
    twice = examples.shown(np.full(len(examples), 2)).schedule(7, 3, seed=2, repeat_threshold=0.9)
    assert plain.factors_N is not None and twice.factors_N is not None
    np.testing.assert_array_equal(twice.factors_N, 2 * plain.factors_N)


def test_examples_shown_once_each_are_the_ones_that_nothing_was_said_of() -> None:
    """The batches, and so the bytes of a training, must not depend on who asks."""
    examples = Collection(23).build(list(range(23)))
    again = examples.shown(np.ones(23, np.int64))
    assert again.times_N is None
    assert again.schedule(5, 2, seed=1).factors_N is None


@pytest.mark.parametrize(
    ("budget", "epochs"), [(0, [0]), (3, [3]), (23, [23]), (24, [23, 1]), (46, [23, 23]), (60, [23, 23, 14])]
)
def test_budget_of_samples_is_met_exactly_by_whole_epochs_and_the_beginning_of_another(budget: int, epochs: list[int]) -> None:
    images = Collection(23).build(list(range(23)))
    limited = replace(images, budget=budget)
    schedule = limited.schedule(5, 2, 0)
    assert schedule.samples_E.tolist() == epochs
    assert schedule.samples_before(schedule.total_steps) == budget
    shown = list(schedule.batches(0))
    assert sum(map(len, shown)) == budget
    order = [position for positions in images.schedule(5, 3, 0).batches(0) for position in positions]
    assert [position for positions in shown for position in positions] == order[:budget]
    assert schedule.ends_epoch(schedule.total_steps) == (budget > 0)
    assert limited.labelled().budget == budget


def test_budget_of_samples_is_refused_where_an_epoch_repeats_examples() -> None:
    with pytest.raises(ValueError, match="each once"):
        replace(Collection(5).build(list(range(5))).shown(np.full(5, 2)), budget=7).schedule(2, 1, 0)


def test_reduced_decoding_is_asked_of_the_decoder() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG")
    batch = EncodedBatch.from_lists(random_ids(1), [buffer.getvalue()], [[0]])
    found = [
        ExampleSet.from_stream([batch], image_size=16, max_pixels=1 << 20, reduced=reduced).images_at(np.arange(1))[0]
        for reduced in (False, True)
    ]
    for reduced, image in zip((False, True), found, strict=True):
        assert np.array_equal(image, load_square(buffer.getvalue(), 16, 1 << 20, reduced=reduced))
    assert not np.array_equal(*found)


def test_sequential_images_are_all_images_in_order_of_ids() -> None:
    collection = Collection(11)
    pieces = list(collection.build(list(range(11))).sequential_images(4))
    assert [len(piece) for piece in pieces] == [4, 4, 3]
    assert np.array_equal(np.concatenate(pieces), collection.pixels[collection.by_id])
