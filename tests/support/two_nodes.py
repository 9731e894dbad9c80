"""A Ray cluster of several nodes on one machine, started as the documentation says: `ray start`.

Every node's processes carry a mark in their environment, by which the node can be killed as a
whole, like a machine that loses power, and nothing of another cluster is ever touched.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from processes import REPOSITORY, clean_environment

MARK = "SOUNDMIND_TEST_NODE"
START_LIMIT = 300  # seconds until a node has joined


class Node:
    """One `ray start --block`; `kill` ends everything it has started, at once."""

    def __init__(
        self, python: Path, arguments: list[str], environment: dict[str, str], log: Path
    ) -> None:
        self.mark = uuid.uuid4().hex
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [str(python), "-m", "ray.scripts.scripts", "start", "--block", *arguments],
                cwd=REPOSITORY,
                env=clean_environment(
                    **environment,
                    **{
                        MARK: self.mark,
                        # A node is given up after three seconds without an answer, not fifteen.
                        "RAY_health_check_period_ms": "1000",
                        "RAY_health_check_failure_threshold": "3",
                        "RAY_prestart_worker_first_driver": "0",  # twelve idle processes a node
                    },
                ),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def processes(self) -> list[int]:
        """Ids of all living processes of this node: daemons, workers and what those started."""
        entry = f"{MARK}={self.mark}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if entry in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        return found

    def commands(self, word: str) -> list[str]:
        """Command lines of this node's processes that contain `word`."""
        found = []
        for process in self.processes():
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace")
                if word in line:
                    found.append(line)
        return found

    def kill(self) -> None:
        """kill -9 to every process of the node, until none is left."""
        while found := self.processes():
            for process in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.1)
        self.process.wait()


class Cluster:
    """A head and any number of workers.

    `address` is what `ray_init.address` takes; `environment` is what every node and the launcher
    need to be let in: a token of this cluster's own, so that no other one can be meant.
    """

    def __init__(self, folder: Path, sockets: Path, cpus: int = 12) -> None:
        self._folder = folder
        self._sockets = sockets
        self._python = interpreter(sockets)
        self._cpus = cpus
        self._port = free_port()
        self.address = f"127.0.0.1:{self._port}"
        self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex * 2}
        self.nodes: list[Node] = []

    @property
    def head(self) -> Node:
        return self.nodes[0]

    def start_head(self) -> Node:
        return self._start(
            *("--head", f"--port={self._port}", f"--temp-dir={self._sockets}"),
            *("--include-dashboard=false", f"--ray-client-server-port={free_port()}"),
        )

    def add_worker(self) -> Node:
        return self._start(f"--address={self.address}")

    def _start(self, *arguments: str) -> Node:
        node = Node(
            self._python,
            [
                *arguments,
                "--node-ip-address=127.0.0.1",
                f"--num-cpus={self._cpus}",
                "--num-gpus=1",  # Ray does not check hardware
                "--object-store-memory=500000000",
                # The defaults are fixed ranges, which a second node or cluster here would share.
                *("--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats"),
            ],
            self.environment,
            self._folder / f"node-{len(self.nodes)}.log",
        )
        self.nodes.append(node)
        deadline = time.monotonic() + START_LIMIT
        while "Ray runtime started" not in node.log.read_text():
            assert node.process.poll() is None, node.log.read_text()[-3000:]
            assert time.monotonic() < deadline, node.log.read_text()[-3000:]
            time.sleep(0.2)
        return node


def interpreter(folder: Path) -> Path:
    """This interpreter, through a link in `folder` if there is a space in its path.

    `ray start` cannot come up from such a path: it names libraries in LD_PRELOAD, which the loader
    splits at spaces, and ends when the first of its processes does.
    """
    if " " not in sys.prefix:
        return Path(sys.executable)
    environment = folder / "environment"
    environment.symlink_to(sys.prefix)
    return environment / "bin" / "python"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster with its head running; every process of it is gone afterwards."""
    # Sockets of Ray need a path below 107 characters, so not under pytest's folders.
    sockets = Path(tempfile.mkdtemp(prefix="sm-2n-", dir="/tmp"))
    made = Cluster(folder, sockets)
    try:
        made.start_head()
        yield made
    finally:
        for node in reversed(made.nodes):
            node.kill()
        shutil.rmtree(sockets, ignore_errors=True)
