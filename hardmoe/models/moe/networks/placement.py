"""Which blocks have experts.

Of transformers both papers count the blocks with an odd index: `last2` is the last two of these, not the last two blocks.
"""

import re
from collections.abc import Sequence

from hardmoe.errors import RecipeError


def transformer_blocks(placement: str, depth: int) -> tuple[int, ...]:
    """Indices of the blocks of `every<n>` (n - 1, 2n - 1, …) or `last<n>` (of those with an odd index).

    Raises:
        RecipeError: there is no such placement, or there are not so many blocks.
    """
    match = re.fullmatch(r"(every|last)([1-9]\d*)", placement)
    blocks: tuple[int, ...] = ()
    if match is not None:
        number, odd = int(match[2]), tuple(range(1, depth, 2))
        blocks = tuple(range(number - 1, depth, number)) if match[1] == "every" else odd[-number:] if number <= len(odd) else ()
    if not blocks:
        raise RecipeError(
            f"moe.placement: '{placement}' names no blocks of a transformer with {depth}; set it to every2, or last2 up to "
            f"last{depth // 2}"
        )
    return blocks


def staged_blocks(placement: str, depths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(stage, block) of a ConvNeXt: `every2` is the odd blocks of each stage, `stage` the last block of each, `last2` the last
    block of the last two stages, `last3` the one in the middle of the third stage besides.

    Raises:
        RecipeError: there is no such placement.
    """
    last = tuple((stage, depth - 1) for stage, depth in enumerate(depths))
    places = {
        "every2": tuple((stage, block) for stage, depth in enumerate(depths) for block in range(1, depth, 2)),
        "stage": last,
        "last2": last[-2:],
        "last3": ((len(depths) - 2, depths[-2] // 2), *last[-2:]),
    }
    if placement not in places:
        raise RecipeError(f"moe.placement: '{placement}' is none of a ConvNeXt; set it to {', '.join(places)}")
    return places[placement]
