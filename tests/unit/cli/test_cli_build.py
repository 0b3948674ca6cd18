"""What the building commands print."""

import json
from pathlib import Path

import numpy as np
import pytest

from hardmoe.artifacts.record import Record
from hardmoe.artifacts.store import Artifact, ArtifactStore
from hardmoe.cli.build import Built, print_metrics
from hardmoe.evaluation.bootstrap import interval_result
from hardmoe.evaluation.metrics import METRICS
from hardmoe.execution.plan import Plan
from hardmoe.recipe import Recipe
from hardmoe.storage import LocalStorage


def test_metrics_without_an_interval_are_printed_without_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of so few test examples that every replicate leaves all of them out there is a value and no interval.

    The run had done all its work and then ended in a TypeError.
    """
    result = interval_result(np.array([0.5, np.nan]))
    metrics = dict.fromkeys((*METRICS, "map"), result)
    body = {
        "systems": {"mixture": metrics},
        "differences": {"mixture - dense_refit": metrics},
        "num_test_examples": 1,
        "costs": {},
    }
    storage = LocalStorage(tmp_path)
    storage.write_bytes("evaluation/metrics.json", json.dumps(body).encode())
    evaluation = Artifact("evaluation", Record("evaluation", 1, "", {}, {}, []), storage)
    print_metrics(Built(ArtifactStore(storage), Recipe(), Plan([], {}, {"evaluation": evaluation}), frozenset()))
    assert capsys.readouterr().out.split()[-6:] == ["mixture", "50.0", "50.0", "50.0", "50.0", "50.0"]
