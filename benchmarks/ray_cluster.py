"""A Ray cluster of two nodes on this machine, with the application that users configure."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from ray_faults import FAULT

CONFIGURATION = Path(__file__).parents[1] / "serving" / "deploy" / "ray.yaml"

#: Of a replica that draws, as its process is called.
DRAWER = "ray::ServeReplica:sd35:Drawer"

#: Of Ray's nodes, as docs/ray.md has them.
SETTINGS = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),
}

#: What clients send.
TOKEN = "a-token-of-a-benchmark"

#: Two replicas, one a node.
TWO: Mapping[str, Any] = {"num_replicas": 2, "max_replicas_per_node": 1}

_MODEL = "one"
_PATIENCE = 120.0


class Nodes:
    """A head, and one node more.

    Args:
        folder: an empty one, for what the processes share.

    Attributes:
        address: of the head.
        fault: whose text is the number of a process that draws, and whose engines are to fail.
    """

    def __init__(self, folder: Path) -> None:
        self.fault = folder / "fault"
        # Ray's processes have it from here.
        os.environ |= SETTINGS | {FAULT: str(self.fault)}
        own = str(Path(__file__).parent)
        os.environ["PYTHONPATH"] = os.pathsep.join(
            [own, *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        import ray
        from ray.cluster_utils import Cluster

        # CPUs are what replicas ask for: one that draws a node, and the ingresses at the head.
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3})
        self._second = self._cluster.add_node(num_cpus=1)
        self.address: str = self._cluster.address
        self._ray = ray
        ray.init(self.address, log_to_driver=False, logging_level="ERROR")

    def drawers(self) -> list[psutil.Process]:
        """The processes that draw."""
        return [
            process
            for process in psutil.process_iter(["cmdline"])
            if any(DRAWER in word for word in process.info["cmdline"] or ())
        ]

    def kill_replica(self) -> None:
        """End a process that draws, one of the head's node."""
        second = self._second.all_processes["raylet"][0].process.pid
        own = [one for one in self.drawers() if one.ppid() != second]
        os.kill(own[0].pid, signal.SIGKILL)

    def kill_node(self) -> None:
        """End the second node and all that runs there at once; another takes its place."""
        self._cluster.remove_node(self._second, allow_graceful=False)
        self._second = self._cluster.add_node(num_cpus=1)

    def break_engines(self) -> psutil.Process:
        """Have the engines of a process fail from now on, which it is."""
        broken = self.drawers()[0]
        self.fault.write_text(str(broken.pid), "utf-8")
        return broken

    def close(self) -> None:
        """End it all."""
        self._ray.shutdown()
        self._cluster.shutdown()


@dataclass(frozen=True)
class Application:
    """The application of the configuration that users have.

    Attributes:
        url: where it is.
    """

    nodes: Nodes
    folder: Path
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def serve(self, bundle: Path, drawer: Mapping[str, Any] = TWO) -> None:
        """Serve a bundle from now on.

        Args:
            drawer: settings of the replicas that draw.

        Raises:
            RuntimeError: it does not run in good time.
        """
        token, file = self.folder / "token", self.folder / "serve.yaml"
        token.write_text(TOKEN, "utf-8")
        file.write_text(yaml.safe_dump(configuration(bundle, self.port, token, drawer)), "utf-8")
        # From elsewhere than the repository, whose folders have names of packages.
        command = [sys.executable, "-c", "from ray.serve.scripts import cli; cli()", "run"]
        command += [str(file), "--address", self.nodes.address, "--non-blocking"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.folder)
        if done.returncode:
            raise RuntimeError(f"serve run ended with status {done.returncode}: {done.stderr}")
        _wait_until_it_runs()


@contextlib.contextmanager
def cluster() -> Iterator[Application]:
    """Two nodes, and an application on a free port that serves nothing yet."""
    with tempfile.TemporaryDirectory() as name:
        nodes = Nodes(Path(name))
        try:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            yield Application(nodes, Path(name), port)
        finally:
            nodes.close()


def replicas() -> int:
    """How many replicas draw now."""
    from ray import serve

    drawer = serve.status().applications["sd35"].deployments["Drawer"]
    return sum(count for state, count in drawer.replica_states.items() if state == "RUNNING")


def _wait_until_it_runs() -> None:
    from ray import serve

    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        found = serve.status().applications.get("sd35")
        if found is not None and found.status == "RUNNING":
            return
        if found is not None and found.status == "DEPLOY_FAILED":
            break
        time.sleep(0.1)
    raise RuntimeError(f"the application does not run: {found}")


def configuration(
    bundle: Path, port: int, token: Path, drawer: Mapping[str, Any]
) -> dict[str, Any]:
    """The configuration with one bundle, for CPUs, whose replicas fail where they are told to.

    Args:
        token: file with the clients' token.
        drawer: settings of the replicas that draw.
    """
    found: dict[str, Any] = yaml.safe_load(CONFIGURATION.read_text("utf-8"))
    found["http_options"] = {"host": "127.0.0.1", "port": port}
    application = found["applications"][0]
    application["import_path"] = "ray_faults:build"
    application["args"] = {
        "bundles": [f"{_MODEL}={bundle.resolve()}"], "threads": 1, "token_file": str(token)
    }  # fmt: skip
    ingress, own = application["deployments"]
    ingress["ray_actor_options"]["num_cpus"] = 0.5
    own["ray_actor_options"] = {"num_cpus": 1}
    del own["autoscaling_config"]
    own |= drawer
    return found
