"""Where bundles and adapters are looked for: folders of ComfyUI, or a path that is typed."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from sd35_trt.errors import UsageError

BUNDLES = "sd35_bundles"
ADAPTERS = "sd35_adapters"

#: What is chosen where none of a folder's names is meant.
BY_PATH = "by path"

_MARKS = {BUNDLES: "*/bundle.json", ADAPTERS: "*.safetensors"}

for _kind in _MARKS:
    folder_paths.add_model_folder_path(_kind, str(Path(folder_paths.models_dir) / _kind))


def choices(kind: str) -> list[str]:
    """What a node offers.

    Args:
        kind: :data:`BUNDLES` or :data:`ADAPTERS`.
    """
    return [BY_PATH, *sorted(_found(kind))]


def chosen(kind: str, name: str, path: str) -> str:
    """The path of what is chosen.

    Args:
        name: of :func:`choices`.
        path: as typed; it comes first.

    Raises:
        UsageError: neither says anything, or what is offered is gone.
    """
    if path.strip():
        return str(Path(path.strip()).expanduser())
    if name != BY_PATH and (found := _found(kind).get(name)):
        return str(found)
    folders = ", ".join(folder_paths.get_folder_paths(kind))
    what = "nothing is chosen" if name == BY_PATH else f"there is no {name} any more"
    raise UsageError(what, f"choose one of those in {folders}, or give its path")


def version(path: str) -> tuple[int, int] | None:
    """What changes when a file does, or a bundle; None where there is none."""
    file = Path(path)
    try:
        status = (file / "bundle.json" if file.is_dir() else file).stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def _found(kind: str) -> dict[str, Path]:
    """Name → path; of one name in several folders, the first."""
    found: dict[str, Path] = {}
    for folder in map(Path, folder_paths.get_folder_paths(kind)):
        for mark in sorted(folder.glob(_MARKS[kind])):
            path = mark.parent if kind == BUNDLES else mark
            found.setdefault(path.name, path)
    return found
