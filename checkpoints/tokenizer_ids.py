"""The ids that a tokenizer's files give out, read without transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd35_trt.compat.requirement import requirement
from sd35_trt.errors import CheckpointError

from .diffusers import read_json

# Tokens with a part of their own, which transformers adds where the vocabulary lacks them.
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_SPECIAL_LISTS = ("additional_special_tokens", "extra_special_tokens")

# T5's <extra_id_0> and so on, which SentencePiece's file does not have.
_EXTRA_IDS = 100

#: From here on, transformers means that there is no limit.
_NO_LENGTH = 10**9


@dataclass(frozen=True)
class TokenizerIds:
    """What a tokenizer gives out.

    Attributes:
        ids: token → id, of the vocabulary, of added and of special tokens.
        length: ``model_max_length``; None where there is no limit.
        end: id of the end token; None where it has none.
    """

    ids: Mapping[str, int]
    length: int | None
    end: int | None

    @property
    def last(self) -> tuple[str, int]:
        """The token with the largest id."""
        return max(self.ids.items(), key=lambda item: item[1])


def read_tokenizer_ids(folder: Path) -> TokenizerIds:
    """Read a tokenizer's files.

    Args:
        folder: with ``tokenizer.json``, or ``vocab.json``, or ``spiece.model``.

    Raises:
        CheckpointError: none of them is there, or one cannot be read.
    """
    config = _optional(folder / "tokenizer_config.json")
    try:
        ids = _vocabulary(folder, config)
        ids |= _optional(folder / "added_tokens.json")
        for number, token in (config.get("added_tokens_decoder") or {}).items():
            ids[_content(token)] = int(number)
        specials = {**config, **_optional(folder / "special_tokens_map.json")}
        tokens = [specials[key] for key in _SPECIAL if specials.get(key)]
        for key in _SPECIAL_LISTS:
            named = specials.get(key) or []
            tokens += named.values() if isinstance(named, dict) else named
        for token in map(_content, tokens):
            ids.setdefault(token, max(ids.values(), default=-1) + 1)
        if not all(isinstance(number, int) for number in ids.values()) or not ids:
            raise ValueError("no vocabulary")
        end = specials.get("eos_token")
        length = config.get("model_max_length")
        return TokenizerIds(
            ids,
            int(length) if length is not None and length < _NO_LENGTH else None,
            ids[_content(end)] if end else None,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder} holds no usable tokenizer: {error}", "download the checkpoint again"
        ) from error


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _content(token: Any) -> str:
    """A token's text; files have it as such, or as an object."""
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _vocabulary(folder: Path, config: Mapping[str, Any]) -> dict[str, int]:
    """The vocabulary, and the tokens that are added to it in the same file."""
    whole, table, pieces = (
        folder / name for name in ("tokenizer.json", "vocab.json", "spiece.model")
    )
    if whole.is_file():
        data = read_json(whole)
        vocabulary = data["model"]["vocab"]
        if isinstance(vocabulary, list):  # of Unigram: pairs of token and score
            vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
        added = {token["content"]: token["id"] for token in data.get("added_tokens") or ()}
        return {**vocabulary, **added}
    if table.is_file():
        return read_json(table)
    if not pieces.is_file():
        raise ValueError(f"no {whole.name}, {table.name} or {pieces.name}")
    with requirement("reading a tokenizer", "build"):
        from sentencepiece import SentencePieceProcessor
    try:
        model = SentencePieceProcessor(model_file=str(pieces))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{pieces.name} cannot be read ({error})") from error
    count = model.get_piece_size()
    vocabulary = {model.id_to_piece(number): number for number in range(count)}
    extra = config.get("extra_ids", _EXTRA_IDS)
    return vocabulary | {f"<extra_id_{i}>": count + extra - 1 - i for i in range(extra)}
