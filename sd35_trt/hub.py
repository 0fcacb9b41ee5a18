"""Finding the model that ``--model`` names."""

from __future__ import annotations

import re
from pathlib import Path

from .errors import CheckpointError, Sd35Error
from .mini import checkpoint_path

# What a build reads of a repository on the hub.
_PATTERNS = (
    "*.json",
    "*.txt",
    "*.model",
    "text_encoder*/*.safetensors",
    "transformer/*.safetensors",
    "vae/*.safetensors",
)

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


def resolve_model(model: str) -> Path:
    """The directory behind ``mini``, a path, or a hub id such as ``owner/name``.

    Raises:
        CheckpointError: not a directory here, and not to be had from the hub.
    """
    if model == "mini":
        return checkpoint_path()
    path = Path(model).expanduser()
    if path.exists() or not _HUB_ID.fullmatch(model):
        return path
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise Sd35Error(
            "fetching from the hub needs huggingface_hub", "pip install 'sd35-trt[build]'"
        ) from error
    try:
        return Path(
            snapshot_download(
                model, allow_patterns=list(_PATTERNS), ignore_patterns=["*.fp16*", "*.bf16*"]
            )
        )
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{model} is not a directory here and cannot be fetched from the hub: {reason}",
            "give a local directory, or accept the model's licence and run: hf auth login",
        ) from error
