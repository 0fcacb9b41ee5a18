"""Prompts to token ids of the fixed lengths that the model was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers

from sd35_trt.errors import BundleError
from sd35_trt.formats.reading import read_file

# Bytes of a tokenizer; T5's has some MB.
_LARGEST = 64 << 20


class PromptTokenizer:
    """One of the model's tokenizers, cutting and padding to a fixed length.

    Args:
        path: a ``tokenizers`` JSON file.
        pad_id: id of the padding token.

    Raises:
        BundleError: not such a file.
    """

    def __init__(self, path: Path, pad_id: int) -> None:
        try:
            text = read_file(path, _LARGEST).decode("utf-8")
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:
            raise BundleError(
                f"{path} is no tokenizer: {error}", "build the bundle again"
            ) from error
        self._pad_id = pad_id
        self._tokenizer.no_padding()

    def __call__(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, list[int]]:
        """Token ids and how many tokens each text would have taken.

        Returns:
            int64 [len(texts), length] with the special tokens, and the uncut lengths.
        """
        self._tokenizer.enable_truncation(max_length=length)
        ids = np.full((len(texts), length), self._pad_id, np.int64)
        counts = []
        for row, encoding in zip(ids, self._tokenizer.encode_batch(list(texts)), strict=True):
            row[: len(encoding.ids)] = encoding.ids
            special = sum(encoding.special_tokens_mask)
            overflow = sum(len(rest.ids) - special for rest in encoding.overflowing)
            counts.append(len(encoding.ids) + overflow)
        return ids, counts
