"""What an evaluation needs of the splits, refused where it is first known and not after the experts were trained.

Validation examples are another matter: nothing stands or falls with them, and a recipe may ask for none.
"""

from collections.abc import Mapping

from hardmoe.data.config import DatasetConfig, HashtagsConfig
from hardmoe.errors import DataError


def check_test_examples(config: DatasetConfig, sizes: Mapping[str, int]) -> None:
    """Refuse a dataset without test examples.

    Raises:
        DataError: it has none; says how to get some.
    """
    if sizes["test"]:
        return
    total = sum(sizes.values())
    if config.split_column is not None:
        raise DataError(
            f"none of the {total} examples is a test example, and the evaluation needs some; write 'test' into more rows of "
            f"dataset.split_column ({config.split_column!r}), or leave it out"
        )
    raise DataError(
        f"none of the {total} examples is a test example, and the evaluation needs some; raise dataset.test_fraction "
        f"({config.test_fraction:g}), or add images"
    )


def check_test_labels(config: HashtagsConfig, labelled: Mapping[str, int]) -> None:
    """Refuse a vocabulary that no test example has a hashtag of.

    Raises:
        DataError: so it is; says what to change.
    """
    if not labelled["test"]:
        raise DataError(
            "no test example has a hashtag of the vocabulary, and the evaluation needs some; lower hashtags.min_count "
            f"({config.min_count}), or raise dataset.test_fraction or add images"
        )
