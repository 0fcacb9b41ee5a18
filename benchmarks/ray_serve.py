"""A Ray cluster of two nodes under load, while a replica and a node are killed and bundles change.

    pip install '.[ray]'
    sd35-trt build --out bundles/mini
    sd35-trt build --policy half --out bundles/half
    python benchmarks/ray_serve.py bundles/mini bundles/half [--requests 1000] [--connections 16]

Each node has a replica that draws; the head has the ingresses. Each request has its own seed. First
one client asks in turn: what is beside drawing is the host's. Then, under load, a replica is
killed, and later the second node, which is replaced. Last, under load, the first bundle is
replaced by the second. Every picture must be the one that its request gives alone; a request that
is refused with 503 is asked again once. The figures go to results/ray-serve.json too; the exit
status is 1 where a request was lost, swapped or failed.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import io
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import httpx
import numpy as np
import psutil
import yaml
from PIL import Image
from serve import body, percentiles
from serve_targets import PATH

from sd35_trt.runtime import Pipeline

RESULTS = Path(__file__).parent / "results" / "ray-serve.json"
CONFIGURATION = Path(__file__).parents[1] / "serving" / "deploy" / "ray.yaml"

#: Of a replica that draws, as its process is called.
DRAWER = "ray::ServeReplica:sd35:Drawer"

_MODEL = "one"
_PATIENCE = 120.0


def picture_hash(pixels: np.ndarray) -> str:
    """What tells a picture, uint8 [H, W, 3], from others."""
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def expected(bundle: Path, count: int, steps: int, size: str) -> list[str]:
    """The hash of each request's picture, drawn alone."""
    width, height = map(int, size.split("x"))
    hashes = []
    with Pipeline.load(bundle, threads=1) as pipe:
        for number in range(count):
            asked = body(number, steps, size)
            drawn = pipe.generate(
                asked["prompt"], seed=asked["seed"], steps=steps, size=(width, height)
            )
            hashes.append(picture_hash(drawn.images[0]))
    return hashes


class Nodes:
    """A cluster on this machine: a head, and one node more."""

    def __init__(self) -> None:
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

    def close(self) -> None:
        """End it all."""
        self._ray.shutdown()
        self._cluster.shutdown()


@contextlib.contextmanager
def application(nodes: Nodes) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """The application of the configuration that users have, on a free port.

    Yields:
        Its URL, and a function that serves a bundle from then on.
    """
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()

        def serve(bundle: Path) -> None:
            file = Path(folder) / "serve.yaml"
            file.write_text(yaml.safe_dump(configuration(bundle, port)), "utf-8")
            command = [str(Path(sys.executable).parent / "serve"), "run", str(file)]
            command += ["--address", nodes.address, "--non-blocking"]
            subprocess.run(command, check=True, capture_output=True)
            wait_for_replicas()

        yield f"http://127.0.0.1:{port}", serve


def wait_for_replicas() -> None:
    """Until the application runs as its configuration says.

    Raises:
        RuntimeError: it does not, in good time.
    """
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


def configuration(bundle: Path, port: int) -> dict[str, Any]:
    """The configuration with one bundle, for CPUs, without a token."""
    found = yaml.safe_load(CONFIGURATION.read_text("utf-8"))
    found["http_options"] = {"host": "127.0.0.1", "port": port}
    application = found["applications"][0]
    application["args"] = {"bundles": [f"{_MODEL}={bundle.resolve()}"], "threads": 1}
    ingress, drawer = application["deployments"]
    ingress["ray_actor_options"]["num_cpus"] = 0.5
    drawer["ray_actor_options"] = {"num_cpus": 1}
    del drawer["autoscaling_config"]
    drawer["num_replicas"] = 2
    drawer["max_replicas_per_node"] = 1
    return found


