"""What we use of transformers beside its models and tokenizers: the layers inside them."""

from __future__ import annotations

from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.t5.modeling_t5 import T5DenseGatedActDense, T5LayerNorm

__all__ = ["T5DenseGatedActDense", "T5LayerNorm", "bytes_to_unicode"]
