"""Machines on one: each has a network address, processes, a name and mounts of its own (Linux namespaces, as root).

    bridge 10.213.1.254 -- veth -- machine 10.213.1.1, 10.213.1.2, ...
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

NETS = iter(range(1, 255))  # 10.213.N, one a call: a module's machines may stand beside a test's own
TOOLS = ("ip", "nsenter", "unshare", "mount", "hostname")


def missing() -> str:
    """Why there can be no machines here, or nothing."""
    if os.geteuid() != 0:
        return "network namespaces want root"
    lacking = [tool for tool in TOOLS if shutil.which(tool) is None]
    if lacking:
        return f"not installed: {', '.join(lacking)} (Debian: iproute2, util-linux, hostname)"
    probe = f"bd{os.getpid()}p"
    tried = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if tried.returncode:
        return f"no network namespaces here: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return ""


def tell(*words: str | Path) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True)


@dataclass
class Machine:
    """`init` is its first process; all others die with it."""

    name: str
    address: str
    space: subprocess.Popen[bytes]

    @property
    def init(self) -> int:
        return int(Path(f"/proc/{self.space.pid}/task/{self.space.pid}/children").read_text().split()[0])

    def inside(self, words: Sequence[str]) -> list[str]:
        """The words as a command that runs there."""
        return ["nsenter", f"--target={self.init}", "--net", "--pid", "--uts", "--mount", "--wd=/", "--", *words]

    def tell(self, *words: str | Path) -> None:
        tell(*self.inside([str(word) for word in words]))

    @contextlib.contextmanager
    def instead(self, target: Path, other: Path | None = None) -> Iterator[None]:
        """In `target`'s place this machine sees `other`, or an empty disk of its own."""
        source = ("--bind", other) if other else ("-t", "tmpfs", "own")
        self.tell("mount", *source, target)
        try:
            yield
        finally:
            self.tell("umount", "-l", target)

    def die(self) -> None:
        """As when the power goes."""
        self.space.kill()
        self.space.wait()


@contextlib.contextmanager
def machines(count: int, own: Path) -> Iterator[list[Machine]]:
    """`count` of them; the folder `own` is another, empty one on each. All is taken down at the end."""
    net = next(NETS)
    tag = f"bd{os.getpid() % 100000}x{net}"  # short: a link's name has 15 letters at most
    with contextlib.ExitStack() as stack:
        tell("ip", "link", "add", tag, "type", "bridge")
        stack.callback(tell, "ip", "link", "del", tag)
        tell("ip", "address", "add", f"10.213.{net}.254/24", "dev", tag)
        tell("ip", "link", "set", tag, "up")
        numbers = range(1, count + 1)
        yield [stack.enter_context(machine(tag, number, f"10.213.{net}.{number}", own)) for number in numbers]


@contextlib.contextmanager
def machine(tag: str, number: int, address: str, own: Path) -> Iterator[Machine]:
    name, link = f"{tag}n{number}", f"{tag}v{number}"
    hosts = Path("/etc/netns") / name
    with contextlib.ExitStack() as stack:
        tell("ip", "netns", "add", name)
        stack.callback(tell, "ip", "netns", "del", name)
        tell("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        tell("ip", "link", "set", link, "master", tag, "up")
        for words in (f"address add {address}/24 dev eth0", "link set eth0 up", "link set lo up"):
            tell("ip", "-n", name, *words.split())
        hosts.mkdir(parents=True)  # `ip netns exec` lays what is there over /etc
        stack.callback(shutil.rmtree, hosts)
        (hosts / "hosts").write_text(f"127.0.0.1 localhost\n{address} {name}\n")
        begin = f"hostname {name} && mount -t tmpfs own {own} && echo up && sleep infinity & wait"
        spaces = ["unshare", "--pid", "--uts", "--mount", "--fork", "--mount-proc", "--kill-child"]
        words = ["ip", "netns", "exec", name, *spaces, "sh", "-c", begin]
        space = subprocess.Popen(words, stdout=subprocess.PIPE)
        made = Machine(name, address, space)
        stack.callback(made.die)
        assert space.stdout is not None and space.stdout.readline() == b"up\n", f"{name} does not come up"
        yield made


def reaches(machine: Machine, address: str, port: int, seconds: float = 120) -> None:
    """Waits until something listens there."""
    end = time.monotonic() + seconds
    probe = machine.inside(["bash", "-c", f"exec 3<>/dev/tcp/{address}/{port}"])
    while subprocess.run(probe, capture_output=True).returncode:
        assert time.monotonic() < end, f"{address}:{port} is silent"
        time.sleep(0.5)
