"""What `hardmoe doctor` measures on a machine, and how it judges what a machine said."""

from pathlib import Path
from typing import Any

import pytest
from mounts import bind_read_only

from hardmoe.artifacts.provenance import versions
from hardmoe.config import Json
from hardmoe.execution.checkup import facts as measuring
from hardmoe.execution.checkup.facts import PLACE, look_at_root, measure
from hardmoe.execution.checkup.findings import Finding, judge, judge_demands
from hardmoe.stage import Resources

GIB = 2**30


def healthy(**changes: Json) -> dict[str, Json]:
    """The facts of a machine that lacks nothing, with changes."""
    gpu = {"name": "H200", "free": 130 * GIB, "total": 140 * GIB, "problem": None}
    facts: dict[str, Json] = {
        "host": "one",
        "versions": {"hardmoe": "1", "torch": "2"},
        "cpus": 16,
        "memory": {"free": 60 * GIB, "total": 64 * GIB},
        "shared_memory": 8 * GIB,
        "disk": {"path": "scratch", "free": 100 * GIB},
        "decode": 800.0,
        "accelerators": {"present": 1, "gpus": [gpu], "faiss": None},
        "root": {"problem": None, "free": None, "write": 2e8, "read": 3e8},
        "object_store": 4 * GIB,
        "skew": {"seconds": 0.01, "error": 0.002},
    }
    return facts | changes


def found(check: str, **changes: Json) -> Finding:
    """The one finding of that name about such a machine; all others must be good."""
    findings = judge("one", healthy(**changes), {"hardmoe": "1", "torch": "2"}, {"torch": "2"})
    assert all(each.state == "ok" and not each.remedy for each in findings if each.check != check), findings
    return max((each for each in findings if each.check == check), key=lambda each: ("ok", "warn", "bad").index(each.state))


def test_machine_that_lacks_nothing_has_only_good_findings() -> None:
    checks = {each.check for each in judge("one", healthy(), {"torch": "2"}, {"torch": "2"})}
    assert checks == {"versions", "gpu 0", "faiss", "memory", "disk", "object store", "decode", "root", "clock"}
    assert found("versions").state == "ok"


BROKEN_GPU = {"name": "H200", "free": GIB, "total": GIB, "problem": "no kernel image is available"}
CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("versions", {"versions": {"hardmoe": "1", "torch": "3"}}, "bad", "torch 3 instead of 2"),
    ("versions", {"versions": {"hardmoe": "1"}}, "bad", "torch missing instead of 2"),
    ("gpu 0", {"accelerators": {"present": 1, "gpus": [BROKEN_GPU], "faiss": None}}, "bad", "no kernel image"),
    ("gpu", {"accelerators": {"present": 2, "gpus": [], "faiss": None}}, "bad", "torch sees 0 of 2"),
    ("gpu", {"accelerators": {"present": 2, "gpus": [], "faiss": None, "problem": "it hung"}}, "bad", "it hung"),
    ("memory", {"memory": {"free": GIB, "total": 64 * GIB}}, "bad", "only 1.0 GiB of 64.0 GiB free"),
    ("disk", {"disk": {"path": "scratch", "free": GIB}}, "bad", "only 1.0 GiB free in scratch"),
    ("object store", {"shared_memory": 64 * 2**20}, "bad", "0.1 GiB free in /dev/shm"),
    ("decode", {"decode": 30.0}, "warn", "only 30 images/s"),
    ("root", {"root": {"problem": "unseen"}}, "bad", "does not see what the driver writes"),
    ("root", {"root": {"problem": "not exclusive"}}, "bad", "two writers"),
    ("root", {"root": {"problem": "denied"}}, "bad", "cannot be used: denied"),
    ("root", {"root": {"problem": None, "free": None, "write": 1e6, "read": 3e8}}, "warn", "writes 1 MB/s"),
    ("root's disk", {"root": {"problem": None, "free": GIB, "write": 1e9, "read": 1e9}}, "bad", "only 1.0 GiB free"),
    ("clock", {"skew": {"seconds": -9.0, "error": 0.1}}, "warn", "-9.00 s"),
    ("clock", {"skew": {"seconds": 400.0, "error": 0.1}}, "bad", "+400.00 s"),
]


@pytest.mark.parametrize(("check", "changes", "state", "words"), CASES, ids=[f"{case[0]}-{case[3][:12]}" for case in CASES])
def test_what_a_machine_lacks_is_one_finding_with_its_remedy(check: str, changes: dict[str, Any], state: str, words: str) -> None:
    finding = found(check, **changes)
    assert finding.state == state and words in finding.text and finding.remedy


def test_clock_that_may_be_right_within_the_error_is_not_blamed() -> None:
    assert found("clock", skew={"seconds": 8.0, "error": 4.0}).state == "ok"


def test_faiss_that_does_not_work_only_costs_time() -> None:
    gpu = {"name": "H200", "free": GIB, "total": GIB, "problem": None}
    finding = found("faiss", accelerators={"present": 1, "gpus": [gpu], "faiss": "no kernel image"})
    assert finding.state == "warn"


def test_versions_are_held_against_the_run_as_well() -> None:
    first, second = judge("one", healthy(), {"torch": "2"}, {"torch": "1"})[:2]
    assert (first.state, second.state) == ("ok", "bad")
    assert "begun with" in second.text and "torch 2 instead of 1" in second.text


def test_demand_that_no_node_can_meet_is_bad_and_gpus_are_used_where_there_are_any() -> None:
    nodes = [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 64.0}]
    demands = [Resources(1, None), Resources(16, 0.0), Resources(16, None), Resources(1, None)]
    findings = judge_demands(demands, nodes)
    assert [each.state for each in findings] == ["ok", "ok", "bad"]
    assert "units of 16 CPUs and 1 GPUs fit on no node" in findings[2].text
    assert judge_demands(demands, nodes[1:])[-1].state == "ok", "without any GPU, none is asked for"


def test_facts_of_this_machine_are_measured_and_leave_nothing_behind(tmp_path: Path) -> None:
    facts = measure(str(tmp_path), 32, "")
    assert facts["versions"] == versions()
    assert facts["decode"] > 10 and facts["memory"]["free"] > 0 and facts["disk"]["free"] > 0
    assert facts["root"]["problem"] is None and facts["root"]["write"] > 0 and facts["root"]["free"] > 0
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_root_without_the_drivers_file_is_not_written_to(tmp_path: Path) -> None:
    assert look_at_root(str(tmp_path / "elsewhere"), "token") == {"problem": "unseen"}
    assert not (tmp_path / "elsewhere").exists()
    (tmp_path / PLACE).mkdir()
    (tmp_path / PLACE / "token").write_text("seen")
    assert look_at_root(str(tmp_path), "token")["problem"] is None


def test_root_that_cannot_be_written_says_why(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with bind_read_only(tmp_path, tmp_path / "there"):
        assert "read-only" in look_at_root(str(tmp_path / "there"), "")["problem"].lower()


def test_gpu_probe_that_fails_tells_its_last_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a machine with a card and a driver that is too old: the probe is a process of its own, whose end is noted."""
    monkeypatch.setattr(measuring, "_GPU_PROBE", "raise SystemExit('the driver is too old')")
    monkeypatch.setattr(measuring.Path, "iterdir", lambda self: iter([tmp_path]))
    assert measuring._gpus() == {"present": 1, "gpus": [], "faiss": None, "problem": "the driver is too old"}
