"""Text features of prompts: what the text encoders compute, put together as SD3 reads it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sd35_trt.formats.bundle import Bundle

from .adapters import AdapterFeeder, AdapterInputs, Mix
from .byte_cache import ByteCache
from .prompts import NO_TEXT, Prompt
from .runner import ComponentRunner
from .text import PromptTokenizer
from .token_weights import weigh

logger = logging.getLogger("sd35_trt")

# Of the CLIPs.
_PARTS = frozenset({"text_encoder", "text_encoder_2"})

#: Bytes of features that are kept, unless the user says otherwise.
PROMPT_CACHE_BYTES = 256_000_000


@dataclass(frozen=True)
class TextFeatures:
    """One text's features.

    Attributes:
        hidden: [tokens, width], in the dtype of the conditioner's ``prompt_embeds``.
        pooled: [pooled width], in the dtype of the conditioner's ``pooled``.
        notes: what the user should know, such as that the text was cut: what is said of it,
            without the text itself.
    """

    hidden: np.ndarray
    pooled: np.ndarray
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Of both arrays."""
        return self.hidden.nbytes + self.pooled.nbytes


class TextEncoder:
    """Texts to features, by a bundle's tokenizers and text encoders. The features of the latest
    texts are kept: a repeated prompt runs no engine.

    Args:
        runner: of the bundle's components.
        feeder: of their adapters.
        cache_bytes: of the features that are kept.

    Raises:
        BundleError: a file that is no tokenizer.
    """

    def __init__(
        self, bundle: Bundle, runner: ComponentRunner, feeder: AdapterFeeder, cache_bytes: int
    ) -> None:
        self._feeder = feeder
        self._manifest = bundle.manifest
        self._runner = runner
        self._cache: ByteCache[tuple[Prompt, Mix, int], TextFeatures] = ByteCache(cache_bytes)
        self._tokenizers = {
            name: PromptTokenizer(bundle.path(t.path), t.pad_id)
            for name, t in bundle.manifest.tokenizers.items()
        }

    def encode(
        self,
        texts: Sequence[Prompt],
        t5_tokens: int,
        mixes: Sequence[Mix] | None = None,
        inputs: AdapterInputs | None = None,
    ) -> list[TextFeatures]:
        """Features of each text; those not known are computed in one batch.

        Args:
            t5_tokens: length of T5's part.
            mixes: what each text has of adapters; None is nothing.
            inputs: of the run, for these.

        Raises:
            Sd35Error: an engine failed.
        """
        own = [_of_texts(mix) for mix in mixes or [()] * len(texts)]
        keys = list(zip(texts, own, strict=True))
        unique = list(dict.fromkeys(keys))
        found = {key: self._cache.get((*key, t5_tokens)) for key in unique}
        known = {key: features for key, features in found.items() if features is not None}
        new = [key for key in unique if key not in known]
        if new:
            texts, some = [text for text, _ in new], [mix for _, mix in new]
            known.update(zip(new, self._compute(texts, t5_tokens, some, inputs), strict=True))
            for key in new:
                self._cache.put((*key, t5_tokens), known[key])
        return [known[key] for key in keys]

    def clear(self) -> None:
        """Forget every text."""
        self._cache.clear()

    def _compute(
        self,
        texts: Sequence[Prompt],
        t5_tokens: int,
        mixes: Sequence[Mix],
        inputs: AdapterInputs | None,
    ) -> list[TextFeatures]:
        conditioner = self._runner.component("conditioner")
        pooled_port, embeds_port = conditioner.input("pooled"), conditioner.input("prompt_embeds")
        clip_tokens = self._manifest.tokenizers["clip_l"].length
        tokens = clip_tokens + t5_tokens
        # SD3: CLIP-L beside CLIP-G, padded with zeros to T5's width, followed by T5. Without T5
        # its part stays zero.
        hidden = np.zeros(embeds_port.resolve(samples=len(texts), tokens=tokens), embeds_port.dtype)
        pooled = []
        notes: list[list[str]] = [[] for _ in texts]
        channel = 0
        empties = self._empties(texts, t5_tokens, mixes, inputs)
        for name in ("clip_l", "clip_g", "t5"):
            if self._manifest.component(name) is None:
                continue
            length = t5_tokens if name == "t5" else clip_tokens
            own = [text.text_of(name) for text in texts]
            tokens_of = self._tokenizers[name](own, length, [text.weighted for text in texts])
            adapters = self._feeder.ports(
                name, inputs or AdapterInputs.of(self._manifest, []), mixes
            )
            feed = {"input_ids": tokens_of.ids, **adapters}
            out = self._runner.download(
                self._runner.run(name, feed, batch=len(texts), tokens=length)
            )
            place: Any  # in the features
            if name == "t5":
                place = np.s_[clip_tokens:]
            else:
                width = out["hidden"].shape[-1]
                place = np.s_[:clip_tokens, channel : channel + width]
                channel += width
                pooled.append(out["pooled"])
            for row, own_hidden, weights, empty in zip(
                hidden, out["hidden"], tokens_of.weights, empties, strict=True
            ):
                row[place] = own_hidden
                if empty is not None:
                    row[place] = weigh(row[place], empty.hidden[place], weights)
            if name != "clip_g":  # has CLIP-L's vocabulary
                for note, text, count in zip(notes, own, tokens_of.counts, strict=True):
                    if count > length:
                        note.append(_cut_note(text, name, count, length))
        vectors = np.concatenate(pooled, axis=-1).astype(pooled_port.dtype)
        # Copies: a view would keep the other texts' features in memory.
        return [
            TextFeatures(h.copy(), p.copy(), tuple(n))
            for h, p, n in zip(hidden, vectors, notes, strict=True)
        ]

    def _empties(
        self,
        texts: Sequence[Prompt],
        t5_tokens: int,
        mixes: Sequence[Mix],
        inputs: AdapterInputs | None,
    ) -> list[TextFeatures | None]:
        """Features of an empty prompt with the mix of each text that has weights."""
        own = [mix for text, mix in zip(texts, mixes, strict=True) if text.weighted]
        if not own:
            return [None] * len(texts)
        empties = iter(self.encode([NO_TEXT] * len(own), t5_tokens, own, inputs))
        return [next(empties) if text.weighted else None for text in texts]


def _of_texts(mix: Mix) -> Mix:
    """What of a mix changes the text encoders."""
    return tuple(use for use in mix if use.adapter.parts().keys() & _PARTS)


def _cut_note(text: str, encoder: str, count: int, length: int) -> str:
    note = f"has {count} {encoder} tokens, the model reads {length}; the rest is ignored"
    logger.debug("%r %s", text, note)
    return note
