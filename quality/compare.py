"""``sd35-trt verify --against``: draw with two bundles, compare, and write the report."""

from __future__ import annotations

import datetime
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import scipy
import skimage

from sd35_trt import __version__
from sd35_trt.backends import BACKENDS
from sd35_trt.calibration.prompts import digest, read_prompts
from sd35_trt.errors import Sd35Error, UsageError
from sd35_trt.formats.bundle import MANIFEST, Bundle, sha256_file
from sd35_trt.mini.scenes import Example
from sd35_trt.runtime.devices.opening import open_device
from sd35_trt.runtime.request import make_request
from sd35_trt.runtime.sessions.session import device_of
from sd35_trt.store.staging import staging

from .draw import Candidate, Plan, Reference, draw_candidate, draw_reference
from .gate import Thresholds, checks
from .linears import LinearError, equal_linears, linear_errors
from .metrics import load_lpips, psnr, squared_error, ssim
from .page import Pictures, render_page
from .reference import HALF, Count, check_comparable, open_reference

#: Version of ``report.json``.
FORMAT = 1

#: In the bundle.
FOLDER = "report"
JSON_FILE = "report.json"
PAGE_FILE = "index.html"

#: Captions of mini drawn when no number is given.
CAPTIONS = 100

# What the figures depend on.
_LIBRARIES = (np, onnx, onnxruntime, scipy, skimage)


@dataclass(frozen=True)
class VerifyOptions:
    """What ``sd35-trt verify BUNDLE --against`` takes.

    Attributes:
        against: ``half`` or the reference's directory.
        model, tokenizers: see :func:`sd35_trt.quality.reference.open_reference`.
        prompts: a prompt file; None takes mini's held-out captions, or the packaged prompts.
        captions: how many of them; None takes 100 captions of mini, or all of a file.
        seed: of the first picture; the others count up.
        steps: None takes the model's.
        command: recorded in the report.
    """

    bundle: Path
    against: str = HALF
    model: str | None = None
    tokenizers: Path | None = None
    prompts: Path | None = None
    captions: int | None = None
    seed: int = 0
    steps: int | None = None
    cache_dir: Path | None = None
    thresholds: Thresholds = field(default_factory=Thresholds)
    command: str = ""


def verify(
    options: VerifyOptions,
    count: Count = lambda *_: None,
) -> dict[str, Any]:
    """Compare two bundles and write ``report/`` in the first.

    Returns:
        The report, as in ``report.json``.

    Raises:
        Sd35Error: explained in one line; an older report stays as it was.
    """
    start = time.perf_counter()
    candidate = Bundle.open(options.bundle, verify=True)
    open_device(device_of(candidate)).close()  # before a reference is built in vain
    prompts, examples, origin = _prompts(options, candidate)
    options.thresholds.check(examples is not None)
    _check_request(options, candidate)
    try:
        with (
            staging(candidate.root / FOLDER, JSON_FILE) as work,
            tempfile.TemporaryDirectory(dir=work) as spool,
            open_reference(
                candidate,
                options.against,
                options.model,
                options.cache_dir,
                count,
                options.tokenizers,
            ) as reference,
        ):
            common = check_comparable(reference, candidate)
            defaults = candidate.manifest.defaults
            plan = Plan(
                prompts,
                options.seed,
                int(defaults["steps"]) if options.steps is None else options.steps,
                common.size,
                common.batch,
                float(defaults["guidance"]),
            )
            report = {
                "format": FORMAT,
                "made": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                "command": options.command,
                "versions": _versions(),
                "model": {k: candidate.manifest.model[k] for k in ("name", "variant")},
                "reference": _describe(reference, options.against),
                "candidate": _describe(candidate, str(options.bundle)),
                "run": {
                    "prompts": origin,
                    "prompts_sha256": digest(prompts),
                    "images": len(prompts),
                    "seed": plan.seed,
                    "steps": plan.steps,
                    "guidance": plan.guidance,
                    "size": list(plan.size),
                    "batch": len(next(plan.batches())),
                },
            }
            figures, pictures = _measure(reference, candidate, plan, examples, Path(spool), count)
            report |= figures
            found = checks(report, options.thresholds)
            report["gate"] = [asdict(check) for check in found]
            report["passed"] = all(check.passed for check in found)
            report["seconds"] = round(time.perf_counter() - start, 1)
            _write(work, report, pictures)
    except OSError as error:
        raise Sd35Error(
            f"cannot write {error.filename or options.bundle / FOLDER}: {error.strerror or error}",
            "make the bundle writable, or free space",
        ) from error
    return report


def _prompts(
    options: VerifyOptions, candidate: Bundle
) -> tuple[list[str], list[Example] | None, str]:
    """Prompts, the scenes that they describe where they are mini's, and where they come from."""
    if options.captions is not None and options.captions < 1:
        raise UsageError(f"--captions must be at least 1, not {options.captions}")
    mini = candidate.manifest.model["variant"] == "mini"
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


def _versions() -> dict[str, str]:
    return {"sd35-trt": __version__} | {m.__name__: m.__version__ for m in _LIBRARIES}


