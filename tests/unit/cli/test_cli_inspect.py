"""The commands that look: what they say of a run that is done, being built, killed, failed, damaged or elsewhere.

The run is made by hand, file by file, so that every state is exact; that real runs leave such files is shown where they run.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import invoke

from hardmoe.artifacts.lease import LEASE_NAME, Holder, this_process
from hardmoe.artifacts.record import Record
from hardmoe.cli import inspect as inspect_module
from hardmoe.cli.begun import begun_run
from hardmoe.cli.common import format_table
from hardmoe.errors import CorruptFileError
from hardmoe.execution.tracked import Tracked
from hardmoe.recipe import Recipe
from hardmoe.storage import LocalStorage

DEAD = replace(this_process(), pid=2**22 + 1)
ELSEWHERE = replace(this_process(), host="gpu-07", boot="another", pid=4711)


@pytest.fixture
def run(tmp_path: Path) -> LocalStorage:
    """A run with two experts that was begun and has nothing yet."""
    recipe = Recipe().model_dump(mode="json") | {"partition": {"experts": 2}}
    storage = LocalStorage(tmp_path / "run")
    storage.write_bytes("recipe.yaml", yaml.safe_dump(recipe).encode())
    return storage


def finish(run: LocalStorage, name: str, reused_from: str | None = None) -> None:
    record = Record("kind", 1, "f" * 64, {"size": 3}, {}, [], {"rows": 5}, reused_from)
    run.write_bytes(f"{name}/artifact.json", record.to_bytes())
    provenance = {"seconds": 75.2, "finished": "2026-01-01T00:00:00+00:00", "host": "cpu-01"}
    run.write_bytes(f"{name}/provenance.json", json.dumps(provenance).encode())


def hold(run: LocalStorage, name: str, holder: Holder) -> None:
    run.write_bytes(f"{name}/{LEASE_NAME}", json.dumps({"token": "t", "beat": 0, "holder": asdict(holder)}).encode())


def building(run: LocalStorage, name: str, holder: Holder | None, silent: float = 0.0, **more: Any) -> None:
    """Two of eight units are done, and one runs."""
    tracked = Tracked()
    tracked.follow("train", 2, 8)
    tracked.hear("00002", {"done": 1, "total": 2, "values": {"examples/s": 1234.0}})
    updated = (datetime.now(UTC) - timedelta(seconds=silent)).isoformat(timespec="seconds")
    body = tracked.summary() | {"units_per_second": 0.25, "eta_seconds": 22.0, "updated": updated} | more
    run.write_bytes(f"{name}/_progress/status.json", json.dumps(body).encode())
    if holder is not None:
        hold(run, name, holder)


def look(run: LocalStorage, *arguments: str) -> str:
    result = invoke(Path(run.uri).parent, *arguments, "--root", run.uri)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def states(run: LocalStorage) -> dict[str, dict[str, Any]]:
    return {row["artifact"]: row for row in json.loads(look(run, "status", "--json"))}


def row(run: LocalStorage, name: str) -> str:
    (line,) = [line for line in look(run, "status").splitlines() if line.startswith(f"{name} ")]
    return " ".join(line.split())


def test_status_of_every_state_in_text_and_json(run: LocalStorage) -> None:
    me = this_process()
    finish(run, "dataset")
    finish(run, "vocabulary", "/elsewhere/vocabulary")
    building(run, "experts/expert-0000", me)
    building(run, "experts/expert-0001", DEAD)
    building(run, "features", None, state="failed", failures=[{"unit": "features/00003", "error": "the disk is full"}])
    hold(run, "trunk", me)
    run.write_bytes("router/artifact.json", b"{")
    assert row(run, "dataset") == "dataset done took 1:15"
    assert row(run, "vocabulary") == "vocabulary reused took 1:15"
    assert row(run, "partition") == "partition missing"
    assert row(run, "trunk") == f"trunk running {me}"
    assert row(run, "experts/expert-0000") == (
        f"experts/expert-0000 running train 2/8 31 % 0.25/s 0:22 1,234 examples/s; process {me.pid} on {me.host}"
    )
    assert row(run, "experts/expert-0001") == "experts/expert-0001 stopped train 2/8 31 %"
    assert row(run, "features") == "features failed train 2/8 31 % features/00003: the disk is full"
    assert row(run, "router").startswith(f"router damaged router: {run.uri}/router/artifact.json is not a record")
    found = states(run)
    assert {name: each["state"] for name, each in found.items() if each["state"] != "missing"} == {
        "dataset": "done",
        "vocabulary": "reused",
        "trunk": "running",
        "features": "failed",
        "router": "damaged",
        "experts/expert-0000": "running",
        "experts/expert-0001": "stopped",
    }
    assert found["experts/expert-0000"]["progress"]["units_done"] == 2
    assert found["experts/expert-0000"]["holder"] == str(me)
    assert found["dataset"]["seconds"] == 75.2


def test_holder_elsewhere_that_was_not_heard_of_for_long_is_told_so(run: LocalStorage) -> None:
    """Whether a process on another machine lives cannot be seen from here; for how long it said nothing can."""
    building(run, "trunk", ELSEWHERE, silent=3600)
    building(run, "features", ELSEWHERE, silent=5)
    assert "process 4711 on gpu-07; not heard of for 1:00:0" in row(run, "trunk")
    assert row(run, "features").endswith("process 4711 on gpu-07")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff"])
def test_damaged_progress_and_provenance_are_no_error(run: LocalStorage, content: bytes) -> None:
    finish(run, "dataset")
    run.write_bytes("dataset/provenance.json", content)
    run.write_bytes("trunk/_progress/status.json", content)
    assert row(run, "dataset") == "dataset done"
    assert row(run, "trunk") == "trunk missing"
    assert "dataset (kind kind, version 1)" in look(run, "show", "dataset")


def test_watch_looks_again_until_nothing_runs_twice_in_a_row(run: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two stages nothing runs for a moment, which once ended the watching in the middle of a run."""
    building(run, "trunk", this_process())
    steps: list[Callable[[], object]] = [
        lambda: run.delete_tree("trunk/_progress"),
        lambda: building(run, "features", this_process()),
        lambda: run.delete_tree("features/_progress"),
        lambda: None,
    ]
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        steps.pop(0)()

    monkeypatch.setattr(inspect_module.time, "sleep", sleep)
    shown = look(run, "status", "--watch")
    assert waited == [2.0] * 4
    assert [line.split()[1] for line in shown.splitlines() if line.startswith(("trunk ", "features "))] == [
        *("running", "missing"),
        *("missing", "missing"),
        *("missing", "running"),
        *("missing", "missing"),
        *("missing", "missing"),
    ]


