"""The layers inside transformers' models are as we rely on."""

from __future__ import annotations

from transformers import T5Config, T5EncoderModel

from sd35_trt.compat.transformers import T5DenseGatedActDense, T5LayerNorm, bytes_to_unicode


def test_t5_is_made_of_these_layers() -> None:
    config = T5Config(
        d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=10,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    model = T5EncoderModel(config)
    (feed_forward,) = [m for m in model.modules() if isinstance(m, T5DenseGatedActDense)]
    assert {"wi_0", "wi_1", "wo", "act"} <= {name for name, _ in feed_forward.named_children()}
    norms = [m for m in model.modules() if isinstance(m, T5LayerNorm)]
    assert len(norms) == 3
    assert all(norm.variance_epsilon == config.layer_norm_epsilon for norm in norms)


def test_every_byte_has_a_character() -> None:
    table = bytes_to_unicode()
    assert sorted(table) == list(range(256))
    assert len(set(table.values())) == 256
