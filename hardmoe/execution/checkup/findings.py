"""From facts to findings: one line about each thing that was looked at, and the remedy where something is wrong.

A finding is `bad` if a run would fail, hang or give other bytes because of it, `warn` if it would only be slower. Rejected: a
score, which nobody can act on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from hardmoe.config import Json
from hardmoe.execution.slots import Slots
from hardmoe.stage import Resources

State = Literal["ok", "warn", "bad"]

LEAST_MEMORY_BYTES = 2 * 2**30
LEAST_DISK_BYTES = 5 * 2**30
LEAST_OBJECT_STORE_BYTES = 75 * 2**20
"""What Ray itself insists on; units send a few kilobytes through it and no image."""
SLOW_BYTES_PER_SECOND = 20e6
SLOW_DECODING = 150.0
"""Images per second and thread; usual CPUs do 500 to 1,000 at this size."""
SKEW_SECONDS = 5.0
MOST_SKEW_SECONDS = 300.0
"""S3 refuses requests that are a quarter of an hour off."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    node: str
    check: str
    state: State
    text: str
    remedy: str = ""


def judge(node: str, facts: Json, driver: Mapping[str, str], begun: Mapping[str, str]) -> list[Finding]:
    """Everything about one machine.

    Args:
        node: how it is called.
        facts: of `facts.measure`, with the node's `object_store` and `skew` where Ray told them.
        driver: the driver's versions.
        begun: versions that the run was begun with; empty if it was not.
    """
    found = [_versions(node, facts["versions"], driver, "the driver's", "install the driver's (requirements.lock) there")]
    if begun:
        remedy = "install those, or give a new 'root': other versions may give other bytes"
        found.append(_versions(node, facts["versions"], begun, "those that the run was begun with", remedy))
    found += [*_accelerators(node, facts["accelerators"]), *_space(node, facts)]
    rate = facts["decode"]
    found.append(
        Finding(node, "decode", "ok", f"{rate:,.0f} images/s and thread")
        if rate >= SLOW_DECODING
        else Finding(node, "decode", "warn", f"only {rate:,.0f} images/s and thread", "end what else runs there, or add CPUs")
    )
    if facts["root"] is not None:
        found += _root(node, facts["root"])
    if facts.get("skew") is not None:
        found.append(_skew(node, facts["skew"]))
    return found


def judge_demands(demands: Sequence[Resources], nodes: Sequence[Mapping[str, float]]) -> list[Finding]:
    """Whether every unit of the recipe fits on some node."""
    found = []
    uses_gpus = any(node.get("GPU", 0.0) >= 1 for node in nodes)
    each = [Slots([node], uses_gpus=uses_gpus) for node in nodes]
    for demand in dict.fromkeys(demands):
        fitting = [slots for slots in each if slots.fitting(demand)]
        what = f"units of {demand.num_cpus} CPUs and {Slots(nodes, uses_gpus=uses_gpus).gpus(demand):g} GPUs"
        remedy = "lower num_threads or gpus in the recipe, or add a larger node"
        found.append(
            Finding("cluster", "resources", "ok", f"{what} fit on {len(fitting)} of {len(nodes)} nodes")
            if fitting
            else Finding("cluster", "resources", "bad", f"{what} fit on no node", remedy)
        )
    return found


def _versions(node: str, there: Mapping[str, str], wanted: Mapping[str, str], whose: str, remedy: str) -> Finding:
    others = [f"{name} {there.get(name, 'missing')} instead of {version}" for name, version in wanted.items()]
    others = [text for text, (name, version) in zip(others, wanted.items(), strict=True) if there.get(name) != version]
    if others:
        return Finding(node, "versions", "bad", f"not {whose}: {', '.join(others)}", remedy)
    return Finding(node, "versions", "ok", f"{whose}: hardmoe {there['hardmoe']}, torch {there.get('torch', 'missing')}")


