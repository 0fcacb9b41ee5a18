"""libsd35 beside Python's runtime on a GPU: mini and Medium, each by both backends, memory flat.

    python benchmarks/libsd35_gpu.py /tmp/work

Builds what is missing below the folder, Medium from a random checkpoint of its exact structure, and
runs ``libsd35.py`` on each bundle. What came of a part is in ``results/``, and what is there is not
done again: where commands have a limit, give it as ``--seconds``, and the command again until it
says that nothing is left. The exit status is 1 where a bound was missed, and 3 where something is
left.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

_HERE = Path(__file__).parent
_LEFT = 3

_BACKENDS = ("onnxruntime", "tensorrt")


@dataclass(frozen=True)
class Part:
    """One command and where its result is.

    Attributes:
        name: of the result.
        words: the command.
        makes: what is there when it is done.
        seconds: that it may take; it is not begun with less left.
        needs: what another part makes for it.
        optional: whether it may fail, and what then is not done is no fault.
    """

    name: str
    words: tuple[str, ...]
    makes: Path
    seconds: int
    needs: Path | None = None
    optional: bool = False


@dataclass(frozen=True)
class Plan:
    """All parts.

    Attributes:
        work: where everything is.
        target: that bundles are built for.
        device: that they are drawn on.
        backends: by which.
        build: of libsd35.
        loads: loads and closes of each backend.
        blocks: of Medium's transformer; None is all.
    """

    work: Path
    target: str
    device: str
    backends: tuple[str, ...]
    build: Path
    loads: int
    blocks: int | None

    def parts(self) -> Iterator[Part]:
        """In the order in which they are done."""
        for builder in self.backends:
            for policy in ("half", "fp8"):
                yield from self._bundle("mini", builder, policy, (), 20, 240)
            bundle = self._bundle_path("mini", builder, "half")
            words = ("--no-compare", "--loads", str(self.loads))
            yield self._measure(f"loads-{builder}", bundle, words, 400)
        checkpoint = self.work / "medium"
        blocks = () if self.blocks is None else ("--blocks", str(self.blocks))
        script = str(_HERE / "random_checkpoint.py")
        yield Part("checkpoint", (script, "medium", str(checkpoint), *blocks), checkpoint, 200)
        for builder in self.backends:
            options = ("--model", str(checkpoint), "--size", "1024:1024", "--batch", "1:1",
                       "--model-variant", "medium")  # fmt: skip
            yield from self._bundle("medium", builder, "half", options, 3, 420)

    def _bundle(
        self, model: str, builder: str, policy: str, options: tuple[str, ...], runs: int, limit: int
    ) -> Iterator[Part]:
        bundle = self._bundle_path(model, builder, policy)
        # Not every backend has kernels for FP8 everywhere.
        optional = policy == "fp8"
        # What ONNX Runtime draws from on a GPU is built for the CPU.
        target = "cpu" if builder == "onnxruntime" else self.target
        words = ("-m", "sd35_trt", "build", "--gpu", target, "--builder", builder,
                 "--policy", policy, "--out", str(bundle), *options)  # fmt: skip
        needs = self.work / "medium" if model == "medium" else None
        yield Part(f"build-{bundle.name}", words, bundle, limit, needs, optional)
        yield self._measure(
            bundle.name, bundle, ("--loads", "0", "--runs", str(runs)), 300, optional
        )

    def _bundle_path(self, model: str, builder: str, policy: str) -> Path:
        return self.work / "bundles" / f"{model}-{builder}-{policy}"

    def _measure(
        self, name: str, bundle: Path, options: tuple[str, ...], limit: int, optional: bool = False
    ) -> Part:
        out = self.work / "results" / f"{name}.json"
        words = (str(_HERE / "libsd35.py"), str(bundle), "--device", self.device,
                 "--build", str(self.build), "--out", str(out), *options)  # fmt: skip
        return Part(name, words, out, limit, bundle, optional)


def _run(part: Part, log: Path) -> bool:
    """Whether it made what it is to make; what it printed goes on."""
    print(f"{part.name}:", flush=True)
    start = time.monotonic()
    with log.open("w") as stream:
        subprocess.run(
            [sys.executable, *part.words], stdout=stream, stderr=subprocess.STDOUT, check=False,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
    lines = log.read_text("utf-8", "replace").splitlines()
    print("\n".join(lines[-40:] if part.makes.suffix == ".json" else lines[-2:]))
    print(f"  {time.monotonic() - start:.0f} s", flush=True)
    return part.makes.exists()


def _refuse(part: Part, results: Path, log: Path) -> None:
    """Notes why a part that may fail was not done."""
    lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    reason = lines[-1] if lines else "it said nothing"
    (results / f"{part.name}.refused").write_text(reason + "\n", "utf-8")


def _missed(path: Path) -> list[str]:
    """Checks whose bound was missed."""
    return [check["what"] for check in json.loads(path.read_text("utf-8"))["checks"]
            if not check["passed"]]  # fmt: skip


def carry_out(plan: Plan, seconds: float, only: str) -> int:
    """Do what is left, as far as time suffices; returns the exit status."""
    end = time.monotonic() + seconds
    results = plan.work / "results"
    results.mkdir(parents=True, exist_ok=True)
    left, missed = [], []
    for part in plan.parts():
        if only not in part.name:
            continue
        refused = results / f"{part.name}.refused"
        if refused.exists():
            print(f"{part.name}: not done: {refused.read_text('utf-8').strip()}")
            continue
        if not part.makes.exists():
            if part.needs is not None and not part.needs.exists():
                left += [] if part.optional else [part.name]
                continue
            if time.monotonic() + part.seconds > end:
                left.append(part.name)
                continue
            log = results / f"{part.name}.log"
            if not _run(part, log):
                if not part.optional:
                    raise click.ClickException(f"{part.name} failed, see {log}")
                _refuse(part, results, log)
                continue
        if part.makes.suffix == ".json":
            missed += [f"{part.name}: {what}" for what in _missed(part.makes)]
    print("missed:", *(missed or ["nothing"]), sep="\n  ")
    print("left:", *(left or ["nothing"]), sep="\n  ")
    return _LEFT if left else int(bool(missed))


@click.command()
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--gpu", "target", default="auto", show_default=True, help="As for build.")
@click.option("--device", default="cuda", show_default=True, help="As for generate.")
@click.option("--builder", "backends", multiple=True, type=click.Choice(_BACKENDS),
              default=_BACKENDS, show_default=True)  # fmt: skip
@click.option(
    "--build",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=Path("build/cpp/release"),
    show_default=True,
    help="Where libsd35 and its tests were built.",
)
@click.option("--loads", default=200, show_default=True, help="Loads and closes of each backend.")
@click.option("--blocks", type=int, help="Of Medium's transformer and T5. Default: all.")
@click.option("--only", default="", help="Parts whose name has this.")
@click.option("--seconds", default=1e9, help="Begin no part that may take longer.")
def main(
    work: Path, target: str, device: str, backends: tuple[str, ...], build: Path, loads: int,
    blocks: int | None, only: str, seconds: float,
) -> None:  # fmt: skip
    """Build, compare and load again and again, as far as time suffices."""
    plan = Plan(work, target, device, backends, build, loads, blocks)
    sys.exit(carry_out(plan, seconds, only))


if __name__ == "__main__":
    main()