def _describe(bundle: Bundle, name: str) -> dict[str, Any]:
    m = bundle.manifest
    return {
        "bundle": name,
        "manifest_sha256": sha256_file(bundle.root / MANIFEST),
        "policy": m.policy["name"],
        "policy_sha256": m.policy["sha256"],
        "target": m.target,
        "builder": m.builder,
        "weight_bytes": {c.name: c.weight_bytes for c in m.components},
        "made": m.created,
    }


def _measure(
    reference: Bundle,
    candidate: Bundle,
    plan: Plan,
    examples: Sequence[Example] | None,
    spool: Path,
    count: Count,
) -> tuple[dict[str, Any], Pictures]:
    n = len(plan.prompts)
    again = len(set(next(plan.batches())))
    one = draw_reference(reference, plan, spool, lambda done: count("reference", int(done), n))
    other = draw_candidate(
        candidate, plan, one, spool, lambda done: count("candidate", int(done), n + again)
    )
    linears, note = _linears(reference, candidate, one, count)
    pictures = Pictures(one.images, other.images)
    each, images = _compare_images(pictures, plan, other, count)
    figures = {
        "linears": [asdict(linear) for linear in linears],
        "linears_note": note,
        "latents": _latents(one, other),
        "images": images,
        "scenes": None,
        "each": each,
    }
    if examples is not None:
        from .scenes import compare_scenes

        figures["scenes"], verdicts = compare_scenes(one.images, other.images, examples)
        for row, (right, still) in zip(each, verdicts, strict=True):
            row |= {"reference_right": right, "candidate_right": still}
    return figures, pictures


def _linears(
    reference: Bundle, candidate: Bundle, drawn: Reference, count: Count
) -> tuple[list[LinearError], str]:
    """Errors of every linear; or none, and why."""
    errors: list[LinearError] = []
    total = 100 * len(drawn.feeds)
    for done, (name, feeds) in enumerate(drawn.feeds.items()):
        one, other = (bundle.manifest.component(name) for bundle in (reference, candidate))
        assert one is not None
        assert other is not None
        if any(BACKENDS[c.engine].needs_library for c in (one, other)):
            return [], "single layers are compared in ONNX Runtime bundles only"
        path = reference.path(one.files[0].path)
        if [file.sha256 for file in one.files] == [file.sha256 for file in other.files]:
            errors += equal_linears(name, path)
            count("layers", 100 * (done + 1), total)
            continue

        def report(fraction: float, done: int = done) -> None:
            count("layers", int(100 * (done + fraction)), total)

        errors += linear_errors(
            name,
            path,
            candidate.path(other.files[0].path),
            feeds,
            report,
        )
    return errors, ""


def _latents(one: Reference, other: Candidate) -> dict[str, Any]:
    free, final = other.free, other.free[-1]
    return {
        "sigma": one.sigmas.tolist(),
        "free_running": {
            "mean": free.mean(axis=1).tolist(),
            "p10": np.percentile(free, 10, axis=1).tolist(),
            "median": np.median(free, axis=1).tolist(),
            "p90": np.percentile(free, 90, axis=1).tolist(),
        },
        "teacher_forced": {
            "mean": other.forced.mean(axis=1).tolist(),
            "images": other.forced.shape[1],
        },
        "final": {
            "mean": float(final.mean()),
            "median": float(np.median(final)),
            "max": float(final.max()),
        },
    }


def _compare_images(
    pictures: Pictures, plan: Plan, other: Candidate, count: Count
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Per picture and over all; PSNR is None where it is infinite."""
    distance, note = load_lpips()
    each: list[dict[str, Any]] = []
    pairs = zip(pictures.candidate, pictures.reference, strict=True)
    for i, (image, expected) in enumerate(pairs):
        error = squared_error(image, expected)
        each.append(
            {
                "prompt": plan.prompts[i],
                "seed": plan.seed + i,
                "squared_error": error,
                "psnr": psnr(error),
                "ssim": ssim(image, expected),
                "lpips": distance(image, expected) if distance else None,
                "latent_error": float(other.free[-1, i]),
            }
        )
        count("pictures", i + 1, len(plan.prompts))
    errors = [row["squared_error"] for row in each]
    similar = [row["ssim"] for row in each]
    images: dict[str, Any] = {
        "identical": errors.count(0.0),
        "psnr": {
            "all": psnr(float(np.mean(errors))),
            "median": psnr(float(np.median(errors))),
            "worst": psnr(max(errors)),
        },
        "ssim": {
            "mean": float(np.mean(similar)),
            "median": float(np.median(similar)),
            "worst": min(similar),
        },
        "lpips": None,
        "lpips_note": note,
    }
    if distance:
        values = [row["lpips"] for row in each]
        images["lpips"] = {
            "mean": float(np.mean(values)),
            "median": float(np.median(values)),
            "worst": max(values),
        }
    return each, images


def _write(work: Path, report: Mapping[str, Any], pictures: Pictures) -> None:
    (work / PAGE_FILE).write_text(render_page(report, pictures), "utf-8")
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    (work / JSON_FILE).write_text(text + "\n", "utf-8")
