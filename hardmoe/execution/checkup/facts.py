"""The facts about one machine, measured on it: plain JSON, so that they travel from any node.

Nothing is judged here. A machine does not know what the driver has, or what the run was begun with; `findings` does. GPUs are
tried in a child process, since a wheel without kernels for the card may abort or hang instead of raising, and a Ray task that
was given no GPU does not see any. Rejected: asking Ray for all of it, which knows what was declared and not what works.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from hardmoe.artifacts.provenance import versions
from hardmoe.config import Json
from hardmoe.errors import HardmoeError
from hardmoe.storage import LocalStorage, join, open_storage

PLACE = "_doctor"
"""Directory in the root for the files of the check; gone afterwards."""
_SHARED_MEMORY = Path("/dev/shm")
_TRANSFER_BYTES = 16 * 2**20
_PROBE_SECONDS = 120.0
_DECODE_SECONDS = 0.3
_PICTURE_SIDE = 500
_MAX_PIXELS = 10**6

_GPU_PROBE = """
import json, torch
from hardmoe.neighbours import faiss_engine
found = []
for index in range(torch.cuda.device_count()):
    free, total = torch.cuda.mem_get_info(index)
    try:
        with torch.cuda.device(index):
            eye = torch.eye(64, device="cuda")
            assert torch.equal(torch.relu(eye @ eye), eye), "wrong product"
            torch.nn.functional.conv2d(eye.reshape(1, 1, 64, 64), eye[:3, :3].reshape(1, 1, 3, 3)).sum().item()
        problem = None
    except (RuntimeError, AssertionError) as error:
        problem = str(error).strip().splitlines()[0]
    found.append({"name": torch.cuda.get_device_name(index), "free": free, "total": total, "problem": problem})
faiss = "there are no GPUs in this build of faiss" if not faiss_engine.num_gpus() else faiss_engine.probe_gpu()
print(json.dumps({"gpus": found, "faiss": faiss}))
"""


def measure(root: str | None, image_size: int, token: str) -> Json:
    """All facts.

    Args:
        root: the run's root, if there is one to look at.
        image_size: side to which images are resized.
        token: name of the driver's file in the root, which this machine is to see; empty on the driver itself.
    """
    memory = psutil.virtual_memory()
    scratch = Path(tempfile.gettempdir())
    return {
        "host": socket.gethostname(),
        "versions": versions(),
        "cpus": os.cpu_count() or 1,
        "memory": {"free": min(memory.available, _container_limit(memory.total)), "total": memory.total},
        "shared_memory": _free(_SHARED_MEMORY) if _SHARED_MEMORY.exists() else None,
        "disk": {"path": str(scratch), "free": _free(scratch)},
        "decode": _decoding_rate(image_size),
        "accelerators": _gpus(),
        "root": None if root is None else look_at_root(root, token),
    }


def look_at_root(root: str, token: str) -> Json:
    """Whether the root is the driver's, can be written, and how fast bytes go there and back (one file of 16 MiB)."""
    name = join(PLACE, secrets.token_hex(8))
    try:
        storage = open_storage(root)
        if token and not storage.exists(join(PLACE, token)):
            return {"problem": "unseen"}
        data = os.urandom(_TRANSFER_BYTES)
        began = time.perf_counter()
        storage.write_bytes(name, data)
        written = time.perf_counter()
        same = hashlib.sha256(storage.read_bytes(name)).digest() == hashlib.sha256(data).digest()
        read = time.perf_counter()
        exclusive = storage.create(f"{name}-once", b"1") and not storage.create(f"{name}-once", b"2")
        storage.delete_tree(name)
        storage.delete_tree(f"{name}-once")
    except HardmoeError as error:
        return {"problem": str(error)}
    problem = None if same and exclusive else "altered" if not same else "not exclusive"
    free = _free(storage.directory) if isinstance(storage, LocalStorage) else None
    rates = {"write": _TRANSFER_BYTES / (written - began), "read": _TRANSFER_BYTES / (read - written)}
    return {"problem": problem, "free": free, **rates}


def _free(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _container_limit(total: int) -> int:
    """Bytes that a container's memory limit leaves; those of the whole machine without one."""
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        return max(0, limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return total


def _decoding_rate(size: int) -> float:
    """Images per second that one thread decodes and resizes, of 500 x 500 pixels of JPEG."""
    import numpy as np
    import simplejpeg

    from hardmoe.data.images import load_square

    ramp = np.linspace(0.0, 6.0, _PICTURE_SIDE)
    waves = np.sin(ramp[:, None, None] * [3.0, 5.0, 7.0] + ramp[None, :, None] ** 2)
    noise = np.random.default_rng(0).normal(0.0, 8.0, waves.shape)
    picture = np.clip(127.0 + 100.0 * waves + noise, 0, 255).astype(np.uint8)
    encoded = simplejpeg.encode_jpeg(picture, quality=85, colorspace="RGB", colorsubsampling="420")
    load_square(encoded, size, _MAX_PIXELS)
    done, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < _DECODE_SECONDS:
        load_square(encoded, size, _MAX_PIXELS)
        done += 1
    return done / elapsed


def _gpus() -> Json:
    """What the kernel has of GPUs, what torch sees, and whether torch and faiss can compute there."""
    try:
        present = len(list(Path("/proc/driver/nvidia/gpus").iterdir()))
    except OSError:
        present = 0
    if not present and not list(Path("/dev").glob("nvidia[0-9]*")):
        return {"present": 0, "gpus": [], "faiss": None}
    environment = dict(os.environ)
    if environment.get("CUDA_VISIBLE_DEVICES") == "":  # so Ray hides them from tasks that asked for none
        del environment["CUDA_VISIBLE_DEVICES"]
    command = [sys.executable, "-c", _GPU_PROBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_SECONDS, env=environment, check=True)
        return {"present": present, **json.loads(done.stdout.splitlines()[-1])}
    except subprocess.TimeoutExpired:
        problem = f"the GPU probe hung for {_PROBE_SECONDS:g} s"
    except subprocess.CalledProcessError as error:
        problem = (error.stderr.strip().splitlines() or [f"the GPU probe ended with code {error.returncode}"])[-1]
    return {"present": present, "gpus": [], "faiss": None, "problem": problem}
