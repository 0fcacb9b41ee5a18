"""Finding the model that ``--model`` names, and which files of a repository on the hub are read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from sd35_trt.components import COMPONENTS
from sd35_trt.errors import CheckpointError
from sd35_trt.mini import checkpoint_path

from .file_formats import file_header
from .original import LAYOUTS
from .repository import LICENCE, Repository
from .single_file import FILE_NAMES
from .tensor_names import Kind
from .weight_files import weight_names

#: Suffixes of models in one file.
FILE_SUFFIXES = (".safetensors", ".gguf")

_ID = re.compile(
    r"(?P<repository>\w[\w.-]*/\w[\w.-]*)"
    r"(?:@(?P<revision>refs/[\w./-]+?|[\w.-]+?))?"
    r"(?:/(?P<file>[^@]+\.(?:safetensors|gguf)))?"
)


def resolve_model(model: str) -> Path:
    """The directory or file behind ``mini``, a path, or a model on the hub.

    On the hub, that is ``owner/name``, ``owner/name@revision``, or either with the file of a model
    behind it: ``owner/name/file.safetensors``.

    Raises:
        CheckpointError: not here, and not to be had from the hub.
    """
    if model == "mini":
        return checkpoint_path()
    path = Path(model).expanduser()
    match = _ID.fullmatch(model)
    if match is None or _is_local(path, match["file"] is not None):
        return path
    return _fetch(Repository(match["repository"], match["revision"]), match["file"])


def _is_local(path: Path, has_file: bool) -> bool:
    """Whether what may be a hub id is meant as a path.

    Args:
        has_file: whether it would name a file of a repository.
    """
    # A dangling link is here, and whoever opens it says where it leads.
    if path.exists() or path.is_symlink():
        return True
    return Path(path.parts[0]).exists() if has_file else path.suffix.lower() in FILE_SUFFIXES


def _fetch(repository: Repository, file: str | None) -> Path:
    """The directory of a diffusers model, or the file of one.

    Args:
        file: the one that is meant; None takes a diffusers model, else the only file.

    Raises:
        CheckpointError: no such repository, revision or file; several models.
    """
    names = repository.names()
    if file is None and "model_index.json" in names:
        return repository.download(model_files(names))
    models = model_names(names)
    if file is None and len(models) == 1:
        (file,) = models
    if file is None:
        raise CheckpointError(
            f"{repository} has no model_index.json"
            + (f", and {len(models)} single files" if models else ""),
            f"name the file: --model {repository}/{models[0]}" if models else LICENCE,
        )
    if file not in names:
        near = f"it has {', '.join(models[:5])}" if models else "it has no model in one file"
        raise CheckpointError(f"{repository} has no file {file}", near)
    path = repository.download([file]) / file
    header = file_header(path) if path.suffix == ".safetensors" else {}
    tensors = () if isinstance(header, Kind) else header
    repository.download(part_files(file, names, tensors))
    return path


def model_files(names: Sequence[str]) -> list[str]:
    """Of a diffusers repository's files, those that a build reads."""
    parts = dict.fromkeys(row.part for row in COMPONENTS.values())
    tokenizers = {row.tokenizer for row in COMPONENTS.values() if row.tokenizer}
    files = [name for name in names if name == "model_index.json" or _folder(name) == "scheduler"]
    files += [name for name in names if _folder(name) in tokenizers]
    for part in parts:
        own = [PurePosixPath(name).name for name in names if _folder(name) == part]
        chosen = weight_names(part, own)
        # Where nothing can be chosen, what is there says why when it is looked at.
        if not chosen:
            chosen = [name for name in own if name.endswith(".index.json")]
        files += [f"{part}/{name}" for name in ("config.json", *chosen) if name in own]
    return files


def model_names(names: Iterable[str]) -> list[str]:
    """Of a repository's files, those that may be a whole model: no part, nor in a part's folder."""
    parts = {stem for stems in FILE_NAMES.values() for stem in stems}
    folders = {"text_encoders", "clip", "vae", *(row.part for row in COMPONENTS.values())}
    return sorted(
        name
        for name in names
        if PurePosixPath(name).suffix.lower() in FILE_SUFFIXES
        and not folders & {*PurePosixPath(name).parts[:-1]}
        and PurePosixPath(name).stem not in parts
    )


def part_files(file: str, names: Sequence[str], tensors: Iterable[str]) -> list[str]:
    """The files of the parts that a model in one file lacks, and of the tokenizers.

    Args:
        file: the model's.
        names: of the repository's files.
        tensors: names in the file.
    """
    present = set(tensors)
    tokenizers = {row.tokenizer for row in COMPONENTS.values() if row.tokenizer}
    files = [name for name in names if _folder(name) in tokenizers]
    stems = {name: PurePosixPath(name).stem for name in names if name != file}
    for part, preferred in FILE_NAMES.items():
        layout = LAYOUTS[part]
        if any(prefix + layout.anchor in present for prefix in layout.prefixes):
            continue
        matching = (name for stem in preferred for name, own in stems.items() if own == stem)
        files += [name for name in [next(matching, None)] if name is not None]
    return files


def _folder(name: str) -> str | None:
    """The folder of a file one level down."""
    parts = PurePosixPath(name).parts
    return parts[0] if len(parts) == 2 else None
