"""``tokenizers.json``: lengths and padding of the tokenizers that the exporter wrote beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct

from sd35_trt.errors import BundleError

from .reading import Count, Name, Positive, encode, read_document

DESCRIPTION_FILE = "tokenizers.json"

_AGAIN = "delete it: the next build writes it again"


class TokenizerFacts(Struct, frozen=True):
    """One tokenizer: tokens that the text encoder reads, and the id of its padding."""

    length: Positive
    pad_id: Count


def write_tokenizers(folder: Path, facts: Mapping[str, TokenizerFacts]) -> None:
    """Write ``tokenizers.json``.

    Args:
        facts: by component; ``<component>.json`` is the tokenizer.
    """
    (folder / DESCRIPTION_FILE).write_bytes(encode(dict(facts)))


def read_tokenizers(folder: Path) -> dict[str, TokenizerFacts]:
    """Read ``tokenizers.json``; by component.

    Raises:
        BundleError: missing, or not as it was written.
    """
    path = folder / DESCRIPTION_FILE
    return read_document(path, dict[Name, TokenizerFacts], 1 << 20, BundleError, _AGAIN)
