"""``sd35-trt verify --against``: draw with two bundles, compare, and write the report."""

from __future__ import annotations

import datetime
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import scipy
import skimage

from sd35_trt import __version__
from sd35_trt.backends import BACKENDS
from sd35_trt.calibration.prompts import digest, read_prompts
from sd35_trt.compat.library import load_library
from sd35_trt.errors import UsageError
from sd35_trt.formats.bundle import MANIFEST, Bundle, sha256_file
from sd35_trt.formats.report import ComparedModel, Report, Run, Side
from sd35_trt.mini.scenes import Example
from sd35_trt.progress import Progress, silent
from sd35_trt.runtime.devices.opening import open_device
from sd35_trt.runtime.request import make_request
from sd35_trt.runtime.sessions.session import device_of
from sd35_trt.store.disk import file_errors
from sd35_trt.store.replacement import replacement

from .draw import PictureSet
from .figures import Figures, measure
from .gate import checks
from .options import VerifyOptions
from .page import Pictures, render_page
from .reference import check_comparable, open_reference

#: In the bundle.
FOLDER = "report"
JSON_FILE = "report.json"
PAGE_FILE = "index.html"

#: Captions of mini drawn when no number is given.
CAPTIONS = 100

# What the figures depend on.
_LIBRARIES = (np, onnx, scipy, skimage)


def verify(options: VerifyOptions, progress: Progress = silent) -> Report:
    """Compare two bundles and write ``report/`` in the first.

    Returns:
        The report.

    Raises:
        Sd35Error: explained in one line; an older report stays as it was.
    """
    start = time.perf_counter()
    candidate = Bundle.open(options.bundle, verify=True)
    open_device(device_of(candidate)).close()  # before a reference is built in vain
    prompts, examples, origin = _prompts(options, candidate)
    options.thresholds.check(examples is not None)
    _check_request(options, candidate)
    with (
        file_errors(candidate.root / FOLDER, "copy the bundle to another place"),
        replacement(candidate.root / FOLDER, JSON_FILE) as work,
        tempfile.TemporaryDirectory(dir=work) as spool,
        open_reference(
            candidate,
            options.against,
            options.source,
            options.cache_dir,
            progress,
        ) as reference,
    ):
        common = check_comparable(reference, candidate)
        defaults = candidate.manifest.defaults
        pictures = PictureSet(
            prompts,
            options.seed,
            defaults.steps if options.steps is None else options.steps,
            common.size,
            common.batch,
            defaults.guidance,
        )
        figures, images = measure(reference, candidate, pictures, examples, Path(spool), progress)
        report = _report(options, reference, candidate, pictures, origin, figures, start)
        _write(work, report, images)
    return report


def _report(
    options: VerifyOptions,
    reference: Bundle,
    candidate: Bundle,
    pictures: PictureSet,
    origin: str,
    figures: Figures,
    start: float,
) -> Report:
    """The report, with how it was made.

    Args:
        origin: where the prompts come from.
        start: of the comparison, as ``time.perf_counter`` gives it.
    """
    gate = checks(options.thresholds, figures.images, figures.latents, figures.scenes)
    model = candidate.manifest.model
    return Report(
        made=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        command=options.command,
        versions=_versions(reference, candidate),
        model=ComparedModel(model.name, model.variant),
        reference=_describe(reference, options.against),
        candidate=_describe(candidate, str(options.bundle)),
        run=Run(
            prompts=origin,
            prompts_sha256=digest(pictures.prompts),
            images=len(pictures.prompts),
            seed=pictures.seed,
            steps=pictures.steps,
            guidance=candidate.manifest.defaults.guidance,
            size=pictures.size,
            batch=len(next(pictures.batches())),
        ),
        linears=figures.linears,
        linears_note=figures.linears_note,
        latents=figures.latents,
        images=figures.images,
        scenes=figures.scenes,
        each=figures.each,
        gate=gate,
        passed=all(check.passed for check in gate),
        seconds=round(time.perf_counter() - start, 1),
    )


def _prompts(
    options: VerifyOptions, candidate: Bundle
) -> tuple[list[str], list[Example] | None, str]:
    """Prompts, the scenes that they describe where they are mini's, and where they come from."""
    if options.captions is not None and options.captions < 1:
        raise UsageError(f"--captions must be at least 1, not {options.captions}")
    mini = candidate.manifest.model.variant == "mini"
    if options.prompts is None and mini:
        from sd35_trt.mini.scoring import heldout

        examples = heldout(options.captions or CAPTIONS)
        return [e.caption for e in examples], examples, "mini's held-out captions"
    path = options.prompts or Path(__file__).parent / "prompts.txt"
    prompts = read_prompts(path)
    if options.captions is not None and options.captions > len(prompts):
        raise UsageError(
            f"--captions {options.captions}: {path} holds {len(prompts)}", "ask for fewer"
        )
    origin = str(path) if options.prompts else "packaged prompts"
    return prompts[: options.captions], None, origin


def _check_request(options: VerifyOptions, candidate: Bundle) -> None:
    """Refuse steps and seeds that the runtime would, before a reference is built.

    Raises:
        UsageError: names the nearest that works.
    """
    make_request(
        candidate.manifest,
        prompt=[""] * candidate.manifest.ranges.batch[0],
        negative="",
        seed=options.seed,
        steps=options.steps,
        guidance=None,
        shift=None,
        size=None,
        batch=1,
        sampler=None,
        t5_tokens=None,
        image=None,
        strength=1.0,
    )


def _versions(*bundles: Bundle) -> dict[str, str]:
    engines = {c.engine for bundle in bundles for c in bundle.manifest.components}
    libraries = [*_LIBRARIES, *(load_library(BACKENDS[engine]) for engine in sorted(engines))]
    return {"sd35-trt": __version__} | {m.__name__: str(m.__version__) for m in libraries}


def _describe(bundle: Bundle, name: str) -> Side:
    m = bundle.manifest
    return Side(
        bundle=name,
        manifest_sha256=sha256_file(bundle.root / MANIFEST),
        policy=m.policy.name,
        policy_sha256=m.policy.sha256,
        target=m.target,
        builder=m.builder,
        weight_bytes={c.name: c.weight_bytes for c in m.components},
        made=m.created,
    )


def _write(work: Path, report: Report, pictures: Pictures) -> None:
    (work / PAGE_FILE).write_text(render_page(report, pictures), "utf-8")
    (work / JSON_FILE).write_text(report.to_json(), "utf-8")
