"""The sections of :mod:`conformance`, each a generator of checks."""

from __future__ import annotations

import functools
import gc
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from conformance_bench import Bench, Check, decibels, holds, is_equal, unrecorded
from conformance_engines import engines
from msgspec.structs import replace
from soak import soak

from sd35_trt.errors import BundleError, OutOfMemory, Sd35Error, UsageError
from sd35_trt.formats.bundle import CALIBRATION, Bundle, File, describe_file, write_manifest
from sd35_trt.runtime import Pipeline
from sd35_trt.runtime.job import Job, Result
from sd35_trt.units import parse_bytes

# PSNR against ONNX Runtime on the CPU, dB.
_CLOSE = {"fp32": 50.0, "half": 40.0, "fp8": 35.0, "int8-weight": 35.0}

_STAR: dict[str, Any] = {"prompt": "a red star", "seed": 3, "steps": 8}
_REQUESTS: dict[str, dict[str, Any]] = {
    "guidance": _STAR,
    "without guidance": {**_STAR, "guidance": 1.0},
    "batch 2": {**_STAR, "batch": 2},
    "batch 3": {**_STAR, "batch": 3, "guidance": 3.0},
    "batch 4, two prompts": {**_STAR, "prompt": ["a red star", "two blue squares"], "batch": 2},
    "192×64": {**_STAR, "size": (192, 64)},
    "64×192": {**_STAR, "size": (64, 192)},
    "192×192, batch 4": {**_STAR, "size": (192, 192), "batch": 4},
    "DPM-Solver++": {**_STAR, "sampler": "dpmpp-2m", "steps": 7},
    "negative prompt, shift": {**_STAR, "negative": "blue", "shift": 2.0},
    "all default steps": {"prompt": "a small green circle on white", "seed": 5},
}

_SAME_PICTURE = 30.0

# Device memory that comes and goes with a process's libraries.
_NOISE = 8 << 20


def pictures(bench: Bench) -> Iterator[Check]:
    """Every policy and kind of request, against the same on the CPU."""
    for policy, least in _CLOSE.items():
        try:
            bundle = bench.bundle(policy)
        except UsageError as refusal:  # the table of dialects knows
            yield holds(f"{policy}: not built", True, str(refusal))
            continue
        reference = bench.reference(policy)
        with Pipeline.load(bundle) as pipe, Pipeline.load(reference, device="cpu") as peer:
            expected: Result | None = None
            for what, request in _REQUESTS.items():
                expected, actual = peer.generate(**request), pipe.generate(**request)
                error = float(np.linalg.norm(actual.latents - expected.latents))
                note = f"latents {error / float(np.linalg.norm(expected.latents)):.2g}"
                yield Check(
                    f"{policy}: {what}", decibels(actual, expected), " dB", least=least, note=note
                )
            assert expected is not None
            request = {**_STAR, "image": expected.images[0], "strength": 0.6}
            actual, expected = pipe.generate(**request), peer.generate(**request)
            yield Check(f"{policy}: image to image", decibels(actual, expected), " dB", least=least)


def graphs(bench: Bench) -> Iterator[Check]:
    """Steps that are replayed, repeated and joined."""
    for policy, least in _CLOSE.items():
        if not bench.has(policy):
            continue
        bundle = bench.bundle(policy)
        with Pipeline.load(bundle) as pipe, unrecorded(bundle) as direct:
            for what in ("guidance", "without guidance", "DPM-Solver++", "batch 2"):
                request = _REQUESTS[what]
                first, again = pipe.generate(**request), pipe.generate(**request)
                yield holds(f"{policy}: {what}, drawn twice, is equal", is_equal(first, again))
                plain = direct.generate(**request)
                yield holds(f"{policy}: {what}, replayed or not, is equal", is_equal(again, plain))
            requests = [{**_STAR, "seed": seed} for seed in (1, 2, 3)]
            jobs = [Job(pipe.request(**request)) for request in requests]
            pipe.draw(jobs)
            for request, job in zip(requests, jobs, strict=True):
                assert isinstance(job.outcome, Result)
                alone = pipe.generate(**request)
                note = "equal" if is_equal(job.outcome, alone) else "kernels go with the batch"
                yield Check(
                    f"{policy}: joined, seed {request['seed']}, against alone",
                    decibels(job.outcome, alone), " dB", least=least, note=note,
                )  # fmt: skip


