"""Parts that a column of the dataset gives (`dataset.part_column`): the values there are, and the number of each.

A column holds whole numbers from 0, which are the parts' own, or names, which are numbered in sorted order (by code point, as
Python sorts strings), whether its type is text or not: `07` in a CSV file is part 7. Both in one column are refused, since a
stray `n/a` among numbers would renumber all of them. Rejected: numbers by first appearance, which change with the order of
the files, and taking every column of text for names, where part 10 comes before part 2.
"""

from collections.abc import Iterable, Sequence

from hardmoe.config import Json
from hardmoe.errors import DataError

MOST_PARTS = 10_000
"""A column of more values is of something else, such as the images' names."""
_MOST_DIGITS = 9  # fits int32


def distinct_values(values: Iterable[str]) -> list[str]:
    """The different values of some rows, sorted; one more than `MOST_PARTS` at most."""
    return sorted(set(values))[: MOST_PARTS + 1]


def collect_parts(column: str, found: Iterable[Sequence[str]]) -> Json:
    """What the dataset's record says of its parts: the column, the kind of its values, and all of them by their numbers.

    Args:
        column: `dataset.part_column`.
        found: values as `fields.part_of` makes them, of some rows each.

    Raises:
        DataError: they cannot be parts.
    """
    values = {value for some in found for value in some}
    numbers = {value for value in values if value.isascii() and value.isdecimal()}
    if len(values) > MOST_PARTS:
        raise DataError(f"dataset.part_column {column!r} has more than {MOST_PARTS} different values; name a column of parts")
    if numbers and (names := values - numbers):
        raise DataError(
            f"dataset.part_column {column!r} holds numbers, such as {min(numbers)}, and names, such as {min(names)!r}; "
            "give either numbers or names"
        )
    if not numbers:
        return {"column": column, "kind": "names", "values": sorted(values)}
    ordered = sorted(numbers, key=lambda digits: (len(digits), digits))
    if len(ordered[-1]) > _MOST_DIGITS:
        raise DataError(f"dataset.part_column {column!r} holds {ordered[-1][:80]}; number the parts from 0")
    return {"column": column, "kind": "numbers", "values": ordered}


def numbers_by_value(parts: Json) -> dict[str, int]:
    """The number of every value, from what the record says."""
    if parts["kind"] == "numbers":
        return {value: int(value) for value in parts["values"]}
    return {value: number for number, value in enumerate(parts["values"])}


def check_parts(parts: Json, experts: int) -> None:
    """Whether what the record says is exactly `partition.experts` parts.

    Raises:
        DataError: there are others, or fewer.
    """
    column, values = parts["column"], parts["values"]
    if parts["kind"] == "names":
        if len(values) != experts:
            shown = ", ".join(map(repr, values[:3])) + (", …" if len(values) > 3 else "")
            names = "name" if len(values) == 1 else "different names"
            raise DataError(
                f"dataset.part_column {column!r} has {len(values)} {names} ({shown}), but partition.experts is "
                f"{experts}; set partition.experts: {len(values)}, or correct the column"
            )
        return
    last = int(values[-1])
    if last >= experts:
        raise DataError(
            f"dataset.part_column {column!r} has a part {last}, but partition.experts is {experts}, so the last one is "
            f"{experts - 1}; set partition.experts: {last + 1}, or correct the column"
        )
    if len(values) != experts:
        missing = min(set(range(experts)) - set(map(int, values)))
        raise DataError(
            f"dataset.part_column {column!r} has no example in part {missing}, but partition.experts is {experts}; "
            "number the parts from 0 without a gap, and set partition.experts to how many there are"
        )
