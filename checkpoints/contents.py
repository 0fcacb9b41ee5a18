"""What a path holds, from headers and small files alone, in the words of an error.

A message that something is missing, or is not what was asked for, is made here, so that it says
what is there instead and what to do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sd35_trt.errors import CheckpointError
from sd35_trt.formats.reading import read_file

from .file_formats import AGAIN, file_header, format_kind
from .tensor_names import (
    BESIDE,
    MERGED,
    MODEL,
    PART,
    SD35,
    Kind,
    adapter_kind,
    is_sd3,
    tensors_kind,
)

#: Bytes of a JSON file of a model; the index of a large one, and its tokenizers, have some MB.
LARGEST_JSON = 256 << 20

_SAVE = "save the model with StableDiffusion3Pipeline.save_pretrained, or download it again"

# What downloads that are not finished are called, by hf, browsers, wget and aria2.
_UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".!qB", ".aria2")

# What aria2 keeps beside a file, which has its full length from the start.
_CONTROL = ".aria2"

# Folders of a diffusers model, some of which tell it.
_PARTS = ("transformer", "text_encoder", "text_encoder_2", "vae", "scheduler")

_PEFT = {
    "LORA": "a LoRA", "LOKR": "a LoKr", "LOHA": "a LoHa", "OFT": "an OFT adapter",
    "BOFT": "a BOFT adapter", "IA3": "an (IA)³ adapter",
}  # fmt: skip

# As many files of a folder are named.
_SOME = 3


def refusal(
    path: Path, wanted: str = MODEL, instead: str | None = None, kind: Kind | None = None
) -> CheckpointError:
    """The one line about a path that is not what is wanted.

    Args:
        wanted: what was looked for there, such as "the model's CLIP-L".
        instead: another way out, added to the advice.
        kind: what it is; None looks.
    """
    kind = kind or describe(path)
    message = f"{path} is {kind.title}" + ("" if kind.broken else f", not {wanted}")
    # Advice for something else is about models.
    advice = kind.advice if kind.broken or wanted == MODEL else f"put {wanted} there"
    return CheckpointError(message, f"{advice}; or {instead}" if instead else advice)


def describe(path: Path) -> Kind:
    """What a path holds. Reads headers and small files alone; never waits on a pipe."""
    try:
        if path.is_dir():
            return _folder_kind(path)
        if path.is_file():
            return _file_kind(path)
        if path.exists():
            return Kind("neither a file nor a directory", SD35, broken=True)
        return _missing_kind(path)
    except OSError as error:
        return Kind(f"not readable ({error.strerror or error})", "make it readable", broken=True)


def unfinished(path: Path) -> str | None:
    """What is there of a download of this file that did not finish; None where nothing is.

    It is beside the file, or where ``hf download --local-dir`` keeps it under a name of its own.
    """
    if path.name.endswith(_UNFINISHED):
        return path.name
    for suffix in _UNFINISHED if not path.is_file() else (_CONTROL,):
        beside = path.with_name(path.name + suffix)
        if beside.is_file():
            return beside.name
    return None if path.is_file() else _local_download(path)


def unfinished_name(name: str) -> str:
    """The name that a file will have once its download has finished."""
    return next((name.removesuffix(end) for end in _UNFINISHED if name.endswith(end)), name)


def _local_download(path: Path) -> str | None:
    for root in list(path.parents)[:2]:
        downloads = root / ".cache" / "huggingface" / "download" / path.parent.relative_to(root)
        for part in sorted(downloads.glob("*.incomplete")):
            return str(part.relative_to(root))
    return None


def _missing_kind(path: Path) -> Kind:
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            link = f"a dangling link to {place.readlink()}"
            title = link if place == path else f"missing: {place} is {link}"
            return Kind(title, f"mend the link, or {AGAIN}", broken=True)
    part = unfinished(path)
    title = "missing" if part is None else f"missing: its download did not finish ({part})"
    return Kind(title, AGAIN, broken=True)


def _file_kind(path: Path) -> Kind:
    part = unfinished(path)
    if part is not None:
        beside = "" if part == path.name else f" ({part} is beside it)"
        return Kind(f"a download that did not finish{beside}", AGAIN, broken=True)
    kind = format_kind(path)
    if kind is not None and kind.broken:
        return kind
    if path.name in ("model_index.json", "config.json") or path.name.endswith(".index.json"):
        return Kind("a small file of a model", f"give the model's directory: {_model_root(path)}")
    if kind is not None:
        return kind
    header = file_header(path)
    return header if isinstance(header, Kind) else tensors_kind(header)


def _model_root(path: Path) -> Path:
    """The directory with model_index.json that a file is in; else its own."""
    return next((p for p in list(path.parents)[:2] if (p / "model_index.json").is_file()),
                path.parent)  # fmt: skip


def _folder_kind(folder: Path) -> Kind:
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        return Kind("an empty folder", AGAIN, broken=True)
    for name, describe_by in _TELLING.items():
        if name in names:
            kind = describe_by(folder / name)
            if kind is not None:
                return kind
    if (folder.parent / "model_index.json").is_file():
        return Kind("one part of a model", f"give the model's directory: {folder.parent}")
    parts = [name for name in _PARTS if (folder / name).is_dir()]
    if len(parts) > 1:
        return Kind(
            f"a folder with {', '.join(parts)}, but no model_index.json",
            "take the model_index.json too, from where the folders came from",
            broken=True,
        )
    return _nested_kind(folder) or _files_kind(folder, names)


def _nested_kind(folder: Path) -> Kind | None:
    """Of a folder that a model is further down in."""
    indexes = [*folder.glob("*/model_index.json"), *folder.glob("snapshots/*/model_index.json")]
    if not indexes:
        return None
    roots = sorted(index.parent for index in indexes)
    title = "a folder above a model" if len(roots) == 1 else f"a folder above {len(roots)} models"
    return Kind(title, f"give {roots[0]}", broken=False)


def _files_kind(folder: Path, names: list[str]) -> Kind:
    """Of a folder by the weights that lie in it."""
    tensors = [name for name in names if name.endswith(".safetensors")]
    for name in tensors:
        header = file_header(folder / name)
        if not isinstance(header, Kind) and is_sd3(header) and adapter_kind(header) is None:
            more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
            return Kind(f"a folder of single files ({name}{more})", f"give {folder / name}")
    if len(tensors) == 1:
        kind = describe(folder / tensors[0])
        return Kind(f"a folder with {tensors[0]}, which is {kind.title}", kind.advice)
    parts = [name for name in names if name.endswith(_UNFINISHED)]
    downloads = folder / ".cache" / "huggingface" / "download"
    if parts or any(downloads.glob("**/*.incomplete")):
        return Kind("a download that did not finish", AGAIN, broken=True)
    for name in names:
        file = folder / name
        weights = format_kind(file) if file.is_file() and name not in tensors else None
        if weights is not None and weights.weights:
            return Kind(f"a folder with {name}, which is {weights.title}", weights.advice)
    if tensors:
        shown = ", ".join(tensors[:_SOME]) + (", …" if len(tensors) > _SOME else "")
        return Kind(f"a folder of single files, of which none is a model ({shown})", SD35)
    return Kind("not a diffusers model directory (no model_index.json) and holds no weights",
                _SAVE, broken=True)  # fmt: skip


def _small_json(path: Path) -> dict[str, Any] | Kind:
    try:
        data = json.loads(read_file(path, LARGEST_JSON))
    except (OSError, ValueError, RecursionError):
        kind = describe(path)
        title = kind.title if kind.broken else "no JSON"
        return Kind(f"a folder whose {path.name} is {title}", AGAIN, broken=True)
    return data if isinstance(data, dict) else {}


def _by_model_index(path: Path) -> Kind | None:
    data = _small_json(path)
    if isinstance(data, Kind):
        return data
    name = data.get("_class_name")
    return Kind(f"a {name} in diffusers' layout" if name else "a folder of diffusers' without a "
                "pipeline's class", SD35)  # fmt: skip


def _by_bundle(path: Path) -> Kind | None:
    return Kind("a bundle that sd35-trt built", f"draw with it: sd35-trt generate {path.parent}")


def _by_adapter_config(path: Path) -> Kind | None:
    data = _small_json(path)
    kind = str(data.get("peft_type")) if isinstance(data, dict) else ""
    merge = "merge it into the model: merge_and_unload() in PEFT, then save_pretrained(DIR), " \
            "and give the directory"  # fmt: skip
    advice = MERGED if kind in ("LORA", "LOKR", "LOHA") else merge
    return Kind(f"{_PEFT.get(kind, 'an adapter')} of PEFT", advice)


def _by_config(path: Path) -> Kind | None:
    data = _small_json(path)
    if isinstance(data, Kind):
        return data
    names = data.get("architectures")
    name = data.get("_class_name") or (names[0] if isinstance(names, list) and names else None)
    if name is None:
        return None
    if "ControlNet" in str(name):
        alone = f"bundles take none of these: give the {MODEL} model alone"
        return Kind(f"a ControlNet ({name})", BESIDE if name == "SD3ControlNetModel" else alone)
    root = path.parent.parent
    if (root / "model_index.json").is_file():
        return Kind(f"one part of a model ({name})", f"give the model's directory: {root}")
    return Kind(f"one part of a model ({name})", PART)


# Small files that tell a folder, the most telling first.
_TELLING = {
    "model_index.json": _by_model_index,
    "bundle.json": _by_bundle,
    "adapter_config.json": _by_adapter_config,
    "config.json": _by_config,
}
