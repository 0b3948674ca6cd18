"""Fingerprints: what is computed, and nothing of where, how or in which order it was written down."""

import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardmoe.artifacts.fingerprint import canonical_json, differences, digest, fingerprint
from hardmoe.stage import Resources, Stage

STAGE = Stage("features", "features", 1, {"size": 32, "l2": True}, "a.b:C", {"dataset": "dataset"}, {"threads": 1})
INPUTS = {"dataset": "f" * 64}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=10,
)


def test_fingerprint_is_the_digest_of_kind_version_config_and_inputs() -> None:
    body = {"kind": "features", "version": 1, "config": {"size": 32, "l2": True}, "inputs": INPUTS}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    assert fingerprint(STAGE, INPUTS) == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    "change", [{"name": "other/features"}, {"work": "x:Y"}, {"operational": {"threads": 8}}, {"resources": Resources(4, 1.0)}]
)
def test_name_code_place_and_resources_are_no_part_of_it(change: dict[str, Any]) -> None:
    assert fingerprint(replace(STAGE, **change), INPUTS) == fingerprint(STAGE, INPUTS)


@pytest.mark.parametrize("change", [{"kind": "x"}, {"version": 2}, {"config": {"size": 32}}, {"config": {"size": 32, "l2": 1}}])
def test_kind_version_and_config_are(change: dict[str, Any]) -> None:
    assert fingerprint(replace(STAGE, **change), INPUTS) != fingerprint(STAGE, INPUTS)


def test_an_input_counts_by_its_role_and_its_fingerprint_and_not_by_its_name() -> None:
    other = fingerprint(STAGE, {"dataset": "e" * 64})
    assert other != fingerprint(STAGE, INPUTS)
    assert fingerprint(replace(STAGE, inputs={"dataset": "elsewhere"}), INPUTS) == fingerprint(STAGE, INPUTS)
    with pytest.raises(ValueError, match=r"has inputs \['dataset'\], fingerprints of \[\]"):
        fingerprint(STAGE, {})


@given(st.dictionaries(st.text(), json_values, max_size=5))
def test_order_of_the_keys_does_not_matter_and_the_value_comes_back(value: dict[str, Any]) -> None:
    assert canonical_json(dict(reversed(value.items()))) == canonical_json(value)
    assert json.loads(canonical_json(value)) == value


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": [1.0, float("nan")]}, r"value\.a\[1\]: nan has no stable form"),
        ({"a": float("-inf")}, r"value\.a: -inf"),
        ({1: 2}, r"value: the key 1 is not a string"),
        ({"a": {"b": {3}}}, r"value\.a\.b: set has no stable form"),
        (object(), r"value: object has no stable form"),
    ],
)
def test_value_without_a_stable_form_is_refused_by_its_place(value: Any, where: str) -> None:
    with pytest.raises(ValueError, match=where):
        digest(value)


def test_differences_name_every_field_with_both_values() -> None:
    recorded = {"a": 1, "b": {"c": [1, 2], "gone": None}, "same": {"x": 1}}
    wanted = {"a": 2, "b": {"c": [1, 3], "new": "n"}, "same": {"x": 1}}
    assert differences(recorded, wanted) == [
        "a: 1 -> 2",
        "b.c: [1, 2] -> [1, 3]",
        "b.gone: null -> (absent)",
        'b.new: (absent) -> "n"',
    ]
    assert differences(recorded, recorded) == []
    assert all(len(row) < 200 for row in differences({"long": "x" * 5000}, {"long": "y" * 5000}))


@given(json_values, json_values)
def test_differences_are_found_exactly_where_digests_differ(a: Any, b: Any) -> None:
    if not differences({"v": a}, {"v": b}):
        assert a == b
