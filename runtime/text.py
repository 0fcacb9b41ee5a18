"""Prompts to token ids of the fixed lengths that the model was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers

from sd35_trt.errors import BundleError
from sd35_trt.formats.reading import read_file

from .token_weights import weighted_parts

# Bytes of a tokenizer; T5's has some MB.
_LARGEST = 64 << 20


class Tokens(NamedTuple):
    """Of some texts.

    Attributes:
        ids: int64 [texts, length], with the special tokens.
        weights: float32 [texts, length].
        counts: how many tokens each text would have taken.
    """

    ids: np.ndarray
    weights: np.ndarray
    counts: list[int]


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

    def __call__(self, texts: Sequence[str], length: int, weighted: Sequence[bool] = ()) -> Tokens:
        """Token ids, cut and padded.

        Args:
            length: of each text's tokens, the special ones included.
            weighted: whether marks of weights are read in each text; none where they are not.
        """
        ids = np.full((len(texts), length), self._pad_id, np.int64)
        weights = np.ones((len(texts), length), np.float32)
        counts = [0] * len(texts)
        plain = [i for i in range(len(texts)) if not (weighted and weighted[i])]
        self._tokenizer.enable_truncation(max_length=length)
        encodings = self._tokenizer.encode_batch([texts[i] for i in plain])
        for i, encoding in zip(plain, encodings, strict=True):
            ids[i, : len(encoding.ids)] = encoding.ids
            special = sum(encoding.special_tokens_mask)
            overflow = sum(len(rest.ids) - special for rest in encoding.overflowing)
            counts[i] = len(encoding.ids) + overflow
        for i in sorted(set(range(len(texts))) - set(plain)):
            counts[i] = self._fill_weighted(texts[i], ids[i], weights[i])
        return Tokens(ids, weights, counts)

    def _fill_weighted(self, text: str, ids: np.ndarray, weights: np.ndarray) -> int:
        """Token ids and weights of a text with marks; returns how many there would be.

        Each part is cut into tokens by itself, as ComfyUI does it.
        """
        self._tokenizer.no_truncation()
        special = self._tokenizer.encode("").ids
        if not special:
            raise BundleError(
                "a tokenizer of the bundle ends no text, so that it has none with weights",
                "build the bundle again",
            )
        *before, after = special
        parts = weighted_parts(text)
        encodings = self._tokenizer.encode_batch([p for p, _ in parts], add_special_tokens=False)
        own = [
            (token, weight)
            for (_, weight), encoding in zip(parts, encodings, strict=True)
            for token in encoding.ids
        ]
        kept = own[: max(len(ids) - len(special), 0)]
        row = [*((token, 1.0) for token in before), *kept, (after, 1.0)][: len(ids)]
        ids[: len(row)] = [token for token, _ in row]
        weights[: len(row)] = [weight for _, weight in row]
        return len(own) + len(special)
