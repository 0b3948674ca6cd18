"""What is told of finished runs: names that tell them apart, speed and time of several trainings together."""

import pytest

from hardmoe.cli.finished import Training, distinct_names, speed_of, wall_clock

MOMENT = "2026-11-30T12:00:{:02d}+00:00"


def training(seen: int, seconds: float | None, start: int = 0, took: float = 10.0) -> Training:
    return Training(seen, seconds, (MOMENT.format(start), took))


@pytest.mark.parametrize(
    ("places", "names"),
    [
        (["runs/demo"], ["demo"]),
        (["/work/runs/a", "/work/runs/b/"], ["a", "b"]),
        (["a/runs/x", "b/runs/x"], ["a", "b"]),
        (["one/a/x", "two/a/y", "two/b/x"], ["one/a/x", "two/a/y", "two/b/x"]),
        (["s3://bucket/a", "runs/b"], ["a", "b"]),
        (["runs/x/run", "runs/run"], ["x", "runs"]),
    ],
)
def test_names_are_as_short_as_can_be_and_all_different(places: list[str], names: list[str]) -> None:
    assert distinct_names(places) == names


def test_speed_of_several_trainings_is_that_of_one_after_the_other() -> None:
    """A mean of their speeds would let a short fast one count as much as a long slow one."""
    assert speed_of([training(100, 10.0), training(900, 10.0)]) == pytest.approx(50.0)
    assert speed_of([training(100, 10.0), training(900, None)]) is None
    assert speed_of([]) is None


def test_wall_clock_counts_what_overlaps_once_and_pauses_not_at_all() -> None:
    assert wall_clock([training(1, 1.0, 0), training(1, 1.0, 5), training(1, 1.0, 40)]) == pytest.approx(25.0)
    assert wall_clock([Training(1, 1.0, None)]) is None
