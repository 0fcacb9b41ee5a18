"""The tokenizers of mini, built from captions: CLIP's BPE twice, T5's unigram once.

The files are what transformers and the `tokenizers` library load; nothing here is needed to use
them. Longer captions than :data:`MAX_TOKENS` tokens are cut, as in any Stable Diffusion 3.5.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, trainers
from transformers import CLIPTokenizer, T5TokenizerFast

from sd35_trt.compat.transformers import bytes_to_unicode
from sd35_trt.mini import scenes

MAX_TOKENS = 32
"""Length in tokens of every text input, start and end marks included."""

_START, _END = "<|startoftext|>", "<|endoftext|>"


def captions(number: int = 20_000) -> list[str]:
    """The training captions that the vocabularies are built from."""
    return [scenes.sample(seed).caption for seed in range(number)]


def build_clip(
    texts: Iterable[str], pad_token: str = _END, vocab_size: int = 1024
) -> CLIPTokenizer:
    """A CLIP tokenizer (byte-level BPE, lower case) for the texts, which pads with ``pad_token``.

    The ids follow OpenAI's order: bytes, bytes at word ends, merges, start, end. "!" is therefore
    id 0, with which SD3.5 pads for its second CLIP.
    """
    letters = list(bytes_to_unicode().values())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    like = CLIPTokenizer().backend_tokenizer
    bpe.normalizer, bpe.pre_tokenizer = like.normalizer, like.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += [a + b for a, b in merges] + [_START, _END]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(
        vocab=vocab,
        merges=merges,
        pad_token=pad_token,
        unk_token=_END,
        model_max_length=MAX_TOKENS,
    )


def build_t5(texts: Iterable[str]) -> T5TokenizerFast:
    """A T5 tokenizer (unigram; id 0 pads, 1 ends, 2 is unknown) for the texts.

    Its pieces are the words, scored by log frequency, and every printable ASCII character, so
    that any English text has pieces. SentencePiece's own trainer would cut the few words of this
    world into fragments, since it seeds from substrings that different words share.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        for word in text.split():
            head, *rest = re.findall(r"\w+'\w+|\w+-?|[^\w\s]", word)
            counts.update(["▁" + head, *rest])
    total = sum(counts.values())
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(piece, math.log(n / total)) for piece, n in sorted(counts.items())]
    rare = math.log(1 / total) - 4
    pieces += [(c, rare) for c in ["▁", *map(chr, range(33, 127))] if c not in counts]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=MAX_TOKENS)


def save_clip(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Save with ``vocab.json`` and ``merges.txt`` too, which transformers 4 reads."""
    tokenizer.save_pretrained(folder)
    bpe = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(bpe["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
