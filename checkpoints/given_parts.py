"""Parts that the user names in place of a model's own: files, or folders of one part."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sd35_trt.errors import UsageError

from .configuration import KINDS, class_name
from .contents import describe
from .diffusers import Part, read_config, way_without
from .findings import Findings
from .hub import expand_user
from .model_options import OPTIONS
from .part_files import configure, open_own_file
from .weight_files import read_json
from .weights import folder_weights


def open_part(part: str, path: Path) -> Part:
    """A part that the user names.

    Raises:
        CheckpointError: it holds something else, or cannot be read.
        UsageError: there is nothing, or a folder without such a part.
    """
    option, title = OPTIONS[part], KINDS[part].title
    if not path.exists():
        raise UsageError(
            f"{option}: {path} is {describe(path).title}", f"give a file or a folder of {title}"
        )
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
    data, weights = read_json(place), folder_weights(part, folder, way_without(part))
    name = class_name(data)
    return Part(
        part,
        path,
        open_part,
        place,
        None if name is None else str(name),
        read_config(part, place, data),
        weights,
        [place, *weights.files],
    )


def open_parts(paths: Mapping[str, Path]) -> dict[str, Part]:
    """As :func:`open_part`, of several; what is wrong with them is told together.

    Raises:
        CheckpointError: see :func:`open_part`; a line for each part.
        UsageError: see :func:`open_part`.
    """
    findings, parts = Findings(), {}
    for part, path in paths.items():
        with findings.part():
            parts[part] = open_part(part, expand_user(path))
    findings.tell()
    return parts
