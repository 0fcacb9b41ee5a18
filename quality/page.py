"""The report as one page that needs nothing else: style, plots and pictures are inside."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from sd35_trt.formats.report import LinearError, PairedDifference, PicturePair, Report
from sd35_trt.units import format_bytes

from . import plots

_PAIRS = 8
_ROWS = 15

# Largest width and height of a picture that is shown as it is, and of one that is reduced.
_LOSSLESS_SIDE, _SIDE = 256, 512

# What the bundles are called where nothing tells them apart.
_SIDES = ("reference", "candidate")

# Differences are brightened by this much.
_GAIN = 4


@dataclass(frozen=True)
class Pictures:
    """The two bundles' pictures, uint8 [n, H, W, 3]."""

    reference: np.ndarray
    candidate: np.ndarray


def render_page(report: Report, pictures: Pictures) -> str:
    """The report as HTML."""
    reference, candidate = _names(report)
    title = f"{candidate} against {reference}"
    run = report.run
    intro = (
        f"{report.model.name}, {run.images} pictures of {run.size[0]}×{run.size[1]}, "
        f"{run.steps} steps, guidance {run.guidance:g}, seeds from {run.seed}; {run.prompts}; "
        f"{report.made}"
    )
    parts = [
        f"<h1>{escape(title)}</h1><p class=soft>{escape(intro)}</p>",
        _gate(report),
        _cards(report),
        _latents(report),
        _scenes(report),
        _pictures(report, pictures),
        _layers(report),
        _origin(report),
    ]
    return document(title, parts)


def document(title: str, parts: Iterable[str]) -> str:
    """A whole page in this project's style.

    Args:
        title: plain text.
        parts: HTML.
    """
    style = (Path(__file__).parent / "page.css").read_text("utf-8")
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _names(report: Report) -> tuple[str, str]:
    """Reference and candidate: the policies where they tell the two apart, else the folders."""
    sides = report.reference, report.candidate
    policies = sides[0].policy, sides[1].policy
    folders = Path(sides[0].bundle).name[:30], Path(sides[1].bundle).name[:30]
    return next((pair for pair in (policies, folders) if pair[0] != pair[1]), _SIDES)


def _number(value: float | None, digits: int = 3, none: str = "∞") -> str:
    return none if value is None else f"{value:.{digits}g}"


def _gate(report: Report) -> str:
    if not report.gate:
        return ""
    rows = []
    for check in report.gate:
        word, style = ("held", "good") if check.passed else ("missed", "bad")
        rows.append(
            f"<li>{escape(check.figure)} {_number(check.value)}{check.unit}, "
            f"<code>{escape(check.option)} {check.threshold:g}</code>: "
            f"<b class={style}>{word}</b></li>"
        )
    return f"<h2>Thresholds</h2><ul>{''.join(rows)}</ul>"


def _cards(report: Report) -> str:
    images, final = report.images, report.latents.final
    psnr, ssim, lpips = images.psnr, images.ssim, images.lpips
    same = f", {images.identical} identical" if images.identical else ""
    cards = [
        ("latent error", _number(final.mean),
         f"after the last step, mean; median {_number(final.median)}, "
         f"largest {_number(final.max)}"),
        ("PSNR", f"{_number(psnr.all)} dB",
         f"of the mean squared error; median {_number(psnr.median)}, "
         f"worst {_number(psnr.worst)}{same}"),
        ("SSIM", f"{ssim.mean:.3f}",
         f"mean; median {ssim.median:.3f}, worst {ssim.worst:.3f}"),
    ]  # fmt: skip
    if lpips:
        cards.append(("LPIPS", _number(lpips.mean), f"mean; worst {_number(lpips.worst)}"))
    else:
        cards.append(("LPIPS", "not available", images.lpips_note))
    if report.scenes:
        whole = report.scenes.whole
        cards.append(
            ("scenes right", f"{100 * whole.candidate.value:.1f} %",
             f"reference {100 * whole.reference.value:.1f} %; {_paired(whole.paired)}")
        )  # fmt: skip
    size, original = (sum(s.weight_bytes.values()) for s in (report.candidate, report.reference))
    cards.append(
        ("weights", format_bytes(size),
         f"{size / original:.2f} × the reference's {format_bytes(original)}")
    )  # fmt: skip
    body = "".join(
        f"<div class=card><span>{escape(label)}</span><b>{escape(value)}</b>"
        f"<span>{escape(note)}</span></div>"
        for label, value, note in cards
    )
    return f"<div class=cards>{body}</div>"


