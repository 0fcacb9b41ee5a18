"""Parts that the user names in place of a model's own: files, or folders of one part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sd35_trt.errors import UsageError

from .beside import OPTIONS
from .configuration import KINDS, class_name, complete
from .diffusers import FolderWeights, Part, read_json, respelled
from .part_files import configure, open_own_file


@dataclass(frozen=True, kw_only=True)
class PartOptions:
    """What replaces parts of a model; each is a file or a folder, None for the model's own.

    Attributes:
        clip_l, clip_g, t5, vae: a ``.safetensors`` file in original or transformers' names, a
            ``.gguf`` file, a folder that diffusers or transformers saved, or a model directory
            with such a folder.
    """

    clip_l: Path | None = None
    clip_g: Path | None = None
    t5: Path | None = None
    vae: Path | None = None

    @property
    def part_paths(self) -> dict[str, Path]:
        """Part → what replaces it."""
        paths = (self.clip_l, self.clip_g, self.t5, self.vae)
        pairs = zip(OPTIONS, paths, strict=True)
        return {part: path for part, path in pairs if path is not None}


#: None is replaced.
OWN_PARTS = PartOptions()


def open_part(part: str, path: Path) -> Part:
    """A part that the user names.

    Raises:
        CheckpointError: it holds something else, or cannot be read.
        UsageError: there is nothing, or a folder without such a part.
    """
    option, title = OPTIONS[part], KINDS[part].title
    if not path.exists():
        raise UsageError(f"{option}: {path} is missing", f"give a file or a folder of {title}")
    if not path.is_dir():
        weights = open_own_file(path, part)
        config = configure(weights, part)
        return Part(part, path, open_part, path, None, config, weights, weights.files)
    folder = next((f for f in (path, path / part) if (f / "config.json").is_file()), None)
    if folder is None:
        raise UsageError(
            f"{option}: {path} has no config.json",
            f"give a file, or a folder of {title} that diffusers or transformers saved",
        )
    place = folder / "config.json"
    data, stored = read_json(place), FolderWeights(folder)
    name = class_name(data)
    return Part(
        part,
        path,
        open_part,
        place,
        None if name is None else str(name),
        complete(part, data),
        respelled(part, stored),
        [place, *stored.files],
    )


def open_parts(paths: Mapping[str, Path]) -> dict[str, Part]:
    """As :func:`open_part`, of several."""
    return {part: open_part(part, path.expanduser()) for part, path in paths.items()}