def memory(bench: Bench) -> Iterator[Check]:
    """Budgets: engines that stay, are loaded for a stage, or stream."""
    options = {"weight_streaming": True} if bench.builder.startswith("tensorrt") else {}
    bundle = bench.bundle("half", **options)
    with Pipeline.load(bundle) as pipe:
        pipe.preload()
        expected = pipe.generate(**_STAR)
        report = pipe.memory()
        kinds = {engine.kind for engine in report.engines.values()}
        yield holds("without a budget all stays", kinds == {"resident"})
    smallest = _smallest_budget(bundle)
    full = report.planned_peak
    yield Check("smallest budget, of all that there is", smallest / full, most=1.0)
    for share in (1.0, 0.7, 0.4, 0.0):
        budget = int(smallest + share * (full - smallest))
        with Pipeline.load(bundle, vram_budget=budget) as pipe:
            for turn in ("first", "second"):
                actual = pipe.generate(**{**_STAR, "prompt": f"a red star {turn}"})
            actual = pipe.generate(**_STAR)
            report = pipe.memory()
            kinds = {engine.kind for engine in report.engines.values()}
            what = f"{budget / 1e6:.0f} MB ({', '.join(sorted(kinds))})"
            note = "equal" if is_equal(actual, expected) else ""
            psnr = decibels(actual, expected)
            yield Check(f"{what}: against all resident", psnr, " dB", least=40.0, note=note)
            yield Check(f"{what}: peak, of the budget", report.planned_peak / budget, most=1.0)
    if bench.builder.startswith("tensorrt"):
        with Pipeline.load(bench.bundle("half", refit=True)) as pipe:
            actual = pipe.generate(**_STAR)
            yield Check("built with --refit", decibels(actual, expected), " dB", least=40.0)


def _smallest_budget(bundle: Path) -> int:
    """As the refusal of one that is too small names it."""
    try:
        with Pipeline.load(bundle, vram_budget=1 << 20) as pipe:
            pipe.preload()
    except OutOfMemory as error:
        match = re.search(r"vram_budget for it is (\S+ ?\S*)", str(error))
        if match is None:
            raise
        return parse_bytes(match[1].replace(" ", ""))
    raise Sd35Error(f"{bundle} fits into one byte")


def guard(bench: Bench) -> Iterator[Check]:
    """A bundle whose pictures look wrong, and one that takes over."""
    half = bench.bundle("half")
    narrow = _changed(bench.bundle("fp8"), bench.work / "narrow", CALIBRATION, _narrow_band)
    with Pipeline.load(half) as pipe:
        expected = pipe.generate(**_STAR)
    with Pipeline.load(narrow, fallback=half) as pipe:
        first, _, third = (pipe.generate(**_STAR) for _ in range(3))
        yield holds("a picture outside the band is noted", any("anomaly" in n for n in first.notes))
        yield holds("two in a row, and the fallback draws", pipe.on_fallback)
        yield holds("as it draws alone", is_equal(third, expected))
        yield holds("and says so", any("fallback" in note for note in third.notes))
        pipe.restore()
        again = pipe.generate(**_STAR)
        yield holds("restored, it draws with the bundle itself", is_equal(again, first))


def _narrow_band(data: bytes) -> bytes:
    """A calibration whose latents deviate a tenth as much as they did."""
    extract = json.loads(data)
    latents = extract["latents"]
    latents["deviation"] = [[low / 10, high / 10] for low, high in latents["deviation"]]
    return json.dumps(extract).encode()


def _changed(source: Path, out: Path, path: str, change: Callable[[bytes], bytes]) -> Path:
    """A copy of a bundle with one file changed, and a manifest that says so."""
    shutil.rmtree(out, ignore_errors=True)
    manifest = Bundle.open(source).manifest
    shutil.copytree(source, out, copy_function=os.link)
    data = (out / path).read_bytes()
    (out / path).unlink()
    (out / path).write_bytes(change(data))

    def described(files: tuple[File, ...]) -> tuple[File, ...]:
        return tuple(describe_file(out, f.path) if f.path == path else f for f in files)

    components = tuple(replace(c, files=described(c.files)) for c in manifest.components)
    for name in ("bundle.json", "bundle.json.sha256"):
        (out / name).unlink()
    write_manifest(out, replace(manifest, components=components, files=described(manifest.files)))
    return out


