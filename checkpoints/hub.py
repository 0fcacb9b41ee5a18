"""Finding the model that ``--model`` names, and which files of a repository on the hub are read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from sd35_trt.components import COMPONENTS, CONTROLNET
from sd35_trt.errors import CheckpointError
from sd35_trt.mini import checkpoint_path, controlnet_paths, lora_paths

from .beside import ambiguous
from .file_formats import file_header
from .model_options import OPTIONS, PACKAGED
from .original import LAYOUTS
from .part_names import SUFFIXES, is_published, names_after, rank, same_names
from .repository import LICENCE, Repository
from .tensor_names import Kind
from .weight_files import weight_names

_CONFIG = "config.json"

_ID = re.compile(
    r"(?P<repository>\w[\w.-]*/\w[\w.-]*)"
    r"(?:@(?P<revision>refs/[\w./-]+?|[\w.-]+?))?"
    r"(?:/(?P<file>[^@]+\.(?:safetensors|gguf)))?"
)

_ADDRESS = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repository>[\w.-]+/[\w.-]+)"
    r"(?:/(?:tree|blob|resolve)/(?P<revision>[^/?#]+)(?P<file>/[^?#]+\.(?:safetensors|gguf))?)?"
    r"(?:[/?#].*)?"
)


def expand_user(path: Path) -> Path:
    """The path with the home directory of ``~`` and ``~user`` in it.

    Raises:
        CheckpointError: there is no such home directory.
    """
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise CheckpointError(
            f"there is no home directory for {path}", "give the whole path"
        ) from error


def resolve_model(model: str) -> Path:
    """The directory or file behind ``mini``, a path, or a model on the hub.

    On the hub, that is ``owner/name``, ``owner/name@revision``, or either with the file of a model
    behind it: ``owner/name/file.safetensors``.

    Raises:
        CheckpointError: not here, and not to be had from the hub.
    """
    if model == "mini":
        return checkpoint_path()
    if "://" in model:
        raise CheckpointError(f"{model} is an address", f"give {_instead_of(model)}")
    path = expand_user(Path(model))
    match = _ID.fullmatch(model)
    if match is None or _is_local(path, match["file"] is not None):
        return path
    return _fetch(Repository(match["repository"], match["revision"]), match["file"])


def resolve_lora(lora: Path) -> Path:
    """The file behind ``mini:NAME``, or a path.

    Raises:
        CheckpointError: mini has no such LoRA, or there is no such home directory.
    """
    return _packaged(str(lora), "LoRA", lora_paths()) or expand_user(lora)


def resolve_net(model: str) -> Path:
    """The folder, or the file, behind a ControlNet's ``mini:NAME``, a path, or a repository on the
    hub whose files lie at its top, or one of its files: ``owner/name``, ``owner/name@revision``,
    ``owner/name/file``.

    Raises:
        CheckpointError: mini has no such net; not here, and not to be had from the hub.
    """
    if packaged := _packaged(model, "ControlNet", controlnet_paths()):
        return packaged
    path, match = expand_user(Path(model)), _ID.fullmatch(model)
    if match is None or _is_local(path, match["file"] is not None):
        return path
    return _fetch_net(Repository(match["repository"], match["revision"]), match["file"])


def _packaged(word: str, kind: str, paths: Mapping[str, Path]) -> Path | None:
    """What comes with mini as ``mini:NAME``; None for a word of another form."""
    name = word.removeprefix(PACKAGED)
    if name == word:
        return None
    if name not in paths:
        listed = " and ".join(f"{PACKAGED}{own}" for own in paths)
        verb = "are" if len(paths) > 1 else "is"
        raise CheckpointError(f"mini has no {kind} {name!r}", f"there {verb} {listed}")
    return paths[name]


def _instead_of(address: str) -> str:
    """What to give in place of an address."""
    match = _ADDRESS.fullmatch(address)
    if match is None:
        return "a path, after downloading it, or a hub id"
    revision = f"@{match['revision']}" if match["revision"] not in (None, "main") else ""
    return f"the hub id: {match['repository']}{revision}{match['file'] or ''}"


def _is_local(path: Path, has_file: bool) -> bool:
    """Whether what may be a hub id is meant as a path.

    Args:
        has_file: whether it would name a file of a repository.
    """
    # A dangling link is here, and whoever opens it says where it leads.
    if path.exists() or path.is_symlink():
        return True
    return Path(path.parts[0]).exists() if has_file else path.suffix.lower() in SUFFIXES


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
        raise _no_file(repository, file, models)
    path = repository.download([file]) / file
    header = file_header(path) if path.suffix == ".safetensors" else {}
    tensors = () if isinstance(header, Kind) else header
    repository.download(part_files(file, names, tensors))
    return path


def _fetch_net(repository: Repository, file: str | None) -> Path:
    """The folder of a ControlNet at a repository's top, or the file of one.

    Raises:
        CheckpointError: no such repository, revision or file; none at its top.
    """
    names = repository.names()
    if file is None and _CONFIG in names:
        return repository.download([_CONFIG, *weight_names(CONTROLNET, names)])
    if file is None:
        files = sorted(name for name in names if PurePosixPath(name).suffix.lower() in SUFFIXES)
        raise CheckpointError(
            f"{repository} has no {_CONFIG} at its top"
            + (f", and {len(files)} single files" if files else ""),
            f"name the file: --controlnet NAME={repository}/{files[0]}" if files else LICENCE,
        )
    if file not in names:
        raise _no_file(repository, file, model_names(names))
    # Of a file in diffusers' names; Stability's say all that there is to say.
    beside = str(PurePosixPath(file).with_name(_CONFIG))
    return repository.download([file, beside]) / file


def _no_file(repository: Repository, file: str, models: Sequence[str]) -> CheckpointError:
    near = f"it has {', '.join(models[:5])}" if models else "it has no model in one file"
    return CheckpointError(f"{repository} has no file {file}", near)


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
        files += [f"{part}/{name}" for name in (_CONFIG, *chosen) if name in own]
    return files


def model_names(names: Iterable[str]) -> list[str]:
    """Of a repository's files, those that may be a whole model: no part, nor in a part's folder."""
    folders = {"text_encoders", "clip", "vae", *(row.part for row in COMPONENTS.values())}
    files = [path for path in map(PurePosixPath, names) if path.suffix.lower() in SUFFIXES]
    return sorted(
        str(file)
        for file in files
        if not folders & {*file.parts[:-1]}
        and not any(
            is_published(file, part) or any(names_after(model, file, part) for model in files)
            for part in OPTIONS
        )
    )


def part_files(file: str, names: Sequence[str], tensors: Iterable[str]) -> list[str]:
    """The files of the parts that a model in one file lacks, and of the tokenizers.

    Args:
        file: the model's.
        names: of the repository's files.
        tensors: names in the file.

    Raises:
        CheckpointError: several files could be a part.
    """
    present = set(tensors)
    tokenizers = {row.tokenizer for row in COMPONENTS.values() if row.tokenizer}
    files = [name for name in names if _folder(name) in tokenizers]
    others = [PurePosixPath(name) for name in names if name != file]
    others = [path for path in others if path.suffix.lower() in SUFFIXES]
    for part in OPTIONS:
        layout = LAYOUTS[part]
        if any(p + anchor in present for p in layout.prefixes for anchor in layout.anchors):
            continue
        own = [path for path in others if names_after(PurePosixPath(file), path, part)]
        matching = own or [path for path in others if is_published(path, part)]
        best = [path for path in matching if rank(path) == min(map(rank, matching))]
        if part != "vae" and not same_names(best):
            raise ambiguous(file, part, map(str, best))
        files += map(str, best[:1])
    return files


def _folder(name: str) -> str | None:
    """The folder of a file one level down."""
    parts = PurePosixPath(name).parts
    return parts[0] if len(parts) == 2 else None
