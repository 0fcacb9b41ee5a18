"""Finding the model that ``--model`` names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from sd35_trt.compat.requirement import requirement
from sd35_trt.errors import CheckpointError
from sd35_trt.mini import checkpoint_path
from sd35_trt.variants import telling_words

# What a build reads of a repository on the hub.
_PATTERNS = (
    "*.json",
    "*.txt",
    "*.model",
    "text_encoder*/*.safetensors",
    "transformer/*.safetensors",
    "vae/*.safetensors",
)

# The tokenizers of all SD3.5 models are the same.
_TOKENIZERS = "stabilityai/stable-diffusion-3.5-medium"

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


def resolve_model(model: str) -> Path:
    """The directory or file behind ``mini``, a path, or a hub id such as ``owner/name``.

    Raises:
        CheckpointError: not here, and not to be had from the hub.
    """
    if model == "mini":
        return checkpoint_path()
    path = Path(model).expanduser()
    # A dangling link is here, and whoever opens it says where it leads.
    is_file = path.suffix.lower() in (".safetensors", ".gguf")
    if path.exists() or path.is_symlink() or is_file or not _HUB_ID.fullmatch(model):
        return path
    return _fetch(
        model,
        _PATTERNS,
        f"{model} is not a directory here and cannot be fetched from the hub",
        "give a local directory, or accept the model's licence and run: hf auth login",
    )


def model_name(model: str, path: Path) -> str:
    """What a bundle of the model is called: ``mini``, or the name of its directory or file.

    Args:
        path: from :func:`resolve_model`.
    """
    if model == "mini":
        return model
    return path.stem if path.is_file() else path.resolve().name


def telling_name(path: Path) -> str:
    """The name of a model that tells its variant.

    That of what the path leads to; where it says nothing, that of a link on the way there. In the
    hub's cache, files and folders are named by hashes: there the repository's name counts. Folders
    above say nothing.

    Args:
        path: a file or a folder.
    """
    return next(filter(telling_words, _names(path)), path.name)


def _names(path: Path) -> Iterator[str]:
    """Names of a model, the most telling first."""
    links = [path.absolute()]
    while links[0].is_symlink():
        links.insert(0, links[0].parent / links[0].readlink())
    places = [path.resolve(), *links]
    repositories = {place: _repository(place) for place in places}
    for place in places:
        snapshot = place.parent.name == "snapshots"
        yield repositories[place] if snapshot and repositories[place] else place.name
    yield from filter(None, repositories.values())


def _repository(path: Path) -> str:
    """The name, without its owner, of the repository in the hub's cache that a path is in.

    Empty where it is in none. The cache has ``models--OWNER--NAME/snapshots/REVISION/…``, links to
    ``models--OWNER--NAME/blobs/HASH``.
    """
    for folder in path.parents:
        if folder.name in ("snapshots", "blobs") and folder.parent.name.startswith("models--"):
            return folder.parent.name.rpartition("--")[2]
    return ""


def fetch_tokenizers(file: Path) -> Path:
    """A directory with SD3.5's three tokenizers, from the hub.

    Args:
        file: the single-file checkpoint that has none beside it.

    Raises:
        CheckpointError: they are not to be had from the hub.
    """
    return _fetch(
        _TOKENIZERS,
        ("tokenizer*/*",),
        f"{file} has no tokenizers beside it, and {_TOKENIZERS} cannot be fetched from the hub",
        "give a folder with tokenizer, tokenizer_2 and tokenizer_3: --tokenizers DIR",
    )


def _fetch(repository: str, patterns: tuple[str, ...], failure: str, fix: str) -> Path:
    with requirement("fetching from the hub", "build"):
        from huggingface_hub import snapshot_download
    try:
        return Path(
            snapshot_download(
                repository, allow_patterns=list(patterns), ignore_patterns=["*.fp16*", "*.bf16*"]
            )
        )
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{failure}: {reason}", fix) from error