def _paired(p: PairedDifference) -> str:
    return (
        f"difference {100 * p.difference:+.1f} points, 95 % interval "
        f"{100 * p.low:+.1f} to {100 * p.high:+.1f}"
    )


def _latents(report: Report) -> str:
    forced = report.latents.teacher_forced.images
    return (
        "<h2>Latents, step by step</h2>"
        + plots.latent_curve(report.latents)
        + "<p class=soft>Blue: ‖z′ − z‖ / ‖z‖ when each bundle goes on from its own latents. "
        f"Orange: the error that a single step adds, ‖v′ − v‖ / ‖v‖ from the reference's latents, "
        f"over {forced} pictures.</p>"
    )


def _scenes(report: Report) -> str:
    scenes = report.scenes
    if not scenes:
        return ""
    names = _names(report)
    rows = []
    for kind, row in {"all": scenes.whole, **scenes.kinds}.items():
        paired = row.paired
        shares = [
            f"{100 * share.value:.1f} ({100 * share.low:.1f}–{100 * share.high:.1f})"
            for share in (row.reference, row.candidate)
        ]
        rows.append(
            [
                kind, str(row.reference.count), *shares,
                f"{100 * paired.difference:+.1f} "
                f"({100 * paired.low:+.1f} to {100 * paired.high:+.1f})",
                str(paired.lost), str(paired.gained), f"{paired.p:.3f}",
            ]
        )  # fmt: skip
    attributes = [
        [name, f"{100 * row.reference:.1f}", f"{100 * row.candidate:.1f}"]
        for name, row in scenes.attributes.items()
    ]
    heads = ["captions", "n", f"{names[0]}, %", f"{names[1]}, %", "difference, points",
             "lost", "gained", "p (McNemar)"]  # fmt: skip
    return (
        "<h2>Scenes</h2>"
        "<p>Share of captions of which every statement holds in the picture, with 95 % intervals: "
        "Wilson's for a share, Bonett and Price's for the paired difference.</p>"
        + plots.scene_accuracy(scenes, names)
        + table(heads, rows)
        + "<details><summary>Single statements</summary>"
        + table(["statement", f"{names[0]}, %", f"{names[1]}, %"], attributes)
        + "</details>"
    )


def _pictures(report: Report, pictures: Pictures) -> str:
    each = report.each
    order = sorted(range(len(each)), key=lambda i: (each[i].ssim, -each[i].squared_error))
    worst = [i for i in order if each[i].squared_error][:_PAIRS]
    lost = [
        i for i in order
        if i not in worst and each[i].reference_right and not each[i].candidate_right
    ][:_PAIRS]  # fmt: skip
    body = f"<h2>Pictures</h2>{plots.similarity(each)}"
    if not worst:
        return f"{body}<p>All pairs are identical.</p>"
    key = f"reference, candidate, and {_GAIN} × their difference"
    body += f"<h2>Worst pairs</h2><p class=soft>By SSIM: {key}.</p>"
    body += _gallery(worst, each, pictures)
    if lost:
        body += f"<h2>Scenes lost</h2><p class=soft>Right in the reference alone: {key}.</p>"
        body += _gallery(lost, each, pictures)
    return body


