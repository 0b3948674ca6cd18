"""Provenance: when, where, by what; valid JSON with a moment and the versions that decide bytes."""

import json
from datetime import datetime
from importlib import metadata

from hardmoe.artifacts.provenance import describe, now


def test_provenance_says_when_where_and_with_what() -> None:
    body = json.loads(describe(now(), 1.23456, [{"unit": "a", "seconds": 1.0}], num_units=7))
    assert body["seconds"] == 1.235
    assert datetime.fromisoformat(body["started"]) <= datetime.fromisoformat(body["finished"])
    assert body["versions"]["torch"] == metadata.version("torch")
    assert {"hardmoe", "python", "ray", "numpy"} <= body["versions"].keys()
    assert (body["num_units"], body["units"]) == (7, [{"unit": "a", "seconds": 1.0}])
    assert body["host"]
    assert body["argv"]


def test_moments_are_in_utc() -> None:
    assert now().endswith("+00:00")
