"""From bundles on a command line to a server."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector

from sd35_trt.errors import UsageError
from sd35_trt.runtime import Pipeline, PipelinePool
from sd35_trt.runtime.metrics import Metrics
from sd35_trt.runtime.traffic import Traffic

from .app import make_app
from .server import address_of, bind, run
from .service import Service
from .settings import Settings, is_loopback

_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)=(.+)")


@dataclass(frozen=True)
class Launch:
    """What a server is started with.

    Attributes:
        bundles: ``DIR`` or ``NAME=DIR``; the name of a ``DIR`` is its last part.
        host, port: 0 takes any free port.
        traffic: see :func:`parse_traffic`; empty sends all to the first bundle.
        adapters: ``NAME=FILE``, known to every bundle that takes adapters.
        fallbacks: ``NAME=DIR`` for a bundle's fallback, ``DIR`` for every bundle's.
        queue: how many requests may wait.
        threads, device, vram_budget, trust_kernels: see :meth:`sd35_trt.runtime.Pipeline.load`.
        settings: see :class:`~sd35_trt.serving.settings.Settings`.
    """

    bundles: Sequence[str]
    host: str
    port: int
    traffic: str
    adapters: Sequence[str]
    fallbacks: Sequence[str]
    queue: int
    threads: int | None
    device: str | None
    vram_budget: int | None
    trust_kernels: bool
    settings: Settings


def launch(options: Launch, started: Callable[[str], object]) -> None:
    """Load the bundles, draw with each, and serve until a signal says otherwise.

    Args:
        started: called with the server's URL when it takes requests.

    Raises:
        UsageError: an option that does not fit; nothing was loaded.
        BundleError, OutOfMemory, Sd35Error: see :meth:`sd35_trt.runtime.Pipeline.load`.
        KeyboardInterrupt: see :func:`~sd35_trt.serving.server.run`.
    """
    bundles = named_bundles(options.bundles)
    fallbacks = named_fallbacks(options.fallbacks, list(bundles))
    shares = parse_traffic(options.traffic, list(bundles))
    adapters = named_adapters(options.adapters)
    settings = replace(options.settings, adapters=frozenset(adapters))
    local = is_loopback(options.host)
    if settings.token is None and not local:
        raise UsageError(
            f"--host {options.host} is reached from elsewhere, and there is no token",
            "give --token-file FILE, or leave out --host",
        )
    settings = replace(settings, local=local and settings.token is None)
    with ExitStack() as opened:
        sock = opened.enter_context(bind(options.host, options.port))
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        metrics = Metrics(registry)
        pipes = {}
        for name, path in bundles.items():
            pipe = Pipeline.load(
                path, fallback=fallbacks.get(name),
                threads=options.threads, device=options.device,
                vram_budget=options.vram_budget, trust_kernels=options.trust_kernels,
            )  # fmt: skip
            pipes[name] = opened.enter_context(pipe)
        pool = PipelinePool(pipes, queue_limit=options.queue, observer=metrics)
        opened.callback(pool.close, wait=False)
        for name, path in adapters.items():
            pool.load_adapter(name, path)
        if shares:
            pool.set_traffic(shares)
        metrics.watch(pool)
        service = Service(pool, settings)
        service.warm_up()
        run(make_app(service, registry, pool), service, sock, lambda: started(address_of(sock)))


def named_bundles(given: Sequence[str]) -> dict[str, Path]:
    """Directories by name.

    Raises:
        UsageError: a name that occurs twice.
    """
    bundles: dict[str, Path] = {}
    for one in given:
        match = _NAMED.fullmatch(one)
        name, path = (match[1], Path(match[2])) if match else (Path(one).resolve().name, Path(one))
        if name in bundles:
            raise UsageError(f"two bundles are called {name}", f"name one of them: OTHER={path}")
        bundles[name] = path
    return bundles


def named_adapters(given: Sequence[str]) -> dict[str, Path]:
    """Files by the name that requests use.

    Raises:
        UsageError: no name, or one that occurs twice.
    """
    adapters: dict[str, Path] = {}
    for one in given:
        match = _NAMED.fullmatch(one)
        if match is None:
            raise UsageError(
                f"--adapter {one} has no name", f"give it one: {Path(one).stem or 'style'}={one}"
            )
        if match[1] in adapters:
            raise UsageError(f"two adapters are called {match[1]}", "rename one of them")
        adapters[match[1]] = Path(match[2])
    return adapters


def named_fallbacks(given: Sequence[str], names: Sequence[str]) -> dict[str, Path]:
    """Directories by the name of the bundle that each stands in for.

    Args:
        names: of the bundles.

    Raises:
        UsageError: an unknown name.
    """
    fallbacks: dict[str, Path] = {}
    for one in given:
        match = _NAMED.fullmatch(one)
        if match is None:
            fallbacks.update(dict.fromkeys(names, Path(one)))
        elif match[1] in names:
            fallbacks[match[1]] = Path(match[2])
        else:
            raise UsageError(
                f"--fallback {one}: there is no bundle {match[1]}",
                f"use one of: {', '.join(names)}",
            )
    return fallbacks


def parse_traffic(text: str, names: Sequence[str]) -> Mapping[str, float]:
    """Shares of ``half=90,fp8=10``: percent by name.

    Args:
        names: of the bundles.

    Raises:
        UsageError: another form, an unknown name, or another sum than 100.
    """
    shares = {}
    for part in filter(None, text.split(",")):
        name, _, share = part.strip().rpartition("=")
        try:
            shares[name] = float(share)
        except ValueError:
            raise UsageError(
                f"--traffic {text} is no split", "say it in percent, as half=90,fp8=10"
            ) from None
        if name not in names:
            raise UsageError(
                f"--traffic {text}: there is no bundle {name}", f"use one of: {', '.join(names)}"
            )
    if shares:
        Traffic(shares)
    return shares
