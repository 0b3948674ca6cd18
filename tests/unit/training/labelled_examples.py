"""Random images of one label each, for trainings of which only the course matters."""

import numpy as np

from hardmoe.data.loader import ExampleSet


def make_examples(num: int, seed: int) -> ExampleSet:
    """Images of 8 pixels with one of five tags."""
    chance = np.random.default_rng(seed)
    ids = chance.integers(0, 256, (num, 16), dtype=np.uint8)
    images = chance.integers(0, 256, (num, 3, 8, 8), dtype=np.uint8)
    return ExampleSet(ids, images, np.arange(num), chance.integers(0, 5, num).astype(np.int32), np.arange(num + 1))
