"""Which files of a part's folder hold its weights: what diffusers and transformers read there.

Both read the plain file before a variant (``fp16``), and a variant only when asked; where a folder
has nothing plain, its variant is what can be meant. Names of variants:
``diffusers.pipelines.pipeline_loading_utils.variant_compatible_siblings``, legacy ones too.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd35_trt.errors import CheckpointError
from sd35_trt.formats.reading import read_file, reason_of

from .contents import LARGEST_JSON, refusal, unfinished
from .file_formats import AGAIN, format_kind

# Names that transformers and diffusers save under.
_TRANSFORMERS, _DIFFUSERS = "model", "diffusion_pytorch_model"

# Of several variants without a plain file; others are not told apart.
_PREFERRED = ("", "fp32", "fp16", "bf16")

_VARIANT = r"\.(?P<variant>\w+)"
_SHARD = r"-(?P<number>\d{5})-of-(?P<count>\d{5})"

# What comes after the stem; each spelling has its own pattern.
_SINGLE = (r"\.safetensors", rf"{_VARIANT}\.safetensors")
_INDEX = (
    r"\.safetensors\.index\.json",
    rf"\.safetensors\.index{_VARIANT}\.json",
    rf"\.safetensors{_VARIANT}\.index\.json",
    rf"{_VARIANT}\.safetensors\.index\.json",
)
_SHARDS = (
    rf"{_SHARD}\.safetensors",
    rf"{_VARIANT}{_SHARD}\.safetensors",
    rf"{_SHARD}{_VARIANT}\.safetensors",
)

_CONVERT = (
    "convert the model: StableDiffusion3Pipeline.from_pretrained(DIR).save_pretrained(NEW), where "
    "you trust it"
)


@dataclass(frozen=True)
class _Names:
    """A folder's files of one kind, by variant; the plain file's is empty."""

    stem: str
    single: dict[str, str]
    index: dict[str, str]
    shards: dict[str, list[re.Match[str]]]

    @property
    def variants(self) -> list[str]:
        return sorted({*self.single, *self.index, *self.shards})

    @property
    def variant(self) -> str | None:
        """The one that is meant; None where they are not told apart."""
        variants = self.variants
        variant = next((v for v in _PREFERRED if v in variants), variants[0])
        return variant if variant in _PREFERRED or len(variants) == 1 else None

    def choose(self, variant: str) -> tuple[str | None, str | None]:
        """The index or the file of a variant; neither where there are shards alone.

        transformers looks for the file before the index, diffusers for the index before the file.
        """
        index, single = self.index.get(variant), self.single.get(variant)
        if index is not None and (single is None or self.stem == _DIFFUSERS):
            return index, None
        return None, single


def weight_files(folder: Path, instead: str | None = None) -> list[Path]:
    """The safetensors files of a part, which are there, the shards of an index in order.

    Args:
        folder: the part's, named as in the diffusers layout.
        instead: another way out than a file, for the message.

    Raises:
        CheckpointError: no safetensors there, a shard that is missing, or several variants of
            which none is the plain one.
    """
    if not folder.is_dir():
        raise refusal(folder, "a folder of weights", instead)
    names = sorted(entry.name for entry in folder.iterdir())
    listed = _listed(folder.name, names)
    if listed is None:
        raise _no_weights(folder, names, _stems(folder.name)[0], instead)
    return _files(folder, listed, instead)


def weight_names(part: str, names: Iterable[str]) -> list[str]:
    """Of the names in a part's folder, those of the files that :func:`weight_files` opens.

    The folder need not be here. Nothing is named where there are no weights, or several variants
    that are not told apart.
    """
    listed = _listed(part, sorted(names))
    variant = None if listed is None else listed.variant
    if listed is None or variant is None:
        return []
    index, single = listed.choose(variant)
    if single is not None:
        return [single]
    shards = [match[0] for match in listed.shards.get(variant, [])]
    return shards if index is None else [index, *shards]


def _stems(part: str) -> tuple[str, str]:
    """Names that weights are saved under, the usual one first."""
    if part.startswith("text_encoder"):
        return _TRANSFORMERS, _DIFFUSERS
    return _DIFFUSERS, _TRANSFORMERS


def _listed(part: str, names: list[str]) -> _Names | None:
    """What is there of weights; None where nothing is."""
    for stem in _stems(part):
        listed = _Names(
            stem,
            {variant: m[0] for variant, m in _matches(names, _SINGLE, stem)},
            {variant: m[0] for variant, m in _matches(names, _INDEX, stem)},
            {},
        )
        for variant, match in _matches(names, _SHARDS, stem):
            listed.shards.setdefault(variant, []).append(match)
        if listed.variants:
            return listed
    return None


def _matches(
    names: list[str], patterns: tuple[str, ...], stem: str
) -> list[tuple[str, re.Match[str]]]:
    """Of the names that match one of the patterns: the variant, and the match."""
    matches = []
    for pattern in patterns:
        compiled = re.compile(re.escape(stem) + pattern)
        for match in filter(None, map(compiled.fullmatch, names)):
            matches.append((match.groupdict().get("variant") or "", match))
    return matches


def _files(folder: Path, names: _Names, instead: str | None) -> list[Path]:
    variant = names.variant
    if variant is None:
        raise CheckpointError(
            f"{folder} has the variants {', '.join(names.variants)} of its weights, and no plain "
            "file",
            f"keep the one that is meant, as {names.stem}.safetensors",
        )
    index, single = names.choose(variant)
    if index is not None:
        return _indexed(folder / index, instead)
    if single is not None:
        return [_present(folder / single, instead)]
    return _unlisted(folder, names.shards[variant], instead)


def _indexed(index: Path, instead: str | None) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index} has no weight_map", AGAIN)
    shards = sorted({str(name) for name in names.values()})
    for name in shards:
        if Path(name).name != name:
            raise CheckpointError(f"{index} names {name!r}, which is not a file beside it", AGAIN)
    return [_present(index.parent / name, instead) for name in shards]


def _unlisted(folder: Path, shards: list[re.Match[str]], instead: str | None) -> list[Path]:
    """Shards without an index: all of them tell what they hold together."""
    counts = {match["count"] for match in shards}
    if len(counts) > 1:
        raise CheckpointError(
            f"{folder} has shards of several sets ({min(counts)} and {max(counts)}) and no index",
            AGAIN,
        )
    present = {int(match["number"]): match[0] for match in shards}
    count = int(counts.pop())
    for number in range(1, count + 1):
        if number not in present:
            name = shards[0][0].replace(f"-{shards[0]['number']}-of", f"-{number:05}-of")
            raise refusal(folder / name, "a shard", instead)
    return [_present(folder / present[number], instead) for number in range(1, count + 1)]


def _present(path: Path, instead: str | None) -> Path:
    if not path.is_file() or unfinished(path):
        raise refusal(path, "a file of weights", instead)
    return path


def _no_weights(folder: Path, names: list[str], stem: str, instead: str | None) -> CheckpointError:
    """What is there in place of the weights."""
    wanted = f"{stem}.safetensors"
    if os.path.lexists(folder / wanted) or unfinished(folder / wanted):
        return refusal(folder / wanted, "a file of weights", instead)
    others = [name for name in names if name.endswith(".safetensors")]
    if others:
        shown = ", ".join(others[:3])
        return CheckpointError(
            f"{folder} holds {shown}, and no {wanted}, which is what diffusers reads",
            f"rename the file that is meant to {wanted}",
        )
    for name in names:
        path = folder / name
        kind = format_kind(path) if path.is_file() else None
        if kind is not None and (kind.weights or kind.broken):
            pickled = "pickle" in kind.title
            advice = _CONVERT if pickled else kind.advice
            title = f"{folder} holds no .safetensors file but {name}, which is {kind.title}"
            return CheckpointError(title, advice if instead is None else f"{advice}; or {instead}")
    advice = AGAIN if instead is None else f"{AGAIN}; or {instead}"
    return CheckpointError(f"{folder} holds no .safetensors file", advice)


def read_json(path: Path, fix: str = AGAIN) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        fix: what the user is told to do where it is damaged.

    Raises:
        CheckpointError: missing, not JSON, or not an object.
    """
    other = fix if fix != AGAIN else None
    try:
        data = json.loads(read_file(path, LARGEST_JSON))
    except FileNotFoundError:
        raise refusal(path, "a file of the model", other) from None
    except (OSError, ValueError, RecursionError) as error:
        kind = format_kind(path) if path.is_file() else None
        if kind is not None and kind.broken:
            raise refusal(path, "JSON", other) from error
        raise CheckpointError(f"{path} cannot be read: {reason_of(error)}", fix) from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds no JSON object", fix)
    return data
