"""Random cached embeddings for tests of the fit, what it minimises and where it reads them from."""

import numpy as np

NUM_EXPERTS = 3


def embedding_rows(num_examples: int, features: int, tags: int, seed: int = 0, fewest_labels: int = 1):
    """What `EmbeddingSet.from_rows` takes: unsorted rows of three experts with up to three labels each."""
    generator = np.random.default_rng(seed)
    labels = [generator.choice(tags, generator.integers(fewest_labels, 4), replace=False) for _ in range(num_examples)]
    return (
        generator.integers(0, 256, (num_examples, 16), dtype=np.uint8),
        generator.normal(size=(num_examples, features)).astype(np.float16),
        generator.integers(0, NUM_EXPERTS, num_examples).astype(np.int32),
        np.concatenate(labels).astype(np.int32),
        np.cumsum([0, *map(len, labels)]).astype(np.int64),
    )
