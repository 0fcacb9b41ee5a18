"""A repository on Hugging Face's hub: the names of its files, and fetching them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sd35_trt.compat.requirement import requirement
from sd35_trt.components import COMPONENTS
from sd35_trt.errors import CheckpointError

# The tokenizers of all SD3.5 models are the same.
_TOKENIZERS = "stabilityai/stable-diffusion-3.5-medium"

#: What to do where a repository is not to be had.
LICENCE = "give a local directory, or accept the model's licence and run: hf auth login"


class Repository:
    """A repository of a model.

    Args:
        revision: a branch, tag or commit; None is the main branch.
    """

    def __init__(self, name: str, revision: str | None) -> None:
        self.name = name
        self.revision = revision

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"

    def names(self) -> list[str]:
        """Of all files; of those that were fetched before, where the hub cannot be asked.

        Raises:
            CheckpointError: no such repository or revision.
        """
        with requirement("fetching from the hub", "build"):
            from huggingface_hub import HfApi
            from huggingface_hub.errors import HfHubHTTPError
        try:
            return list(HfApi().list_repo_files(self.name, revision=self.revision))
        except HfHubHTTPError as error:
            raise self._refusal(error) from error
        # No network; the class is that of the HTTP client, which is another in every version.
        except Exception as error:  # noqa: BLE001
            try:
                root = Path(self._snapshot(local_files_only=True))
            except OSError:  # nor anything of it in the cache
                raise self._refusal(error) from error
            files = (path for path in root.rglob("*") if path.is_file())
            return [path.relative_to(root).as_posix() for path in files]

    def download(self, files: Iterable[str]) -> Path:
        """The folder of a snapshot, with these files or patterns in it.

        Raises:
            CheckpointError: they are not to be had.
        """
        try:
            return Path(self._snapshot(allow_patterns=list(files)))
        except Exception as error:
            raise self._refusal(error) from error

    def _snapshot(self, **options: Any) -> str:
        with requirement("fetching from the hub", "build"):
            from huggingface_hub import snapshot_download
        return str(snapshot_download(self.name, revision=self.revision, **options))

    def _refusal(self, error: Exception) -> CheckpointError:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return CheckpointError(
            f"{self} is not a directory here and cannot be fetched from the hub: {reason}", LICENCE
        )


def fetch_tokenizers(file: Path) -> Path:
    """A directory with SD3.5's three tokenizers, from the hub.

    Args:
        file: the single-file checkpoint that has none beside it.

    Raises:
        CheckpointError: they are not to be had from the hub.
    """
    patterns = [f"{row.tokenizer}/*" for row in COMPONENTS.values() if row.tokenizer]
    try:
        return Repository(_TOKENIZERS, None).download(patterns)
    except CheckpointError as error:
        raise CheckpointError(
            f"{file} has no tokenizers beside it, and {str(error).partition(' — ')[0]}",
            "give a folder with tokenizer, tokenizer_2 and tokenizer_3: --tokenizers DIR",
        ) from error
