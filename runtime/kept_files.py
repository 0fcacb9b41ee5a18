"""Files that make the next load quicker, in folders of the cache that are the user's own."""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from sd35_trt.errors import UsageError
from sd35_trt.store.cache import default_cache_dir
from sd35_trt.store.own_files import keep_latest, read_own, write_own

logger = logging.getLogger("sd35_trt")


@dataclass(frozen=True)
class KeptFiles:
    """Files of one kind.

    Attributes:
        folder: in the cache; one of :data:`sd35_trt.store.contents.FILES`.
        suffix: of their names.
        what: they hold, in the plural, for warnings.
        most_files, most_bytes: of them together; what was not used for longest goes.
        quiet: whether no warning is worth it where nothing can be kept.
    """

    folder: str
    suffix: str
    what: str
    most_files: int
    most_bytes: int
    quiet: bool = False

    def file(self, *about: str) -> Path | None:
        """Where something is kept; None, with a warning, where there is no folder.

        Args:
            about: all that decides about it.
        """
        try:
            folder = default_cache_dir() / self.folder
        except UsageError as error:
            say = logger.debug if self.quiet else logger.warning
            say("%s are not kept, and made again at every load: %s", self.what, error)
            return None
        digest = hashlib.sha256(" ".join(about).encode()).hexdigest()[:32]
        return folder / f"{digest}{self.suffix}"

    def can_write(self, path: Path | None) -> bool:
        """Whether keeping something is worth trying."""
        if path is None:
            return False
        folder = next(own for own in path.parents if own.exists())
        return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)

    def read(self, path: Path | None) -> bytes:
        """What is kept; empty where there is nothing, or where it may be another's."""
        return b"" if path is None else read_own(path, self.what)

    def write(self, path: Path | None, data: bytes) -> None:
        """Replace a file in one step; without it the next load is slower, no more."""
        if path is None:
            return
        write_own(path, data, self.what)
        keep_latest(path.parent, self.most_files, self.most_bytes)