def test_logs_are_listed_printed_by_name_and_only_failures_on_demand(run: LocalStorage) -> None:
    run.write_bytes("experts/expert-0001/_progress/logs/train.expert-0001.log", b"INFO resumed\nERROR nan\n")
    run.write_bytes("features/_progress/logs/extract.00003.log", b"slow\n")
    building(run, "features", None, state="failed", failures=[{"unit": "features/00003", "error": "slow disk"}])
    listed = look(run, "logs").splitlines()
    assert listed == ["features: extract.00003", "experts/expert-0001: train.expert-0001"]
    for name in ("expert-0001", "experts/expert-0001", "experts/expert-0001/"):
        assert look(run, "logs", name) == "== train.expert-0001\nINFO resumed\nERROR nan\n"
    assert "slow" in look(run, "logs", "features/00003"), "a unit's label, as failures are told with it"
    assert look(run, "logs", "--failed") == "features/00003: slow disk\n"
    assert look(run, "logs", "--failed", "expert-0001") == "nothing failed\n"


def test_show_prints_the_record_for_people_and_for_scripts(run: LocalStorage) -> None:
    finish(run, "dataset")
    finish(run, "trunk", "/old/run/trunk")
    shown = look(run, "show", "dataset")
    for text in (
        "dataset (kind kind, version 1)",
        f"in {run.uri}/dataset",
        "2026-01-01T00:00:00+00:00 on cpu-01, 75.2 s",
        '"rows": 5',
    ):
        assert text in shown
    assert "in /old/run/trunk" in look(run, "show", "trunk")
    body = json.loads(look(run, "show", "dataset", "--json"))
    assert body["record"]["payload"] == {"rows": 5}
    assert body["provenance"]["host"] == "cpu-01"


