"""The versions that a run was begun with: `versions.json` in its root, held against everybody who goes on with it.

Another torch sums in another order, another Pillow decodes to other pixels: an artifact half of whose units were computed by
one and half by the other is neither's, and nothing about it looks wrong. So whoever begins to build in a root leaves word of
what it has, and others are refused, on the driver and on every worker, unless they say that they accept it. Rejected: versions
in fingerprints, which would throw away a month of finished experts for an update that changes no bit.
"""

import json
from collections.abc import Mapping

from hardmoe.artifacts.provenance import versions
from hardmoe.errors import CorruptFileError, DriftError
from hardmoe.storage import Storage, read_if_there

VERSIONS_FILE = "versions.json"
_DECISIVE = ("torch", "torchvision", "pillow", "faiss")
OPTION = "--accept-versions"


def decisive(found: Mapping[str, str]) -> dict[str, str]:
    """Of all versions those on which bytes depend; faiss is one package, whatever it was built for."""
    named = {("faiss" if name.startswith("faiss-") else name): version for name, version in found.items()}
    return {name: named[name] for name in _DECISIVE if name in named}


def read_versions(storage: Storage) -> dict[str, str]:
    """All versions that the run was begun with, or accepted since; nothing if it was not begun.

    Raises:
        CorruptFileError: the file is damaged.
    """
    data = read_if_there(storage, VERSIONS_FILE)
    if data is None:
        return {}
    try:
        return {str(name): str(version) for name, version in json.loads(data).items()}
    except (ValueError, AttributeError) as error:
        raise CorruptFileError(f"{storage.where(VERSIONS_FILE)} is damaged; delete it, and the next run writes it") from error


def pin_versions(storage: Storage, *, accept: bool = False) -> str | None:
    """Hold this process's versions against the run's, and leave word of them where there is none.

    Args:
        storage: the root.
        accept: go on whatever they are; they are the run's from now on.

    Returns:
        What differs, if that was accepted.

    Raises:
        DriftError: others than the run's, and they were not accepted.
    """
    here = versions()
    data = (json.dumps(here, indent=1, sort_keys=True) + "\n").encode()
    begun = read_versions(storage)
    if not begun and not storage.create(VERSIONS_FILE, data):
        begun = read_versions(storage)  # somebody was quicker
    others = differing(begun, here)
    if others and not accept:
        raise DriftError(
            f"the run in {storage.where()} was begun with other versions than are here ({others}), and other versions may give "
            f"other bytes; install those it was begun with, or go on with {OPTION}"
        )
    if others:
        storage.write_bytes(VERSIONS_FILE, data)
    return others or None


def differing(wanted: Mapping[str, str], there: Mapping[str, str]) -> str:
    """Which decisive versions are others, in words; empty if none is. A package that only one side has is no difference.

    A machine without faiss searches with torch, and gives the same bytes.
    """
    left, right = decisive(wanted), decisive(there)
    return ", ".join(f"{name} {right[name]}, not {left[name]}" for name in left if name in right and left[name] != right[name])
