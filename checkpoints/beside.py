"""The file of a part that lies beside a model in one file.

Names and contents decide, never the order of a folder. Nearest first: the model's folder with the
folders in it that user interfaces keep such files in, then those one and two levels up. In each:

1. a file named after the model, as kohya's scripts save them: ``NAME_clip_l`` for ``NAME``;
2. the published part by its name, the most precise of several;
3. a file whose name says what it is beside other words: ``ft_clip_l``.

Where names tell nothing, a text encoder is told by its tensors and their width. Where several
files could be meant, none is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from sd35_trt.components import OPTIONAL_PARTS
from sd35_trt.errors import CheckpointError

from .contents import unfinished, unfinished_name
from .model_options import OPTIONS
from .original import LAYOUTS
from .part_files import find_prefix, open_file
from .part_names import (
    SUFFIXES,
    example_name,
    is_published,
    names_after,
    names_part,
    rank,
    same_names,
)

# Folders, in lower case, of Stability's repositories, ComfyUI, Forge, SwarmUI and StabilityMatrix.
_TEXT_FOLDERS = ("text_encoders", "text_encoder", "textencoders", "clip")
_VAE_FOLDERS = ("vae",)

# In Stability's repositories, whose other folders are not the original layout's.
_REPOSITORY_VAE = "vae/diffusion_pytorch_model.safetensors"

# Widths of the published encoders, by which a file is told whose name tells nothing.
_WIDTHS = {"text_encoder": 768, "text_encoder_2": 1280, "text_encoder_3": 4096}


def find_beside(model: Path, part: str) -> Path | None:
    """The file of a part beside a model; None for one that may be missing.

    A file that is broken and was meant by its name (a dangling link, half a download) is found
    where no other is, so that opening it says what is the matter.

    Args:
        model: the file with the transformer.

    Raises:
        CheckpointError: it is missing, or several files could be meant.
    """
    levels = list(_levels(model, part))
    whole = [[file for file in files if not _is_broken(file)] for files in levels]
    for files in whole:
        if place := _by_name(model, part, files):
            return place
    if part != "vae":
        for files in whole:
            if place := _only(model, part, [f for f in files if _told_by_width(f, part)]):
                return place
    for file in (file for files in levels for file in files):
        if _is_broken(file) and (names_part(file, part) or names_after(model, file, part)):
            return file
    if part in OPTIONAL_PARTS:
        return None
    folders = ", ".join(_VAE_FOLDERS if part == "vae" else _TEXT_FOLDERS)
    raise CheckpointError(
        f"{model} has no {LAYOUTS[part].title}, and there is no {example_name(part)}.safetensors "
        f"in {model.parent} or folders {folders} there and above",
        f"put it there, or name it: {OPTIONS[part]} FILE",
    )


def _levels(model: Path, part: str) -> Iterator[list[Path]]:
    """Files that may be a part's, nearest first; each once, where links lead to the same."""
    names = _VAE_FOLDERS if part == "vae" else _TEXT_FOLDERS
    folder = model.parent.absolute()
    files = [file for file in _files(folder) if file.name != model.name]
    for place in (folder, folder.parent, folder.parent.parent):
        entries = [f for f in _entries(place) if f.name.lower() in names and f.is_dir()]
        known = sorted(entries, key=lambda f: names.index(f.name.lower()))
        deeper = [inner for f in known for inner in _entries(f) if inner.is_dir()]
        files += [file for f in (*known, *deeper) for file in _files(f)]
        yield list({file.resolve(): file for file in reversed(files)}.values())[::-1]
        files = []


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:  # not ours to read: nothing there is meant
        return []


def _files(folder: Path) -> list[Path]:
    """Files of tensors by their suffix, and those of which part of a download is there."""
    files = [entry.with_name(unfinished_name(entry.name)) for entry in _entries(folder)]
    own = [f for f in files if f.suffix.lower() in SUFFIXES and not f.is_dir()]
    return list(dict.fromkeys(own))


def _is_broken(file: Path) -> bool:
    return not file.is_file() or unfinished(file) is not None


def _by_name(model: Path, part: str, files: Sequence[Path]) -> Path | None:
    """The file of one level whose name tells it.

    Raises:
        CheckpointError: several could be meant.
    """
    if own := [file for file in files if names_after(model, file, part)]:
        return _most_precise(model, part, own)
    published, near = [], []
    for file in files:
        if not names_part(file, part):
            continue
        if is_published(file, part):
            published.append(file)
        # What is named after another model is that one's.
        elif not any(names_after(m, file, part) for m in files) and _holds(file, part):
            near.append(file)
    if near:
        return _only(model, part, [*published, *near])
    repository = model.parent.absolute() / _REPOSITORY_VAE
    if part == "vae" and not published and repository in files:
        return repository
    return _most_precise(model, part, published)


def _most_precise(model: Path, part: str, files: Sequence[Path]) -> Path | None:
    ranks = {file: rank(file) for file in files}
    best = [file for file in files if ranks[file] == min(ranks.values())]
    # Files of one name are the same, and so are SD3's autoencoder and SD3.5's.
    alike = part == "vae" or same_names(best)
    return next(iter(best), None) if alike else _only(model, part, best)


def _only(model: Path, part: str, files: Sequence[Path]) -> Path | None:
    if len(files) > 1:
        raise ambiguous(str(model), part, map(str, files))
    return next(iter(files), None)


def ambiguous(model: str, part: str, files: Iterable[str]) -> CheckpointError:
    """The one line about several files that could be a part."""
    names = list(files)
    return CheckpointError(
        f"{model}: {len(names)} files could be its {LAYOUTS[part].title}: {', '.join(names)}",
        f"name the one that is meant: {OPTIONS[part]} FILE",
    )


def _holds(file: Path, part: str) -> bool:
    """Whether a file holds the part.

    Raises:
        CheckpointError: it cannot be read.
    """
    return find_prefix(open_file(file), part, alone=True) is not None


def _told_by_width(file: Path, part: str) -> bool:
    """Whether a file holds a text encoder of the published width."""
    try:
        tensors = open_file(file)
    except CheckpointError:  # its name says nothing of a text encoder, either
        return False
    prefix = find_prefix(tensors, part, alone=True)
    anchors = [f"{prefix}{anchor}" for anchor in LAYOUTS[part].anchors]
    widths = [tensors.shape(name)[-1] for name in anchors if name in tensors]
    return prefix is not None and widths[:1] == [_WIDTHS[part]]
