"""Provenance: when, where, by what; valid JSON with a moment and the versions that decide bytes."""

import json
import os
import sys
from datetime import datetime
from importlib import metadata
from types import SimpleNamespace

import pytest

from hardmoe.artifacts.provenance import describe, machine, now


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


def test_machine_is_told_by_its_processors_and_the_gpus_that_were_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    told = machine()
    assert told.startswith(f"{os.cpu_count()} x ") and len(told) > 5
    names = ["NVIDIA A100", "NVIDIA A100", "NVIDIA T4"]
    cuda = SimpleNamespace(is_initialized=lambda: True, device_count=lambda: 3, get_device_name=names.__getitem__)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert machine() == f"{told}, 2 x NVIDIA A100, NVIDIA T4"
    cuda.is_initialized = lambda: False
    assert machine() == told, "a GPU that nothing ran on explains nothing"