def test_verify_tells_all_damage_and_fails_at_the_end(run: LocalStorage) -> None:
    finish(run, "dataset")
    run.write_bytes("trunk/artifact.json", b"{")
    result = invoke(Path(run.uri).parent, "verify", "--root", run.uri)
    assert result.returncode == 1
    assert "dataset: ok, 0 files" in result.stdout
    assert f"trunk: BAD: {run.uri}/trunk/artifact.json is not a record" in result.stdout
    assert "vocabulary: missing" in result.stdout
    assert "1 artifacts are damaged" in result.stderr or "1 artifact is damaged" in result.stderr


def test_table_aligns_its_columns_and_leaves_no_trailing_spaces() -> None:
    rows = [("name", "n", "note"), ("a", "1", ""), ("longer", "1000", "x")]
    assert format_table(rows, right=(1,)).splitlines() == ["name       n  note", "a          1", "longer  1000  x"]


def training(run: LocalStorage, name: str, holder: Holder, done: int, **values: float) -> None:
    """An expert at work, handed over for the second time."""
    tracked = Tracked()
    tracked.follow("train", 0, 1)
    unit = name.rpartition("/")[2]
    tracked.tries[unit] = 2
    tracked.hear(unit, {"done": done, "total": 400, "host": "gpu-07", "values": {"step": done, **values}})
    run.write_bytes(f"{name}/_progress/status.json", json.dumps(tracked.summary()).encode())
    hold(run, name, holder)


def test_status_tells_how_every_expert_is_doing_and_when_the_last_will_be_done(run: LocalStorage) -> None:
    """1,200 and 400 images, shown twice: one expert is half through, the other has not begun."""
    record = Record("kind", 1, "f" * 64, {}, {}, [], {"sizes": {"train": [1000, 400]}, "extra": {"overlap": [200, 0]}})
    run.write_bytes("partition/artifact.json", record.to_bytes())
    assert "experts:" not in look(run, "status")
    me = this_process()
    training(run, "experts/expert-0000", me, 200, loss=4.3125, **{"examples/s": 20.0, "precision@1": 0.4125, "computing": 0.968})
    told = row(run, "experts/expert-0000")
    assert "step 200/400; loss 4.312; precision@1 41.2 %; 20 examples/s; 97 % of a bare loop's; gpu-07; try 2; process" in told
    line = look(run, "status").splitlines()[-1]
    # (1,200 + 2 x 400) images at 20 a second.
    assert line.startswith("experts: 0 of 2 done, 1 running at 20 examples/s together; the last one done in about 1:40, at ")
    finish(run, "experts/expert-0001")
    line = look(run, "status").splitlines()[-1]
    assert line.startswith("experts: 1 of 2 done, 1 running at 20 examples/s together; the last one done in about 1:00, at ")
    assert "experts:" not in look(run, "status", "--json")


def test_run_whose_recipe_is_damaged_is_told_so(run: LocalStorage) -> None:
    run.write_bytes("recipe.yaml", b"{a: [")
    with pytest.raises(CorruptFileError, match=r"recipe\.yaml is damaged; delete it"):
        begun_run({"root": str(run.directory), "recipe_path": None})
