"""Checkpoints and bundles, made once per session; build stages are kept between sessions."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# No test asks the hub; its library reads this when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

from sd35_trt.build import BuildOptions, build
from sd35_trt.cli import main
from sd35_trt.store.cache import StageCache

# Tracing makes millions of objects that stay: at Python's own thresholds, the collector takes a
# seventh of a build's time.
gc.set_threshold(100_000, 20, 50)


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    logging.getLogger("sd35_trt").setLevel(logging.ERROR)


#: For copies of ``stage_cache``: what another test is just writing there.
UNFINISHED = shutil.ignore_patterns(".tmp-*", ".lock-*")

#: Bundles that most tests share: what ``make_bundle`` is called with.
SHARED: tuple[dict[str, Any], ...] = (
    {},
    {"policy": "fp8"},
    {"model": "medium"},
    {"policy": "fp8", "target": "h200", "builder": "inductor"},
    {"policy": "int8-weight"},
    {"policy": "half"},
    {"target": "ada"},
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--prepare", action="store_true",
        help="build what most tests share first, every worker a part of it",
    )  # fmt: skip


@pytest.fixture(scope="session")
def stage_cache(request: pytest.FixtureRequest) -> Path:
    """A stage cache that outlives the session."""
    return Path(request.config.cache.mkdir("stages"))


@pytest.fixture(scope="session", autouse=True)
def _prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Stages of :data:`SHARED`, before the first test, so that workers do not wait for each other.

    A worker leaves a bundle that another one has begun; who needs its stages waits for them.
    """
    if not request.config.getoption("--prepare"):
        return
    stage_cache = request.getfixturevalue("stage_cache")
    # One for all workers of a run: each has a folder of its own below the run's.
    own = tmp_path_factory.getbasetemp()
    begun = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "begun"
    begun.mkdir(exist_ok=True)
    compiles = importlib.util.find_spec("tensorrt_rtx") is not None
    for number, options in enumerate(SHARED):
        if options.get("target") == "ada" and not compiles:
            continue
        with contextlib.suppress(FileExistsError):
            (begun / str(number)).touch(exist_ok=False)
            out = tmp_path_factory.mktemp("prepared") / "bundle"
            build(BuildOptions(out=out, cache_dir=stage_cache, **_named(options, stage_cache)))
            shutil.rmtree(out)


def _named(options: Mapping[str, Any], stage_cache: Path) -> dict[str, Any]:
    """Options of :data:`SHARED` with the path of the model."""
    if "model" not in options:
        return dict(options)
    from random_checkpoints import kept_checkpoint

    return {**options, "model": str(kept_checkpoint(StageCache(stage_cache), options["model"]))}


@pytest.fixture(scope="session")
def make_bundle(stage_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Gives a bundle; options as for ``BuildOptions``. Never write to it."""

    @functools.cache
    def make(**options: Any) -> Path:
        out = tmp_path_factory.mktemp("bundles") / "bundle"
        return build(BuildOptions(out=out, cache_dir=stage_cache, **options))

    return make


@pytest.fixture(scope="session")
def mini_bundle(make_bundle: Callable[..., Path]) -> Path:
    """The packaged checkpoint in FP32; never write to it."""
    return make_bundle()


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read to the end to be hashed, in their order."""
    from sd35_trt.store import hashes

    read: list[Path] = []
    real = hashes.sha256_file

    def count(path: Path) -> str:
        read.append(path)
        return real(path)

    monkeypatch.setattr(hashes, "sha256_file", count)
    return read


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Networks of a few operators; see ``models/make.py``; never write to it."""
    from models.make import make

    folder = tmp_path_factory.mktemp("tiny")
    return make(folder / "bundle", folder / "stages")


@pytest.fixture(scope="session")
def tiny_programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same networks as programs for Hopper GPUs; never write to it."""
    from models.make import make

    folder = tmp_path_factory.mktemp("tiny-programs")
    return make(folder / "bundle", folder / "stages", "hopper")


@pytest.fixture(scope="session")
def large_checkpoint(stage_cache: Path) -> Path:
    from random_checkpoints import kept_checkpoint

    return kept_checkpoint(StageCache(stage_cache), "large")


@pytest.fixture(scope="session")
def medium_checkpoint(stage_cache: Path) -> Path:
    from random_checkpoints import kept_checkpoint

    return kept_checkpoint(StageCache(stage_cache), "medium")


@pytest.fixture(scope="session")
def large_bundle(make_bundle: Callable[..., Path], large_checkpoint: Path) -> Path:
    return make_bundle(model=str(large_checkpoint))


@pytest.fixture(scope="session")
def medium_bundle(make_bundle: Callable[..., Path], medium_checkpoint: Path) -> Path:
    return make_bundle(model=str(medium_checkpoint))


def alone_on_a_gpu() -> None:
    """Skip where other processes of this run use the GPU too: its memory is counted for all."""
    if os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1") != "1":
        pytest.skip("other workers use the GPU's memory too: run it with -n 0")


def relative_error(value: np.ndarray, reference: np.ndarray) -> float:
    """‖value − reference‖ / ‖reference‖, NaN never passing a comparison."""
    difference = np.asarray(value, np.float64) - np.asarray(reference, np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(np.asarray(reference, np.float64)))


def psnr(image: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 images in dB; 100 for equal ones."""
    error = np.mean((image.astype(np.float64) - reference.astype(np.float64)) ** 2)
    return 100.0 if error == 0 else float(10 * np.log10(255**2 / error))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):  # type: ignore[no-untyped-def]
    """Runs a command in an empty directory: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        words = [str(a) for a in arguments]
        monkeypatch.setattr("sys.argv", ["sd35-trt", *words])
        with pytest.raises(SystemExit) as caught:
            main(words)
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


def one_error_line(err: str) -> str:
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in err
    return lines[0]
