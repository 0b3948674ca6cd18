"""Networks in memory within a budget."""

from torch import nn

from hardmoe.models.network_cache import NetworkCache, num_bytes


def linear(number: int) -> nn.Linear:
    return nn.Linear(10, number + 1, bias=False)


def test_least_recently_used_network_goes_when_the_budget_is_exceeded() -> None:
    cache = NetworkCache(linear, most_bytes=40 * (1 + 2 + 3))
    for number in (0, 1, 2, 0):
        assert cache.get(number).out_features == number + 1
    assert cache.numbers == [1, 2, 0] and cache.held_bytes == 240
    cache.get(3)
    assert cache.numbers == [0, 3], "4 + 1 units of 6 are left; 1 and 2 were used longest ago"
    assert cache.num_loads == 4


def test_network_larger_than_the_budget_is_held_alone() -> None:
    cache = NetworkCache(linear, most_bytes=1)
    first = cache.get(5)
    assert cache.get(5) is first and cache.numbers == [5]
    cache.get(6)
    assert cache.numbers == [6]


def test_bytes_of_a_network_count_buffers_too() -> None:
    assert num_bytes(nn.BatchNorm1d(4)) == 4 * (4 * 4) + 8
