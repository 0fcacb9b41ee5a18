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

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sd35_trt.components import OPTIONAL_PARTS
from sd35_trt.errors import CheckpointError

from .gguf import SUFFIX
from .original import LAYOUTS
from .part_files import find_prefix, open_file

#: Part → the option that names its file.
OPTIONS = {
    "text_encoder": "--clip-l",
    "text_encoder_2": "--clip-g",
    "text_encoder_3": "--t5",
    "vae": "--vae",
}

# Folders, in lower case, of Stability's repositories, ComfyUI, Forge, SwarmUI and StabilityMatrix.
_TEXT_FOLDERS = ("text_encoders", "text_encoder", "textencoders", "clip")
_VAE_FOLDERS = ("vae",)

# In Stability's repositories, whose other folders are not the original layout's.
_REPOSITORY_VAE = "vae/diffusion_pytorch_model.safetensors"

_SUFFIXES = (".safetensors", SUFFIX)


@dataclass(frozen=True)
class _Naming:
    """How files of a part are called; names are in lower case, without suffix.

    Attributes:
        example: the published name.
        pattern: what a name holds.
        words: patterns of the words that published names consist of.
        own: what follows the model's name in a file that is named after it.
    """

    example: str
    pattern: str
    words: str
    own: str


# Between words: "eclipse_l" and "umt5xxl" are none.
_START, _END, _GAP = r"(?<![a-z0-9])", r"(?![a-z0-9])", r"[ _.-]?"
_PRECISION = r"fp32|f32|fp16|f16|bf16|fp8|e4m3fn|e4m3|e5m2|scaled|i?q\d|[01ksml]|xxs|xs|nl"
_CLIP_L, _CLIP_G = (rf"{_START}clip{_GAP}{letter}{_END}" for letter in "lg")
_T5 = rf"{_START}t5{_GAP}(v1{_GAP}1{_GAP})?xxl{_END}"
_VAE = rf"{_START}vae{_END}"
_T5_WORDS = r"t5|t5xxl|xxl|v1|google|enc|encoder|encoderonly|only"

_NAMINGS = {
    "text_encoder": _Naming("clip_l", _CLIP_L, rf"clip|clipl|{_PRECISION}", _CLIP_L),
    "text_encoder_2": _Naming("clip_g", _CLIP_G, rf"clip|clipg|g|{_PRECISION}", _CLIP_G),
    "text_encoder_3": _Naming("t5xxl_fp16", _T5, rf"{_T5_WORDS}|{_PRECISION}", _T5),
    # Not "ae": that is FLUX's autoencoder, which has the same shapes.
    "vae": _Naming(
        "sd3_vae",
        rf"(?=.*sd{_GAP}3)(?=.*{_VAE})",
        rf"sd|sd3|sd35|3|5|35|vae|large|medium|turbo|{_PRECISION}",
        _VAE,
    ),
}

# Widths of the published encoders, by which a file is told whose name tells nothing.
_WIDTHS = {"text_encoder": 768, "text_encoder_2": 1280, "text_encoder_3": 4096}


def find_beside(model: Path, part: str) -> Path | None:
    """The file of a part beside a model; None for one that may be missing.

    Args:
        model: the file with the transformer.

    Raises:
        CheckpointError: it is missing, or several files could be meant.
    """
    levels = list(_levels(model, part))
    for files in levels:
        if place := _by_name(model, part, files):
            return place
    if part != "vae":
        for files in levels:
            if place := _only(model, part, [f for f in files if _told_by_width(f, part)]):
                return place
    if part in OPTIONAL_PARTS:
        return None
    example, title = _NAMINGS[part].example, LAYOUTS[part].title
    folders = ", ".join(_VAE_FOLDERS if part == "vae" else _TEXT_FOLDERS)
    raise CheckpointError(
        f"{model} has no {title}, and there is no {example}.safetensors in {model.parent} or "
        f"folders {folders} there and above",
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
    return [f for f in _entries(folder) if f.suffix.lower() in _SUFFIXES and f.is_file()]


def _by_name(model: Path, part: str, files: Sequence[Path]) -> Path | None:
    """The file of one level whose name tells it.

    Raises:
        CheckpointError: several could be meant.
    """
    if own := [file for file in files if _names_after(model, file, part)]:
        return _most_precise(model, part, own)
    naming, published, near = _NAMINGS[part], [], []
    for file in files:
        if not re.search(naming.pattern, _name(file)):
            continue
        if _is_published(_name(file), naming):
            published.append(file)
        # What is named after another model is that one's.
        elif not any(_names_after(m, file, part) for m in files) and _holds(file, part):
            near.append(file)
    if near:
        return _only(model, part, [*published, *near])
    repository = model.parent.absolute() / _REPOSITORY_VAE
    if part == "vae" and not published and repository in files:
        return repository
    return _most_precise(model, part, published)


def _name(file: Path) -> str:
    return file.stem.lower()


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[ _.-]+", name) if word]


def _names_after(model: Path, file: Path, part: str) -> bool:
    """Whether a file is a model's by its name: ``NAME_clip_l`` is that of ``NAME``."""
    naming, rest = _NAMINGS[part], _name(file).removeprefix(_name(model))
    named = rest != _name(file) and rest[:1] in " _.-"
    return named and bool(re.search(naming.own, rest)) and _is_published(rest, naming)


def _is_published(name: str, naming: _Naming) -> bool:
    """Whether a name has no words besides those of published files."""
    return all(re.fullmatch(naming.words, word) for word in _words(name))


def _most_precise(model: Path, part: str, files: Sequence[Path]) -> Path | None:
    ranks = {file: _rank(file) for file in files}
    best = [file for file in files if ranks[file] == min(ranks.values())]
    # Files of one name are the same, and so are SD3's autoencoder and SD3.5's.
    alike = part == "vae" or len({_name(file) for file in best}) == 1
    return next(iter(best), None) if alike else _only(model, part, best)


def _rank(file: Path) -> int:
    """Lower for a more precise file, by its name."""
    words = set(_words(_name(file)))
    if file.suffix.lower() == SUFFIX:
        return 6
    if words & {"fp8", "e4m3fn", "e4m3", "e5m2"}:
        return 4 if "scaled" in words else 5
    named = [{"fp32", "f32"}, {"fp16", "f16"}, {"bf16"}]
    return next((rank for rank, names in enumerate(named) if words & names), len(named))


def _only(model: Path, part: str, files: Sequence[Path]) -> Path | None:
    if len(files) > 1:
        listed = ", ".join(map(str, files))
        raise CheckpointError(
            f"{model}: {len(files)} files could be its {LAYOUTS[part].title}: {listed}",
            f"name the one that is meant: {OPTIONS[part]} FILE",
        )
    return next(iter(files), None)


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