def refusals(bench: Bench) -> Iterator[Check]:
    """Engines that are not what the manifest takes them for: each is one line."""
    bundle = bench.bundle("half")
    component = Bundle.open(bundle).manifest.component("denoiser")
    assert component is not None
    path = component.files[0].path
    size = component.files[0].bytes
    changes: dict[str, Callable[[bytes], bytes]] = {
        "empty": lambda data: b"",
        "the first half": lambda data: data[: size // 2],
        "all but the last byte": lambda data: data[:-1],
        "a byte more": lambda data: data + b"x",
        "another magic": lambda data: b"xxxx" + data[4:],
    }
    # Serialization version, library version, compute capability and the rest of the header.
    for place in range(4, 44, 4):
        changes[f"another byte at {place}"] = functools.partial(_flip, place)
    with Pipeline.load(bundle) as pipe:
        pipe.generate(**_STAR)  # what the process itself takes of the GPU is taken
    for what, change in changes.items():
        damaged = _changed(bundle, bench.work / "damaged", path, change)
        before = bench.device_bytes()
        try:
            with Pipeline.load(damaged) as pipe:
                result = pipe.generate(**_STAR)
        except (BundleError, OutOfMemory) as error:
            one_line = "\n" not in str(error)
            yield holds(f"{what}: refused", one_line, str(error).replace(str(bench.work), ""))
        else:
            with Pipeline.load(bundle) as pipe:
                same = is_equal(pipe.generate(**_STAR), result)
            yield holds(f"{what}: of no effect", same, "drawn as by the bundle itself")
        gc.collect()
        remainder = bench.device_bytes() - before
        yield Check(f"{what}: device memory left behind", remainder / 1e6, " MB", most=_NOISE / 1e6)


def _flip(place: int, data: bytes) -> bytes:
    return data[:place] + bytes([data[place] ^ 0x2A]) + data[place + 1 :]


def load(bench: Bench) -> Iterator[Check]:
    """Loads and closes, and a pool under many callers: device memory stays flat."""
    bundle = bench.bundle("half")
    loads = 20 if bench.quick else 200
    with Pipeline.load(bundle) as pipe:
        expected = pipe.generate(**_STAR)
    readings, equal = [], True
    for _ in range(loads):
        with Pipeline.load(bundle) as pipe:
            equal &= is_equal(pipe.generate(**_STAR), expected)
        readings.append(bench.device_bytes())
    yield holds(f"{loads} loads draw the same", equal)
    rise = max(readings[loads // 10 :]) - readings[loads // 10]
    yield Check(f"{loads} loads and closes: device memory", rise / 1e6, " MB", most=_NOISE / 1e6)
    requests = 200 if bench.quick else 2000
    device_bytes: list[int] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            device_bytes.append(bench.device_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        # On a GPU, kernels go with the batch that requests are joined to: pictures differ in the
        # last bits. FP8 makes those large in so few steps, down to 18 dB.
        least = _SAME_PICTURE if bench.on_gpu else None
        figures = soak((bundle, bench.bundle("fp32")), requests, 2, 16, least)
    finally:
        stop.set()
        watcher.join()
    wrong = figures["wrong"]
    yield Check(
        f"{requests} requests of a pool: wrong", len(wrong), most=0, note=" ".join(wrong[:2])
    )
    speed = figures["images_per_second"]
    yield Check(
        "pool, of one caller's pictures a second", float(speed["pool"] / speed["one caller"])
    )
    half = device_bytes[len(device_bytes) // 2 :]
    rise = half[-1] - half[0]
    yield Check("its second half: device memory", rise / 1e6, " MB", most=_NOISE / 1e6)
    yield Check("its host memory, rise", 100 * float(figures["memory"]["rise"]), " %", most=2.0)


#: In the order in which they are run.
SECTIONS: dict[str, Callable[[Bench], Iterator[Check]]] = {
    "engines": functools.partial(engines, policies=tuple(_CLOSE)),
    "pictures": pictures,
    "graphs": graphs,
    "memory": memory,
    "guard": guard,
    "refusals": refusals,
    "load": load,
}
