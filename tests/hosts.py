"""Several hosts on this machine: each with an address, processes, a temporary folder and a shared memory of its own.

Every host is a set of Linux namespaces: network (an address on a bridge that is in a namespace itself, so that this machine's
own network is left alone), processes, host name, and mounts with a private `/tmp` and `/dev/shm`; home and working directory lie
in `/tmp`. So only the code is shared, and files meet in a store or nowhere. A host's end ends all its processes, whatever they
started, and no namespace has a name that would stay behind. Where the kernel or the rights forbid it, the test is skipped and
says why.
"""

import base64
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
_ALONE = ["setpriv", "--pdeathsig", "KILL", "unshare"]
"""The kernel ends what stands behind it when the test's process ends, killed ones included."""
_NAMESPACES = ["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts"]
_TRY = """
mount --make-rprivate / && mount -t tmpfs tmpfs /tmp && ip link add br0 type bridge && ip link add v0 type veth peer name v1
"""
_BEGIN = """
hostname {name} && mount --make-rprivate / && mount -t tmpfs -o size={disk} tmpfs /tmp &&
mount -t tmpfs -o size=256m tmpfs /dev/shm && mkdir /tmp/home && ip link set lo up &&
printf '127.0.0.1 localhost\n{address} {name}\n' > /tmp/hosts && mount --bind /tmp/hosts /etc/hosts &&
echo ready && exec sleep infinity
"""


def _try() -> None:
    """Skip the test unless everything that a host needs is granted here."""
    for tool in ("ip", "unshare", "nsenter", "setpriv"):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no '{tool}' here")
    tried = subprocess.run([*_ALONE, *_NAMESPACES, "bash", "-c", _TRY], capture_output=True, text=True)
    if tried.returncode != 0:
        pytest.skip(f"namespaces, or bridges and mounts in them, are refused here: {tried.stderr.strip()}")


class _Switch:
    """The bridge between all hosts."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([*_ALONE, "--net", "bash", "-c", "echo && exec sleep infinity"], stdout=subprocess.PIPE)
        assert self._process.stdout is not None and self._process.stdout.readline(), "the switch did not begin"
        self.ip("link", "add", "br0", "type", "bridge")
        self.ip("link", "set", "br0", "up")

    def ip(self, *words: str, namespace: int | None = None, may_fail: bool = False) -> None:
        """`ip`, in the switch's namespace or in that of another process."""
        command = ["nsenter", "--target", str(namespace or self._process.pid), "--net", "ip", *words]
        done = subprocess.run(command, capture_output=True, text=True)
        assert may_fail or done.returncode == 0, f"{command}: {done.stderr}"

    def end(self) -> None:
        _end(self._process)


class Host:
    """One of them; begins with `boot`."""

    def __init__(self, switch: _Switch, number: int, name: str, environment: dict[str, str], disk: str) -> None:
        self.name = name
        self.address = f"10.77.0.{number}"
        self._switch = switch
        self._number = number
        self._port = f"v{number}"
        self._environment = environment
        self._disk = disk
        self._init: subprocess.Popen[bytes] | None = None
        self._first = 0
        self._started: list[subprocess.Popen[str]] = []

    def boot(self) -> None:
        """Begin with an empty temporary folder and no process, whatever was there before."""
        self.kill()
        begin = _BEGIN.format(name=self.name, address=self.address, disk=self._disk)
        self._init = subprocess.Popen([*_ALONE, *_NAMESPACES, "bash", "-c", begin], stdout=subprocess.PIPE, env=self._environment)
        assert self._init.stdout is not None and self._init.stdout.readline() == b"ready\n", f"the host {self.name} did not begin"
        (first,) = psutil.Process(self._init.pid).children()
        self._first = first.pid
        ip = self._switch.ip
        # A host that boots anew keeps its network card, and the others remember the card's own address for a while.
        card = ["address", f"02:00:00:00:00:{self._number:02x}", "netns", str(self._first)]
        ip("link", "add", self._port, "type", "veth", "peer", "name", "eth0", *card)
        ip("link", "set", self._port, "master", "br0", "up")
        ip("addr", "add", f"{self.address}/24", "dev", "eth0", namespace=self._first)
        ip("link", "set", "eth0", "up", namespace=self._first)
        # Ray finds its own address by the route to anywhere, and by the host's name.
        ip("route", "add", "default", "dev", "eth0", namespace=self._first)

    @property
    def is_on(self) -> bool:
        """Whether it was booted and not killed since."""
        return self._init is not None

    def kill(self) -> None:
        """End it, and all that runs on it, as a power cut does."""
        if self._init is None:
            return
        _end(self._init)
        self._init = None
        # The kernel takes a dead host's cable away, too, but whenever it finds the time.
        self._switch.ip("link", "del", self._port, may_fail=True)
        for process in self._started:
            process.communicate()
        self._started.clear()

    def cut(self) -> None:
        """Pull its cable: packets get lost both ways, and nobody is told."""
        self._switch.ip("link", "set", self._port, "down")

    def heal(self) -> None:
        """Put the cable in again."""
        self._switch.ip("link", "set", self._port, "up")

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        """Run a command there; its input and output are pipes. It ends with the host, if not before."""
        pipe = subprocess.PIPE
        variables = {**self._environment, **environment}
        process = subprocess.Popen(self._enter(command), env=variables, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        self._started.append(process)
        return process

    def run(self, *command: str, stdin: str = "", timeout: float = 600, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command there to its end."""
        variables = {**self._environment, **environment}
        return subprocess.run(self._enter(command), env=variables, input=stdin, capture_output=True, text=True, timeout=timeout)

    def _enter(self, command: Sequence[str]) -> list[str]:
        assert self._init is not None, f"the host {self.name} is off"
        namespaces = ["--mount", "--pid", "--net", "--uts"]
        return ["nsenter", "--target", str(self._first), *namespaces, "bash", "-c", 'cd /tmp/home && exec "$@"', "bash", *command]

    def succeed(self, *command: str, stdin: str = "", timeout: float = 600) -> str:
        """Run a command there that must succeed; returns what it printed."""
        result = self.run(*command, stdin=stdin, timeout=timeout)
        assert result.returncode == 0, f"{self.name}: {command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
        return result.stdout

    def put(self, path: str, content: bytes) -> None:
        """Write a file there."""
        self.succeed("bash", "-c", f"mkdir -p $(dirname {path}) && base64 -d > {path}", stdin=base64.b64encode(content).decode())


@contextmanager
def hosts(*names: str, disk: str = "1g", **environment: str) -> Iterator[list[Host]]:
    """As many hosts on one network, 10.77.0.1 and so on.

    Args:
        names: of the hosts.
        disk: size of each one's temporary folder, which lies in memory.
        environment: of every process on them.
    """
    _try()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {"PATH": path, "PYTHONPATH": str(REPOSITORY), "HOME": "/tmp/home", "NO_PROXY": "*", "LANG": "C.UTF-8"}
    variables |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"} | environment
    with ExitStack() as undo:
        switch = _Switch()
        undo.callback(switch.end)
        made = [Host(switch, number, name, variables, disk) for number, name in enumerate(names, 1)]
        for host in made:
            undo.callback(host.kill)
            host.boot()
        yield made


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
