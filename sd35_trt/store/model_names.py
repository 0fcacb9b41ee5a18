"""What a model is called by its path: by its files, folders and links, and in the hub's cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sd35_trt.variants import telling_words

# A repository's folder in the cache: models--OWNER--NAME.
_CACHED = "models--"


def model_name(path: Path) -> str:
    """What a bundle of the model is called: the name of its file, directory or repository."""
    if path.is_file():
        return path.stem
    root = path.resolve()
    return (_repository(root) if root.parent.name == "snapshots" else "") or root.name


def hub_origin(path: Path) -> str | None:
    """Of a model in the hub's cache: ``owner/name@revision``; None for any other."""
    for folder in (path.absolute(), *path.absolute().parents):
        owner_and_name = folder.parent.parent.name
        if folder.parent.name == "snapshots" and owner_and_name.startswith(_CACHED):
            repository = owner_and_name.removeprefix(_CACHED).replace("--", "/", 1)
            return f"{repository}@{folder.name}"
    return None


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
        if folder.name in ("snapshots", "blobs") and folder.parent.name.startswith(_CACHED):
            return folder.parent.name.rpartition("--")[2]
    return ""
