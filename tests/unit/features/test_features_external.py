"""Where an example's feature belongs: the index of ids against a dictionary."""

import numpy as np

from hardmoe.data.ids import id_words
from hardmoe.features.external import _Index


def test_index_finds_every_id_also_where_many_share_their_first_half() -> None:
    chance = np.random.default_rng(0)
    ids = chance.integers(0, 256, (300, 16), dtype=np.uint8)
    ids[:, :8] = chance.integers(0, 256, (5, 8), dtype=np.uint8)[chance.integers(0, 5, 300)]
    shard, row = chance.integers(0, 9, 300).astype(np.int32), chance.integers(0, 99, 300).astype(np.int32)
    high, low = id_words(ids)
    order = np.lexsort((low, high))
    index = _Index(high[order], low[order], shard[order], row[order])
    known = {ids[place].tobytes(): (int(shard[place]), int(row[place])) for place in range(300)}
    strangers = ids[:40].copy()
    strangers[:, 15] ^= 1
    asked = np.concatenate([ids[chance.permutation(300)[:200]], strangers, chance.integers(0, 256, (9, 16), dtype=np.uint8)])
    position, place = index.find(asked)
    expected = [(number, known[value.tobytes()]) for number, value in enumerate(asked) if value.tobytes() in known]
    found = zip(index.shard[place].tolist(), index.row[place].tolist(), strict=True)
    assert list(zip(position.tolist(), found, strict=True)) == expected
    assert len(expected) < len(asked)