def _gallery(indices: Iterable[int], each: Sequence[PicturePair], pictures: Pictures) -> str:
    figures = []
    for i in indices:
        pair, one, other = each[i], pictures.reference[i], pictures.candidate[i]
        difference = np.abs(one.astype(np.int16) - other) * _GAIN
        shown = (one, other, np.minimum(difference, 255).astype(np.uint8))
        labels = ("reference", "candidate", "difference")
        if pair.reference_right is None:
            marks = list(labels)
        else:
            marks = [_mark(pair.reference_right), _mark(pair.candidate_right), "&nbsp;"]
        cells = "".join(
            f'<span><img alt="{label}" src="{_data_uri(image)}"><span class=legend>{mark}</span>'
            "</span>"
            for label, image, mark in zip(labels, shown, marks, strict=True)
        )
        figures.append(
            f"<figure><div>{cells}</div><figcaption>{escape(pair.prompt)}<br>"
            f"<span class=soft>seed {pair.seed}, SSIM {pair.ssim:.3f}, PSNR "
            f"{_number(pair.psnr)} dB, latents {_number(pair.latent_error)}</span>"
            "</figcaption></figure>"
        )
    return f"<div class=pairs>{''.join(figures)}</div>"


def _mark(right: bool | None) -> str:
    return "<span class=good>right</span>" if right else "<span class=bad>wrong</span>"


def _data_uri(image: np.ndarray) -> str:
    """PNG; of a large picture, which would take megabytes, a reduced JPEG."""
    picture = Image.fromarray(image)
    stream = io.BytesIO()
    if max(picture.size) <= _LOSSLESS_SIDE:
        kind = "png"
        picture.save(stream, format="PNG", optimize=True)
    else:
        kind = "jpeg"
        picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        picture.save(stream, format="JPEG", quality=92)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def _layers(report: Report) -> str:
    linears = report.linears
    if not linears:
        return f"<h2>Linear layers</h2><p>{escape(report.linears_note)}</p>"
    ordered = sorted(linears, key=_severity, reverse=True)
    rows = [
        [
            linear.component, linear.layer, linear.precision,
            _number(linear.own_error, none="not finite"),
            _number(linear.in_place_error, none="not finite"),
        ]
        for linear in ordered
    ]  # fmt: skip
    heads = ["component", "linear", "weight", "same input", "in place"]
    return (
        "<h2>Linear layers</h2>"
        "<p>‖y′ − y‖ / ‖y‖ of each linear on activations of the reference at "
        "several steps: given the same input, and in its place, where it also carries what the "
        "layers before it add.</p>"
        + plots.layer_errors(linears)
        + table(heads, rows[:_ROWS])
        + f"<details><summary>All {len(rows)} linears</summary>{table(heads, rows)}</details>"
    )


def _severity(linear: LinearError) -> float:
    return float("inf") if linear.own_error is None else linear.own_error


def _origin(report: Report) -> str:
    sides = (report.candidate, report.reference)
    keys = (
        "bundle",
        "policy",
        "policy_sha256",
        "manifest_sha256",
        "target",
        "builder",
        "made",
    )
    rows = [[key, *(getattr(side, key) for side in sides)] for key in keys]
    for name in report.candidate.weight_bytes:
        sizes = [side.weight_bytes.get(name, 0) for side in sides]
        rows.append([f"{name} weights", *map(format_bytes, sizes)])
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return (
        "<h2>How it was made</h2>"
        + table(["", "candidate", "reference"], rows)
        + f"<p class=soft><code>{escape(report.command)}</code><br>{escape(versions)}; "
        f"{report.seconds:.0f} s</p>"
    )


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of plain text; a column whose cells begin with a digit or a sign stands right."""

    def cell(tag: str, text: str, right: bool) -> str:
        return f"<{tag}{' class=n' if right else ''}>{escape(text)}</{tag}>"

    body = [list(row) for row in rows]
    numeric = [
        all(row[i][:1].isdigit() or row[i][:1] in "+-−∞n" for row in body) and i > 0
        for i in range(len(heads))
    ]
    lines = [
        "<tr>" + "".join(cell(tag, t, n) for t, n in zip(row, numeric, strict=True)) + "</tr>"
        for tag, row in [("th", list(heads)), *(("td", row) for row in body)]
    ]
    return f"<div class=table><table>{''.join(lines)}</table></div>"