def _accelerators(node: str, facts: Json) -> list[Finding]:
    if not facts["present"] and not facts["gpus"]:
        return [Finding(node, "gpu", "ok", "none; units use the CPU")]
    if facts.get("problem"):
        return [Finding(node, "gpu", "bad", facts["problem"], "install a torch whose CUDA the driver supports (nvidia-smi)")]
    if len(facts["gpus"]) < facts["present"]:
        text = f"torch sees {len(facts['gpus'])} of {facts['present']}"
        return [Finding(node, "gpu", "bad", text, "install a CUDA build of torch, or a newer NVIDIA driver")]
    found = []
    for number, gpu in enumerate(facts["gpus"]):
        name = f"gpu {number}"
        if gpu["problem"]:
            remedy = "install a torch built for this card"
            found.append(Finding(node, name, "bad", f"{gpu['name']}: torch cannot compute: {gpu['problem']}", remedy))
        else:
            text = f"{gpu['name']}, {_gib(gpu['free'])} of {_gib(gpu['total'])} free, torch computes"
            busy = gpu["free"] < gpu["total"] / 2
            found.append(Finding(node, name, "warn" if busy else "ok", text, "end what else holds its memory" if busy else ""))
    if facts["faiss"]:
        text = f"does not work on the GPU ({facts['faiss']}): torch searches instead"
        found.append(Finding(node, "faiss", "warn", text, "nothing needs to be done; a faiss-gpu for this card is faster"))
    else:
        found.append(Finding(node, "faiss", "ok", "computes on the GPU"))
    return found


def _space(node: str, facts: Json) -> list[Finding]:
    memory, disk, store = facts["memory"], facts["disk"], facts.get("object_store")
    text = f"{_gib(memory['free'])} of {_gib(memory['total'])} free, {facts['cpus']} CPUs"
    found = [_at_least(node, "memory", text, memory["free"] >= LEAST_MEMORY_BYTES, "end what else runs there, or take more")]
    text = f"{_gib(disk['free'])} free in {disk['path']}"
    found.append(_at_least(node, "disk", text, disk["free"] >= LEAST_DISK_BYTES, "free some, or set TMPDIR to another disk"))
    if store is not None:
        shared = facts["shared_memory"]
        text = f"{_gib(store)} in Ray" + ("" if shared is None else f", {_gib(shared)} free in /dev/shm")
        enough = store >= LEAST_OBJECT_STORE_BYTES and (shared is None or shared >= LEAST_OBJECT_STORE_BYTES)
        remedy = "start the container with a larger --shm-size, or Ray with --object-store-memory"
        found.append(_at_least(node, "object store", text, enough, remedy))
    return found


def _at_least(node: str, check: str, text: str, enough: bool, remedy: str) -> Finding:
    return Finding(node, check, "ok", text) if enough else Finding(node, check, "bad", f"only {text}", remedy)


def _root(node: str, facts: Json) -> list[Finding]:
    problem = facts["problem"]
    if problem == "unseen":
        text = "does not see what the driver writes there"
        return [Finding(node, "root", "bad", text, "mount it at the same path on every node, or use s3://bucket/prefix")]
    if problem == "altered":
        return [Finding(node, "root", "bad", "gives back other bytes than were written", "do not use this file system")]
    if problem == "not exclusive":
        text = "lets two writers create the same file, so leases do not hold"
        return [Finding(node, "root", "bad", text, "use a store with conditional writes, or a file system with hard links")]
    if problem:
        remedy = "give this machine permission, credentials or the mount"
        return [Finding(node, "root", "bad", f"cannot be used: {problem}", remedy)]
    rates = f"writes {facts['write'] / 1e6:,.0f} MB/s, reads {facts['read'] / 1e6:,.0f} MB/s"
    slow = min(facts["write"], facts["read"]) < SLOW_BYTES_PER_SECOND
    remedy = "bring the nodes nearer to the root (same region, same network)" if slow else ""
    found = [Finding(node, "root", "warn" if slow else "ok", f"can be written; {rates}", remedy)]
    if facts["free"] is not None:
        enough = facts["free"] >= LEAST_DISK_BYTES
        found.append(_at_least(node, "root's disk", f"{_gib(facts['free'])} free", enough, "free some, or take another root"))
    return found


def _skew(node: str, skew: Json) -> Finding:
    certain = max(0.0, abs(skew["seconds"]) - skew["error"])
    text = f"{skew['seconds']:+.2f} s against the driver's, within {skew['error']:.2f} s"
    state: State = "bad" if certain > MOST_SKEW_SECONDS else "warn" if certain > SKEW_SECONDS else "ok"
    remedy = "" if state == "ok" else "let a time service (chrony, systemd-timesyncd) set it: S3 refuses clocks that are far off"
    return Finding(node, "clock", state, text, remedy)


def _gib(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB"