@dataclass
class Load:
    """Requests from clients that ask again as soon as they are answered.

    Attributes:
        hashes: what each request may give.
        sent: how many requests.
        statuses: how many answers had each.
        again: requests that were refused with 503, and asked again.
        wrong: what did not end as it should.
        seconds: each request took.
    """

    url: str
    steps: int
    size: str
    hashes: list[set[str]]
    sent: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    again: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def run(self, connections: int, events: Mapping[int, Callable[[], None]]) -> None:
        """Send each request once.

        Args:
            events: called, in this thread, when so many were sent.
        """
        with ThreadPoolExecutor(1) as beside:
            sending = beside.submit(asyncio.run, self._send(connections))
            for number, event in events.items():
                while self.sent < number and not sending.done():
                    time.sleep(0.005)
                event()
            sending.result()

    async def _send(self, connections: int) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=_PATIENCE) as client:
            await asyncio.gather(*(self._client(client) for _ in range(connections)))

    async def _client(self, client: httpx.AsyncClient) -> None:
        while self.sent < len(self.hashes):
            number = self.sent
            self.sent += 1
            start = time.perf_counter()
            response = await self._ask(client, number)
            if response is not None and response.status_code == 503:
                self.again += 1
                await asyncio.sleep(float(response.headers.get("Retry-After", "1")))
                response = await self._ask(client, number)
            self.seconds.append(time.perf_counter() - start)
            self._check(number, response)

    async def _ask(self, client: httpx.AsyncClient, number: int) -> httpx.Response | None:
        try:
            response = await client.post(PATH, json=body(number, self.steps, self.size))
        except httpx.TransportError as error:
            self.statuses[type(error).__name__] += 1
            return None
        self.statuses[str(response.status_code)] += 1
        return response

    def _check(self, number: int, response: httpx.Response | None) -> None:
        if response is None or response.status_code != 200:
            text = "no answer" if response is None else response.text[:200]
            self.wrong.append(f"request {number} is lost: {text}")
            return
        picture = response.json()["data"][0]
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture["b64_json"]))))
        if picture["seed"] != number or picture_hash(pixels) not in self.hashes[number]:
            self.wrong.append(f"request {number} has another picture")

    def figures(self) -> dict[str, Any]:
        """JSON-serializable."""
        return {
            "requests": len(self.hashes),
            "statuses": dict(sorted(self.statuses.items())),
            "asked_again": self.again,
            "wrong": self.wrong,
            "seconds": percentiles(self.seconds),
        }


def beside_drawing(url: str, steps: int, size: str, count: int) -> float:
    """Milliseconds of a request that are not the pool's, at the median, of one client."""
    taken = []
    with httpx.Client(base_url=url, timeout=_PATIENCE) as client:
        for number in range(count):
            start = time.perf_counter()
            answer = client.post(PATH, json=body(number, steps, size)).raise_for_status().json()
            taken.append(time.perf_counter() - start - answer["timings"]["total"])
    return 1e3 * statistics.median(taken)


def measure(
    bundle: Path, other: Path, requests: int, connections: int, steps: int, size: str
) -> dict[str, Any]:
    """Run it all; JSON-serializable figures."""
    first = expected(bundle, requests, steps, size)
    second = expected(other, requests // 2, steps, size)
    nodes = Nodes()
    try:
        with application(nodes) as (url, serve):
            serve(bundle)
            host = beside_drawing(url, steps, size, 100)
            killed = Load(url, steps, size, [{one} for one in first])
            killed.run(
                connections, {requests // 5: nodes.kill_replica, requests // 2: nodes.kill_node}
            )
            either = [{one, two} for one, two in zip(first, second, strict=False)]
            updated = Load(url, steps, size, either)
            updated.run(connections, {len(either) // 10: lambda: serve(other)})
            after = Load(url, steps, size, [{one} for one in second[: 2 * connections]])
            after.run(connections, {})
    finally:
        nodes.close()
    return {
        "bundles": [bundle.name, other.name],
        "steps": steps,
        "size": size,
        "connections": connections,
        "beside_drawing_ms": host,
        "killed": killed.figures(),
        "updated": updated.figures(),
        "after": after.figures(),
        "machine": {"cpus": os.cpu_count(), "system": platform.platform()},
    }


def table(figures: dict[str, Any]) -> tuple[str, bool]:
    """What was found, and whether all is well."""
    lines = [
        f"{figures['size']}, {figures['steps']} steps, {figures['connections']} connections",
        f"beside drawing, one client: {figures['beside_drawing_ms']:.1f} ms",
        f"{'':28}{'sent':>6}{'drawn':>7}{'again':>7}{'wrong':>7}{'p50 s':>8}{'max s':>8}",
    ]
    for name, title in _TITLES.items():
        load = figures[name]
        lines.append(
            f"{title:28}{load['requests']:6}{load['statuses'].get('200', 0):7}"
            f"{load['asked_again']:7}{len(load['wrong']):7}"
            f"{load['seconds']['p50']:8.2f}{load['seconds']['max']:8.2f}"
        )
        lines += load["wrong"][:5]
    return "\n".join(lines), not any(figures[name]["wrong"] for name in _TITLES)


_TITLES = {
    "killed": "a replica and a node killed",
    "updated": "another bundle meanwhile",
    "after": "afterwards",
}


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.argument("other", type=click.Path(path_type=Path, exists=True))
@click.option("--requests", default=1000, show_default=True)
@click.option("--connections", default=16, show_default=True)
@click.option("--steps", default=2, show_default=True)
@click.option("--size", default="64x64", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS)
def main(
    bundle: Path, other: Path, requests: int, connections: int, steps: int, size: str, out: Path
) -> None:
    """Load BUNDLE on a cluster, then OTHER in its place."""
    figures = measure(bundle, other, requests, connections, steps, size)
    text, well = table(figures)
    print(text)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    sys.exit(not well)


if __name__ == "__main__":
    main()
