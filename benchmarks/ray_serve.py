"""A Ray cluster of two nodes under load, while replicas and a node are lost and bundles change.

    pip install '.[ray]'
    sd35-trt build --out bundles/mini
    sd35-trt build --policy half --out bundles/half
    python benchmarks/ray_serve.py bundles/mini bundles/half [--requests 1000] [--connections 16]
    python benchmarks/ray_serve.py bundles/half bundles/half --only overhead,scaling --steps 8

Each node has a replica that draws, with one thread; the head has the ingresses. Each request has
its own seed. The parts, in this order:

overhead   one client asks in turn: what is beside drawing is the host's
killed     under load, a replica is killed, and later the second node, which is replaced
broken     under load, the engines of a replica fail from a moment on, until it is replaced
growing    of one replica that may become two: under load, and after it
scaling    pictures a second of one replica, and of two; for a machine of many cores
updated    under load, the first bundle is replaced by the second; and some requests afterwards

Every picture must be the one that its request gives alone; a request that is refused with 503 is
asked again once. The figures go to results/ray-serve.json too; the exit status is 1 where a request
was lost or swapped, a broken replica stayed, or the replicas did not follow the load.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
from ray_cluster import TWO, Application, cluster, replicas
from ray_load import Load, beside_drawing, expected

RESULTS = Path(__file__).parent / "results" / "ray-serve.json"

_PATIENCE = 120.0

# Of the part "growing": quick, so that it is seen.
_GROWING: Mapping[str, Any] = {
    "autoscaling_config": {
        "min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2,
        "upscale_delay_s": 1, "downscale_delay_s": 5, "metrics_interval_s": 1,
        "look_back_period_s": 2,
    },
    "max_replicas_per_node": 1,
}  # fmt: skip

# Of the part "broken": what fails before a replica is known to be broken may be told to clients.
_TOLD = 3


class Parts:
    """The parts of the benchmark.

    Args:
        own: serves the first bundle with two replicas.
        bundles: the first, and the one in its place.
        connections, steps, size: of the load.
        hashes: of each request's picture by the first bundle, and by the second.
    """

    def __init__(
        self, own: Application, bundles: tuple[Path, Path], connections: int, steps: int, size: str,
        hashes: tuple[list[str], list[str]],
    ) -> None:  # fmt: skip
        self._cluster, self._bundles = own, bundles
        self._connections, self._steps, self._size = connections, steps, size
        self._first, self._second = hashes

    def _load(
        self, hashes: list[set[str]], events: Mapping[int, Callable[[], None]] | None = None
    ) -> dict[str, Any]:
        load = Load(self._cluster.url, self._steps, self._size, hashes)
        load.run(self._connections, events or {})
        return load.figures()

    def _half(self) -> list[set[str]]:
        return [{one} for one in self._first[: len(self._second)]]

    def overhead(self) -> dict[str, Any]:
        """Milliseconds of a request that are not the pool's."""
        beside_drawing(self._cluster.url, self._steps, self._size, 20)
        found = beside_drawing(self._cluster.url, self._steps, self._size, 100)
        return {"beside_drawing_ms": found}

    def killed(self) -> dict[str, Any]:
        """A replica and a node are killed."""
        count, nodes = len(self._first), self._cluster.nodes
        events = {count // 5: nodes.kill_replica, count // 2: nodes.kill_node}
        return self._load([{one} for one in self._first], events)

    def broken(self) -> dict[str, Any]:
        """The engines of a replica fail; requests until it is told broken are answered so."""
        broken: list[Any] = []
        start = 0.0

        def fail() -> None:
            nonlocal start
            broken.append(self._cluster.nodes.break_engines())
            start = time.monotonic()

        half = self._half()
        found = self._load(half, {len(half) // 10: fail})
        # Ray ends it when what it had is answered.
        while broken[0].is_running() and time.monotonic() < start + _PATIENCE:
            time.sleep(0.1)
        found["replaced_after_s"] = None if broken[0].is_running() else time.monotonic() - start
        self._wait_for(2)
        found["failed"] = found["statuses"].get("500", 0)
        return found

    def growing(self) -> dict[str, Any]:
        """Replicas follow the load."""
        self._cluster.serve(self._bundles[0], _GROWING)
        self._wait_for(1)
        seen, loads = [replicas()], []
        start = time.monotonic()
        with ThreadPoolExecutor(1) as beside:
            while max(seen) < 2 and time.monotonic() < start + _PATIENCE:
                loaded = beside.submit(self._load, self._half())
                while not loaded.done():
                    seen.append(replicas())
                    time.sleep(0.2)
                loads.append(loaded.result())
        found = {**loads[-1], "wrong": [one for load in loads for one in load["wrong"]]}
        start = time.monotonic()
        self._wait_for(1)
        self._cluster.serve(self._bundles[0])
        return {
            **found, "replicas_before": seen[0], "replicas_under_load": max(seen),
            "one_again_after_s": time.monotonic() - start,
        }  # fmt: skip

    def scaling(self) -> dict[str, Any]:
        """Pictures a second of one replica, and of two."""
        found = {}
        for count in (1, 2):
            self._cluster.serve(self._bundles[0], {**TWO, "num_replicas": count})
            self._wait_for(count)
            self._load(self._half()[: 2 * self._connections])
            found[str(count)] = self._load(self._half())
        self._cluster.serve(self._bundles[0])
        return {**found, "times": found["2"]["per_second"] / found["1"]["per_second"]}

    def updated(self) -> dict[str, Any]:
        """The second bundle takes the first one's place."""
        either = [{one, two} for one, two in zip(self._first, self._second, strict=False)]
        found = self._load(
            either, {len(either) // 10: lambda: self._cluster.serve(self._bundles[1])}
        )
        after = [{one} for one in self._second[: 2 * self._connections]]
        return {**found, "after": self._load(after)}

    def _wait_for(self, count: int) -> None:
        end = time.monotonic() + _PATIENCE
        while replicas() != count:
            if time.monotonic() > end:
                raise RuntimeError(f"there are {replicas()} replicas, not {count}")
            time.sleep(0.2)


#: In the order in which they run.
PARTS = ("overhead", "killed", "broken", "growing", "scaling", "updated")


def measure(
    bundle: Path, other: Path, requests: int, connections: int, steps: int, size: str,
    only: Sequence[str] = PARTS,
) -> dict[str, Any]:  # fmt: skip
    """Run parts; JSON-serializable figures."""
    hashes = (expected(bundle, requests, steps, size), expected(other, requests // 2, steps, size))
    with cluster() as own:
        own.serve(bundle)
        parts = Parts(own, (bundle, other), connections, steps, size, hashes)
        found = {}
        for name in (name for name in PARTS if name in only):
            found[name] = getattr(parts, name)()
            print(f"{name}: {json.dumps(found[name])}", file=sys.stderr)
    return {
        "bundles": [bundle.name, other.name],
        "steps": steps,
        "size": size,
        "connections": connections,
        **found,
        "machine": {"cpus": os.cpu_count(), "system": platform.platform()},
    }


def table(figures: dict[str, Any]) -> tuple[str, bool]:
    """What was found, and whether all is well."""
    lines = [
        f"{figures['size']}, {figures['steps']} steps, {figures['connections']} connections",
        f"{'':28}{'sent':>6}{'drawn':>7}{'again':>7}{'wrong':>7}{'p50 s':>8}{'max s':>8}",
    ]
    wrong: list[str] = []
    for title, load in _loads(figures):
        lines.append(
            f"{title:28}{load['requests']:6}{load['statuses'].get('200', 0):7}"
            f"{load['asked_again']:7}{len(load['wrong']):7}"
            f"{load['seconds']['p50']:8.2f}{load['seconds']['max']:8.2f}"
        )
        told = load.get("failed", 0)
        wrong += load["wrong"] if len(load["wrong"]) != told or told > _TOLD else []
    if (found := figures.get("overhead")) is not None:
        lines.append(f"beside drawing, one client: {found['beside_drawing_ms']:.1f} ms")
    if (found := figures.get("broken")) is not None:
        after = found["replaced_after_s"]
        gone = "stayed" if after is None else f"gone after {after:.0f} s"
        lines.append(f"a broken replica: {gone}; {found['failed']} answers of 500")
        wrong += [] if after is not None else ["a broken replica stayed"]
    if (found := figures.get("growing")) is not None:
        most, last = found["replicas_under_load"], found["one_again_after_s"]
        lines.append(
            f"replicas: {found['replicas_before']}, under load {most}, 1 after {last:.0f} s"
        )
        wrong += [] if most == 2 else ["the replicas did not follow the load"]
    if (found := figures.get("scaling")) is not None:
        one, two = (found[count]["per_second"] for count in ("1", "2"))
        times = found["times"]
        lines.append(f"pictures a second: one replica {one:.1f}, two {two:.1f}, {times:.2f} times")
    return "\n".join([*lines, *wrong[:10]]), not wrong


def _loads(figures: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, title in _TITLES.items():
        if name in figures:
            yield title, figures[name]
    for count, found in figures.get("scaling", {}).items():
        if count != "times":
            yield f"replicas: {count}", found
    if "updated" in figures:
        yield "afterwards", figures["updated"]["after"]


_TITLES = {
    "killed": "a replica and a node killed",
    "broken": "engines of a replica fail",
    "growing": "one replica becomes two",
    "updated": "another bundle meanwhile",
}


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.argument("other", type=click.Path(path_type=Path, exists=True))
@click.option("--requests", default=1000, show_default=True)
@click.option("--connections", default=16, show_default=True)
@click.option("--steps", default=2, show_default=True)
@click.option("--size", default="64x64", show_default=True)
@click.option("--only", default=",".join(PARTS), show_default=True, metavar="PART,...")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS)
def main(
    bundle: Path, other: Path, requests: int, connections: int, steps: int, size: str, only: str,
    out: Path,
) -> None:  # fmt: skip
    """Load BUNDLE on a cluster, then OTHER in its place."""
    parts = only.split(",")
    if unknown := set(parts) - set(PARTS):
        raise click.UsageError(f"there is no part {min(unknown)}")
    figures = measure(bundle, other, requests, connections, steps, size, parts)
    text, well = table(figures)
    print(text)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    sys.exit(not well)


if __name__ == "__main__":
    main()
