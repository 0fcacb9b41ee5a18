"""A server under load from clients of all kinds: good ones, and those that leave, garble or flood.

    sd35-trt build --out bundles/mini
    python benchmarks/serve_soak.py bundles/mini [--requests 2000] [--connections 32]

Every picture must be the one that its request gives alone, everything else must be refused as it
should be, no request may be lost, and the server's memory must be flat after the first tenth. The
table goes to results/serve-soak.json too; the exit status is 1 where a figure is missed.
"""

from __future__ import annotations

import base64
import io
import json
import random
import socket
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import httpx
import numpy as np
import psutil
from PIL import Image
from server_process import server
from soak import FLAT

from sd35_trt.runtime import Pipeline

RESULTS = Path(__file__).parent / "results" / "serve-soak.json"

_PATH = "/v1/images/generations"
_PROMPTS = ("a red star", "two blue squares", "a small green circle on white", "no ring, a cross")
_SIZE = (64, 64)

# What becomes of a request, and how often of a hundred.
_KINDS = {"draw": 70, "stream": 15, "leave": 6, "malformed": 5, "oversize": 4}

_BODY_LIMIT = 1 << 20
_PATIENCE = 120.0

_MALFORMED = (
    b"{", b"[]", b"\xff\xfe", b'{"prompt": 5}', b'{"prompt": "a", "steps": 0}',
    b'{"prompt": "a", "size": "1x1"}', b'{"prompt": "a", "adapters": []}', b"",
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What becomes of it, and what is asked for."""

    kind: str
    body: dict[str, Any]

    @property
    def picture(self) -> tuple[Any, ...]:
        """What decides the picture."""
        return tuple(sorted(self.body.items()))


def make_requests(count: int, steps: int, seed: int = 0) -> list[Request]:
    """Requests by chance: four prompts, six seeds, three guidances, two numbers of steps."""
    rng = random.Random(seed)
    kinds = rng.choices(list(_KINDS), list(_KINDS.values()), k=count)
    return [
        Request(
            kind,
            {
                "prompt": rng.choice(_PROMPTS),
                "seed": rng.randrange(6),
                "guidance": rng.choice((1.0, 3.0, 5.0)),
                "steps": steps + rng.randrange(2),
            },
        )
        for kind in kinds
    ]


def soak(bundle: Path, count: int, steps: int, connections: int) -> dict[str, Any]:
    """Run it; JSON-serializable figures, of which ``wrong`` lists all that did not end as it
    should.
    """
    requests = make_requests(count, steps)
    expected: dict[tuple[Any, ...], np.ndarray] = {}
    with Pipeline.load(bundle, threads=1) as pipe:
        for request in requests:
            if request.picture not in expected:
                drawn = pipe.generate(**request.body, size=_SIZE)
                expected[request.picture] = drawn.images[0]
    # Half of the clients can wait, so that the server is busy at times.
    options = ("--queue", str(max(1, connections // 2)), "--body-limit", str(_BODY_LIMIT))
    with server(bundle, *options) as (url, process):
        figures = _send(url, process, requests, expected, connections)
    return {"requests": count, "connections": connections, "steps": [steps, steps + 1], **figures}


class _Client(threading.local):
    """A connection for each thread."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=_PATIENCE)


def _send(
    url: str,
    process: psutil.Process,
    requests: list[Request],
    expected: dict[tuple[Any, ...], np.ndarray],
    connections: int,
) -> dict[str, Any]:
    client = _Client(url)
    lock = threading.Lock()
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    memory: list[int] = []
    busy = 0

    def call(number: int) -> None:
        nonlocal busy
        request = requests[number]
        while True:
            outcome, fault = _one(client.http, request, expected[request.picture], number)
            if outcome != "busy":
                break
            with lock:
                busy += 1
            time.sleep(0.02)
        with lock:
            outcomes[f"{request.kind}: {outcome}"] += 1
            if fault:
                wrong.append(f"request {number}, {request.kind}: {fault}")
            memory.append(process.memory_info().rss)

    start = time.perf_counter()
    with ThreadPoolExecutor(connections) as threads:
        futures = [threads.submit(call, number) for number in range(len(requests))]
    wrong += [f"a client failed: {error!r}" for future in futures if (error := future.exception())]
    state = client.http.get("/health/ready").json()
    if state != {"status": "ready", "waiting": 0, "in_flight": 0, "on_fallback": []}:
        wrong.append(f"afterwards the server is {state}")
    rest = np.array(memory[len(memory) // 10 :], float)
    slope = np.polyfit(np.linspace(0, 1, len(rest)), rest, 1)[0]
    return {
        "seconds": time.perf_counter() - start,
        "outcomes": dict(sorted(outcomes.items())),
        "busy": busy,
        "wrong": wrong,
        "memory": {"after a tenth": rest[0], "end": rest[-1], "rise": slope / rest[0]},
    }


def _one(
    client: httpx.Client, request: Request, expected: np.ndarray, number: int
) -> tuple[str, str]:
    """Send a request: how it ended, and what is wrong with that."""
    rng = random.Random(number)
    body = {**request.body, "size": f"{_SIZE[0]}x{_SIZE[1]}"}
    if request.kind == "leave":
        _leave(client, {**body, "stream": rng.random() < 0.5}, rng.uniform(0, 0.1))
        return "left", ""
    if request.kind == "malformed":
        headers = {"Content-Type": "application/json"}
        content = rng.choice(_MALFORMED)
        status = client.post(_PATH, content=content, headers=headers).status_code
        return _refused(status, (400, 422))
    if request.kind == "oversize":
        return _refused(_oversize(client, body, rng), (413,))
    response = client.post(_PATH, json={**body, "stream": request.kind == "stream"})
    if response.status_code == 429:
        return "busy", "" if "retry-after" in response.headers else "without Retry-After"
    if response.status_code != 200:
        return str(response.status_code), response.text
    found = _pixels(response, request.kind)
    return "drawn", "" if np.array_equal(found, expected) else "another picture"


def _refused(status: int, wanted: tuple[int, ...]) -> tuple[str, str]:
    return ("refused", "") if status in wanted else (str(status), f"not {wanted}")


def _pixels(response: httpx.Response, kind: str) -> np.ndarray:
    if kind == "stream":
        last = response.text.rstrip().rpartition("\ndata: ")[2]
        data = json.loads(last)["b64_json"]
    else:
        data = response.json()["data"][0]["b64_json"]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def _oversize(client: httpx.Client, body: dict[str, Any], rng: random.Random) -> int:
    """Status of a body that says how large it is, or of one that comes in parts."""
    text = json.dumps({**body, "negative_prompt": "x" * (_BODY_LIMIT + 1)}).encode()
    parts = (text[i : i + 65536] for i in range(0, len(text), 65536))
    content: Any = text if rng.random() < 0.5 else parts
    headers = {"Content-Type": "application/json"}
    return client.post(_PATH, content=content, headers=headers).status_code


def _leave(client: httpx.Client, body: dict[str, Any], seconds: float) -> None:
    """Ask, and leave before there is an answer."""
    data = json.dumps(body).encode()
    url = client.base_url
    head = (
        f"POST {_PATH} HTTP/1.1\r\nHost: {url.host}:{url.port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    with socket.create_connection((url.host, url.port or 80)) as connection:
        connection.sendall(head.encode() + data)
        time.sleep(seconds)


def table(figures: dict[str, Any]) -> tuple[str, bool]:
    """What was found beside what is wanted, and whether all is well."""
    memory = figures["memory"]
    flat = memory["rise"] <= FLAT
    lines = [
        f"{figures['requests']} requests over {figures['connections']} connections in "
        f"{figures['seconds']:.0f} s",
        *(f"  {count:5}  {name}" for name, count in figures["outcomes"].items()),
        f"  {figures['busy']:5}  times busy, then sent again",
        f"lost, swapped or wrong: {len(figures['wrong'])}",
        f"memory after the first tenth: {memory['rise']:+.1%} of "
        f"{memory['after a tenth'] / 1e6:.0f} MB (at most {FLAT:.0%}){'' if flat else '  missed'}",
    ]
    return "\n".join(lines), flat and not figures["wrong"]


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--requests", default=2000, show_default=True)
@click.option("--steps", default=2, show_default=True, help="Half of the requests draw one more.")
@click.option("--connections", default=32, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS)
def main(bundle: Path, requests: int, steps: int, connections: int, out: Path) -> None:
    """Soak a server of BUNDLE."""
    figures = soak(bundle, requests, steps, connections)
    text, well = table(figures)
    print(text, *figures["wrong"][:10], sep="\n")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    sys.exit(not well)


if __name__ == "__main__":
    main()
