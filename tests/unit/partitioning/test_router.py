"""The router: one rule for a row, alone or among others, before and after a trip through its files."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardmoe.errors import CorruptFileError, DataError
from hardmoe.neighbours.faiss_engine import FaissEngine
from hardmoe.neighbours.torch_engine import TorchEngine
from hardmoe.partitioning.moments import Moments
from hardmoe.partitioning.router import Router
from hardmoe.partitioning.transform import FeatureTransform
from hardmoe.partitioning.transform_fit import fit_transform

KINDS = ["none", "l2", "pca", "whiten"]


pytestmark = pytest.mark.usefixtures("one_search_thread")


def random_router(kind="l2", experts=5, dim=12, seed=0):
    """Of features of this width; where there are principal directions, as many as half the width and one."""
    rng, width = np.random.default_rng(seed), dim if kind in ("none", "l2") else dim // 2 + 1
    transform = FeatureTransform(kind) if kind in ("none", "l2") else projecting(kind, width, rng, dim)
    return Router(transform, rng.standard_normal((experts, width)).astype(np.float32))


def projecting(kind, components, rng, dim):
    mixed = rng.standard_normal((200, dim)) @ rng.standard_normal((dim, dim)) + 1.0
    return fit_transform(Moments.from_batch(mixed.astype(np.float16).astype(np.float32)), kind, components).transform


def grouped_router(kind="l2", experts=5, clusters=23, dim=12, seed=0):
    generator = np.random.default_rng(seed)
    groups = generator.permutation(np.concatenate([np.arange(experts), generator.integers(0, experts, clusters - experts)]))
    plain = random_router(kind, clusters, dim)
    return Router(plain.transform, plain.centroids_KD, groups.astype(np.int32))


def random_features(rows, dim=12, seed=1):
    return (np.random.default_rng(seed).standard_normal((rows, dim)) * 30).astype(np.float16).astype(np.float32)


def distances_by_hand(features, router):
    rows, projection = features.astype(np.float64), router.transform.projection
    if projection is not None:
        directions = projection.directions_PD.astype(np.float64)
        rows = (
            np.array([[math.fsum(row * each) for each in directions] for row in rows]) - projection.offset_P
        ) * projection.scale_P
    if router.transform.kind != "none":
        rows = rows / np.sqrt((rows**2).sum(axis=1, keepdims=True))
    rows = rows.astype(np.float32).astype(np.float64)
    return ((rows[:, None] - router.centroids_KD.astype(np.float64)[None]) ** 2).sum(-1)


def brute_force(features, router):
    distances = distances_by_hand(features, router)
    order = np.argsort(distances, axis=1, kind="stable")
    return order[:, 0], order[:, 1], distances.min(axis=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", [FaissEngine(), TorchEngine("cpu"), None], ids=["faiss", "torch", "chosen"])
def test_route_equals_brute_force(kind, engine):
    router, features = random_router(kind), random_features(500)
    routed = router.route(features, engine)
    primary, second, distances = brute_force(features, router)
    np.testing.assert_array_equal(routed.primary_N, primary)
    np.testing.assert_array_equal(routed.second_N, second)
    np.testing.assert_array_equal(routed.squared_distance_N, distances)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", [FaissEngine(), TorchEngine("cpu"), None], ids=["faiss", "torch", "chosen"])
def test_route_by_groups_equals_brute_force(kind, engine):
    router, features = grouped_router(kind), random_features(500)
    assert router.num_experts == 5
    routed = router.route(features, engine)
    distances = distances_by_hand(features, router)
    by_expert = np.stack([distances[:, router.group_F == expert].min(axis=1) for expert in range(5)], axis=1)
    order = np.argsort(by_expert, axis=1)
    np.testing.assert_array_equal(routed.primary_N, order[:, 0])
    np.testing.assert_array_equal(routed.second_N, order[:, 1])
    np.testing.assert_array_equal(routed.squared_distance_N, by_expert.min(axis=1))
    rows = np.arange(500)
    found = router.squared_distances(router.transform(features), rows, routed.second_N)
    np.testing.assert_array_equal(found, by_expert[rows, order[:, 1]])


def test_squared_distances_without_groups_are_to_the_experts_centroid():
    router, features = random_router(), random_features(300)
    rows, experts = np.arange(300), np.arange(300) % 5
    found = router.squared_distances(router.transform(features), rows, experts)
    np.testing.assert_array_equal(found, distances_by_hand(features, router)[rows, experts])


def test_groups_of_one_centroid_each_route_as_no_groups_do():
    plain, features = random_router(), random_features(300)
    grouped = Router(plain.transform, plain.centroids_KD, np.arange(5, dtype=np.int32))
    for name in ("primary_N", "second_N", "squared_distance_N"):
        np.testing.assert_array_equal(getattr(grouped.route(features), name), getattr(plain.route(features), name))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(batch=st.integers(1, 60), order_seed=st.integers(0, 1000))
def test_route_any_batch_and_order_gives_the_same_answer(kind, batch, order_seed):
    features = random_features(120, dim=3)
    for router in (random_router(kind, 40, dim=3), grouped_router(kind, clusters=40, dim=3)):
        assert_same_in_batches(router, features, batch, order_seed)


def assert_same_in_batches(router, features, batch, order_seed):
    whole = router.route(features)
    order = np.random.default_rng(order_seed).permutation(120)
    for start in range(0, 120, batch):
        rows = order[start : start + batch]
        part = router.route(features[rows])
        np.testing.assert_array_equal(part.primary_N, whole.primary_N[rows])
        np.testing.assert_array_equal(part.second_N, whole.second_N[rows])
        np.testing.assert_array_equal(part.squared_distance_N, whole.squared_distance_N[rows])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_route_non_finite_features_are_refused(kind, bad):
    features = random_features(4)
    features[2, 3] = bad
    with pytest.raises(DataError, match="1 of 4 features"):
        random_router(kind).route(features)


@pytest.mark.parametrize("kind", KINDS)
def test_route_features_of_another_width_are_refused(kind):
    with pytest.raises(DataError, match="width 7 cannot be routed by a router that was fitted on width 12"):
        random_router(kind).route(random_features(2, dim=7))


@pytest.mark.parametrize("kind", KINDS)
def test_files_round_trip_gives_the_same_router_and_bytes(kind):
    router = random_router(kind)
    files = router.to_files()
    again = Router.from_files(files)
    assert sorted(files) == ["centroids.npy", "router.json", "transform.safetensors"]
    assert again.centroids_KD.tobytes() == router.centroids_KD.tobytes()
    assert again.transform.kind == kind
    assert again.to_files() == files
    assert json.loads(files["router.json"])["experts"] == router.num_experts == 5
    assert json.loads(files["router.json"])["dim"] == router.dim == again.dim == 12, "the width of the trunk's features"


@pytest.mark.parametrize("name", ["centroids.npy", "router.json", "transform.safetensors"])
@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: None], ids=["cut", "empty", "gone"]
)
@pytest.mark.parametrize("kind", ["l2", "whiten"])
def test_from_files_damaged_file_is_refused(name, damage, kind):
    files = random_router(kind).to_files()
    damaged = damage(files.pop(name))
    if damaged is not None:
        files[name] = damaged
    with pytest.raises(CorruptFileError, match="fit the router again"):
        Router.from_files(files)


def test_from_files_of_two_routers_is_refused():
    files = random_router(experts=5).to_files() | {"centroids.npy": random_router(experts=6).to_files()["centroids.npy"]}
    with pytest.raises(CorruptFileError, match="speaks of 5 experts"):
        Router.from_files(files)


OTHERS = [("pca", 12), ("l2", 7), ("whiten", 14)]
SWAPS = [(name, other) for name in ("router.json", "transform.safetensors") for other in OTHERS]


@pytest.mark.parametrize(("name", "other"), [*SWAPS, ("centroids.npy", ("whiten", 14))], ids=str)
@pytest.mark.parametrize("make", [random_router, grouped_router])
def test_from_files_of_routers_with_other_transforms_is_refused(name, other, make):
    """Kind, width of the features and number of directions must agree; centroids of another width have no place at all."""
    files, others = make("whiten").to_files(), make(other[0], dim=other[1], seed=4).to_files()
    with pytest.raises(CorruptFileError, match="fit the router again"):
        Router.from_files(files | {name: others[name]})


def test_from_files_of_a_description_that_is_none_is_refused():
    for told in (
        [],
        {"experts": 5, "dim": 12},
        {"experts": 5, "dim": 12, "transform": "l2"},
        {"experts": "x", "dim": 1, "transform": 0},
    ):
        with pytest.raises(CorruptFileError, match="fit the router again"):
            Router.from_files(random_router().to_files() | {"router.json": json.dumps(told).encode()})


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_groups_round_trip_and_say_whose_every_centroid_is(kind):
    router = grouped_router(kind)
    files = router.to_files()
    again = Router.from_files(files)
    assert sorted(files) == ["centroids.npy", "router.json", "transform.safetensors"]
    np.testing.assert_array_equal(again.group_F, router.group_F)
    assert again.group_F.dtype == np.int32
    assert again.to_files() == files
    description = json.loads(files["router.json"])
    assert (description["experts"], description["groups"]) == (5, router.group_F.tolist())
    assert description["dim"] == again.dim == 12, "the width of the trunk's features, whatever that of the centroids is"
    assert description["transform"] == ({"kind": kind, "components": 7} if kind in ("pca", "whiten") else {"kind": kind})
    assert "groups" not in json.loads(random_router().to_files()["router.json"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda body: body["groups"].pop(), "groups must be int32 .F. for 23 centroids, not int32 .22."),
        (lambda body: body.update(groups=[0, 1, 2, 4] * 5 + [0, 1, 2]), "numbered from 0 without a gap, not 0 to 4"),
        (
            lambda body: body.update(groups=[0, 1, 2, 3] * 5 + [0, 1, 2]),
            "5 experts .*its groups and the other files make 4 experts",
        ),
        (lambda body: body["groups"].__setitem__(3, -1), "groups are not the numbers of experts"),
        (lambda body: body["groups"].__setitem__(3, 1.5), "groups are not the numbers of experts"),
        (lambda body: body["groups"].__setitem__(3, True), "groups are not the numbers of experts"),
        (lambda body: body["groups"].__setitem__(3, 2**40), "groups are not the numbers of experts"),
        (lambda body: body.update(groups=[]), "groups must be int32 .F. for 23 centroids"),
        (lambda body: body.update(groups={"0": 1}), "groups are not the numbers of experts"),
        (lambda body: body.pop("groups"), "speaks of 5 experts for .*transform.safetensors hold 23 experts for "),
    ],
    ids=["short", "gap", "fewer", "negative", "fraction", "truth", "huge", "empty", "object", "gone"],
)
@pytest.mark.parametrize("kind", ["l2", "whiten"])
def test_from_files_of_wrong_groups_is_refused(change, sentence, kind):
    files = grouped_router(kind).to_files()
    body = json.loads(files["router.json"])
    change(body)
    with pytest.raises(CorruptFileError, match=sentence) as refused:
        Router.from_files(files | {"router.json": json.dumps(body).encode()})
    assert "fit the router again" in str(refused.value)


def test_groups_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="groups must be int32"):
        Router(FeatureTransform("none"), random_router().centroids_KD, np.arange(5))
