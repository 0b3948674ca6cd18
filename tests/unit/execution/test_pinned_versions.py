"""A run goes on with the versions that it was begun with, or with the user's word; on the driver and on every worker."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from counting import counting
from test_runner import Run
from test_worker import task

from hardmoe.artifacts.pinned_versions import VERSIONS_FILE, decisive, differing, pin_versions, read_versions
from hardmoe.artifacts.provenance import versions
from hardmoe.errors import CorruptFileError, DriftError
from hardmoe.execution.runner import RunnerOptions
from hardmoe.execution.worker import execute_unit
from hardmoe.storage import LocalStorage


def begun_with(root: Path, **others: str) -> dict[str, str]:
    """A root that was begun with these versions; returns them all."""
    written = {**versions(), **others}
    LocalStorage(root).write_bytes(VERSIONS_FILE, json.dumps(written).encode())
    return written


def test_first_build_leaves_word_and_the_next_ones_find_the_same(root: Path) -> None:
    Run(root, [counting()], RunnerOptions()).run()
    assert read_versions(LocalStorage(root)) == versions()
    before = (root / VERSIONS_FILE).stat().st_mtime_ns
    Run(root, [counting("more")], RunnerOptions()).run()
    assert (root / VERSIONS_FILE).stat().st_mtime_ns == before


@pytest.mark.parametrize("package", ["torch", "torchvision", "pillow"])
def test_other_versions_are_refused_until_they_are_accepted(root: Path, package: str) -> None:
    begun_with(root, **{package: "0.1"})
    with pytest.raises(DriftError, match=rf"{package} {versions()[package]}, not 0\.1.*--accept-versions") as caught:
        Run(root, [counting()], RunnerOptions()).run()
    assert str(root) in str(caught.value) and not (root / "count").exists()
    Run(root, [counting()], RunnerOptions(accept_versions=True)).run()
    assert read_versions(LocalStorage(root)) == versions(), "what was accepted is the run's from now on"
    Run(root, [counting("more")], RunnerOptions()).run()


def test_versions_that_decide_no_byte_are_nobodys_business(root: Path) -> None:
    written = begun_with(root, ray="0.1", hardmoe="0.0.1", python="3.0")
    assert pin_versions(LocalStorage(root)) is None
    assert read_versions(LocalStorage(root)) == written


def test_faiss_is_one_package_and_a_machine_may_lack_it() -> None:
    assert decisive({"faiss-gpu": "1.9", "ray": "2"}) == {"faiss": "1.9"}
    assert differing({"faiss-gpu": "1.9"}, {"faiss-cpu": "1.9"}) == differing({"faiss-gpu": "1.9"}, {"torch": "2"}) == ""
    assert differing({"faiss-gpu": "1.9"}, {"faiss-cpu": "1.8"}) == "faiss 1.8, not 1.9"


def test_damaged_file_is_one_sentence(root: Path) -> None:
    for data in (b"{", b"[1]"):
        LocalStorage(root).write_bytes(VERSIONS_FILE, data)
        with pytest.raises(CorruptFileError, match="delete it"):
            pin_versions(LocalStorage(root))


def test_worker_with_other_versions_than_the_driver_computes_nothing(root: Path) -> None:
    asked = replace(task(root), versions={**versions(), "torch": "0.1"})
    outcome = execute_unit(asked)
    assert outcome.completion is None and outcome.error is not None and outcome.infrastructure is None
    assert f"torch {versions()['torch']}, not 0.1" in outcome.error and "--accept-versions" in outcome.error
    assert execute_unit(replace(asked, versions=versions())).completion is not None


def test_provenance_tells_which_units_others_computed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Run(root, [counting("alike", numbers=(1, 2))], RunnerOptions()).run()
    monkeypatch.setattr("hardmoe.execution.worker.versions", lambda: {**versions(), "torch": "0.1"})
    Run(root, [counting("other", numbers=(1, 2))], RunnerOptions(accept_versions=True)).run()
    alike, other = (json.loads((root / name / "provenance.json").read_text())["units"] for name in ("alike", "other"))
    assert all("versions" not in unit for unit in alike)
    assert {unit["versions"]["torch"] for unit in other} == {"0.1"}
