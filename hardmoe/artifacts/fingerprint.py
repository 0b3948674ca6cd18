"""Fingerprints: the identity of what a stage builds, before it is built.

A fingerprint is a digest of kind, hand-raised version, config and the inputs' fingerprints: never of paths, hosts, resources
or source code. Rejected: hashing the source, which rebuilds terabytes for a comment, and hashing input *files*, which cannot
be known before they exist (records hold those digests besides).
"""

import hashlib
import json
import math
from collections.abc import Mapping

from hardmoe.config import Json
from hardmoe.stage import Stage


def canonical_json(value: Json) -> bytes:
    """JSON with sorted keys and no spaces: equal values give equal bytes.

    Raises:
        ValueError: the value holds something without a stable form (NaN, infinity, a non-string key, an object).
    """
    _refuse_unstable(value, "value")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest(value: Json) -> str:
    """Hexadecimal SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def fingerprint(stage: Stage, input_fingerprints: Mapping[str, str]) -> str:
    """The identity of a stage, given its inputs' fingerprints by role."""
    if set(input_fingerprints) != set(stage.inputs):
        raise ValueError(f"stage {stage.name} has inputs {sorted(stage.inputs)}, fingerprints of {sorted(input_fingerprints)}")
    identity = {"kind": stage.kind, "version": stage.version, "config": dict(stage.config), "inputs": dict(input_fingerprints)}
    return digest(identity)


def differences(recorded: Json, wanted: Json, path: str = "") -> list[str]:
    """Field-level differences of two JSON values, each as `a.b: recorded -> wanted`."""
    if isinstance(recorded, Mapping) and isinstance(wanted, Mapping):
        rows: list[str] = []
        for key in sorted({*recorded, *wanted}):
            where = f"{path}.{key}" if path else key
            if key not in recorded:
                rows.append(f"{where}: (absent) -> {_short(wanted[key])}")
            elif key not in wanted:
                rows.append(f"{where}: {_short(recorded[key])} -> (absent)")
            else:
                rows += differences(recorded[key], wanted[key], where)
        return rows
    return [] if recorded == wanted else [f"{path}: {_short(recorded)} -> {_short(wanted)}"]


def _short(value: Json) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _refuse_unstable(value: Json, path: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{path}: the key {key!r} is not a string")
            _refuse_unstable(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _refuse_unstable(item, f"{path}[{index}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{path}: {value} has no stable form")
    elif value is not None and not isinstance(value, bool | int | str):
        raise ValueError(f"{path}: {type(value).__name__} has no stable form")
