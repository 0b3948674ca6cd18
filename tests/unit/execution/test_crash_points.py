"""Killed at any operation on the storage, by driver or worker, and run again: the same records as without.

The process is not really killed (that is the kill campaign's part, in tests/integration) but every operation is tried: from
the chosen one on, the dead driver's storage does nothing any more, which also keeps its `finally` blocks from tidying up.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from counting import Run, ScriptedBackend, counting, total
from support import records

from hardmoe.artifacts import lease, store
from hardmoe.artifacts.store import ArtifactStore
from hardmoe.execution import worker
from hardmoe.storage import LocalStorage, OutputFile, open_storage


class Killed(BaseException):
    """The end of the process, as far as the code can tell."""


class DyingStorage(LocalStorage):
    """Dies before its n-th operation that changes anything, and does nothing from then on."""

    def __init__(self, directory: Path, survives: int) -> None:
        super().__init__(directory)
        self.operations = 0
        self.survives = survives
        self.dead = False

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self.operations += 1
        self.dead = self.dead or self.operations >= self.survives
        if self.dead:
            raise Killed
        yield

    def create(self, path: str, data: bytes) -> bool:
        with self._counted():
            return super().create(path, data)

    def replace(self, path: str, expected: bytes, data: bytes | None) -> bool:
        with self._counted():
            return super().replace(path, expected, data)

    def move(self, source: str, target: str) -> None:
        with self._counted():
            super().move(source, target)

    def delete_tree(self, path: str) -> None:
        with self._counted():
            super().delete_tree(path)

    @contextmanager
    def open_output(self, path: str) -> Iterator[OutputFile]:
        with self._counted(), super().open_output(path) as out:
            yield out


STAGES = [counting("a", (1, 2)), counting("b/c", (5,), inputs=["a"])]


def run_until_killed(root: Path, survives: int, monkeypatch: pytest.MonkeyPatch) -> DyingStorage:
    """Run with a storage that dies; its leases are those of a process that is gone."""
    storage = DyingStorage(root, survives)
    holder = replace(lease.this_process(), pid=2**22 + 1)
    with monkeypatch.context() as patch:
        patch.setattr(lease, "this_process", lambda: holder)
        patch.setattr(worker, "open_storage", lambda uri: storage)
        patch.setattr(store, "open_storage", lambda uri: storage)
        try:
            Run(root, STAGES, backend=ScriptedBackend(2), storage=storage).run()
        except Killed:
            assert storage.dead
    return storage


def leftovers(root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and "_progress" in path.parts]


def test_killed_at_every_operation_and_resumed_equals_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tmp_path / "whole"
    Run(whole, STAGES).run()
    expected = records(whole)
    assert len(expected) == 2
    survives, ended = 0, False
    while not ended:
        survives += 1
        root = tmp_path / str(survives)
        ended = not run_until_killed(root, survives, monkeypatch).dead
        plan = Run(root, STAGES).run()
        assert records(root) == expected, f"killed at operation {survives}"
        assert [artifact.verify() for artifact in plan.artifacts.values()] == [4, 3]
    assert survives > 40, "the storage is hardly used: does the test still kill anything?"


def test_killed_again_and_again_makes_progress_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed every 25 operations, the run ends: nothing that is done is done again for ever."""
    whole, root = tmp_path / "whole", tmp_path / "root"
    Run(whole, STAGES).run()
    kills = 0
    while run_until_killed(root, 25, monkeypatch).dead:
        kills += 1
        assert kills < 9
    assert kills > 0
    assert records(root) == records(whole)


def test_nothing_but_logs_is_left_of_a_run_that_was_killed_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver killed between the record and the end of its lease left its scratch files for ever: the artifact was done."""
    for survives in (20, 30, 35, 37, 38, 39, 40):
        root = tmp_path / str(survives)
        run_until_killed(root, survives, monkeypatch)
        Run(root, STAGES).run()
        assert leftovers(root) == [], f"killed at operation {survives}"


def test_leftovers_of_another_recipe_are_swept_and_checkpoints_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that an abandoned build published under the same directory would be found by everybody's globs."""
    root = tmp_path / "root"
    other = [counting("a", (7, 8, 9)), STAGES[1]]
    storage = DyingStorage(root, 10**6)
    # Killed at the record: all its files are in place already.
    monkeypatch.setattr(ArtifactStore, "commit", lambda *_: _raise(Killed()))
    with pytest.raises(Killed):
        Run(root, other, storage=storage).run()
    monkeypatch.undo()
    assert (root / "a" / "squares" / "9.txt").exists()
    (root / "a" / "checkpoints").mkdir()
    (root / "a" / "checkpoints" / "step").write_text("kept")
    plan = Run(root, STAGES).run()
    assert sorted(p.name for p in (root / "a" / "squares").iterdir()) == ["1.txt", "2.txt"]
    assert (root / "a" / "checkpoints" / "step").read_text() == "kept"
    assert plan.artifacts["a"].payload == {"total": total((1, 2))}
    assert leftovers(root) == []


def _raise(error: BaseException) -> Any:
    raise error


def test_open_storage_is_what_the_patches_above_replace() -> None:
    """The oracle of this file: workers and artifacts open their storage by these names."""
    assert worker.open_storage is open_storage
    assert store.open_storage is open_storage
