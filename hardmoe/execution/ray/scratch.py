"""Where a Ray of our own keeps its sockets and logs: one directory per driver, removed at its end, whatever the end.

A driver that was killed cannot remove its directory; the next one on the machine does, when the process that is named in it
certainly runs no more. Rejected: Ray's own `/tmp/ray`, which grows until somebody looks, and deleting by age, which takes the
sockets away from a run of several days.
"""

import contextlib
import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

from hardmoe.artifacts.lease import Holder, is_dead, this_process

PREFIX = "hardmoe-ray-"
_HOLDER = "holder.json"
_LONGEST_PARENT = 20
"""Ray's Unix sockets, some 85 characters below it, must stay under the 107 bytes that the kernel allows."""


def make_scratch() -> Path:
    """A new directory for this process; those of processes that are gone are deleted."""
    parent = Path(tempfile.gettempdir())
    if len(os.fsencode(parent)) > _LONGEST_PARENT:
        parent = Path("/tmp")
    for directory in parent.glob(f"{PREFIX}*"):
        if _is_abandoned(directory):
            # A process that is just dying may still write there; what is left now goes the next time.
            shutil.rmtree(directory, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    (scratch / _HOLDER).write_text(json.dumps(asdict(this_process())))
    return scratch


def _is_abandoned(directory: Path) -> bool:
    with contextlib.suppress(OSError, ValueError, TypeError):
        mine = directory.stat(follow_symlinks=False).st_uid == os.getuid()
        return mine and is_dead(Holder(**json.loads((directory / _HOLDER).read_text())))
    return False
