"""LoRAs of mini beside FP8: their activations stay in the range calibrated without."""

from pathlib import Path

import pytest
import torch

from sd35_trt.mini import checkpoint_path, lora_paths
from sd35_trt.quality.evaluate import load

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.nightly
def test_trained_loras_cost_fp8_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import lora_scales

    plain = lora_scales.errors(load(checkpoint_path()))
    for path in lora_paths().values():
        pipe = load(checkpoint_path())
        pipe.load_lora_weights(path.parent, weight_name=path.name)
        own = lora_scales.errors(pipe)
        assert own["calibrated scales"] <= 1.25 * plain["calibrated scales"]
        assert own["cut off, not rounded"] <= 0.01


def test_a_change_of_inputs_leaves_the_transformer_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import lora_scales

    transformer = load(checkpoint_path()).transformer
    linears = lora_scales.quantized_linears(transformer)
    assert len(linears) == 58
    weights = [linear.weight.clone() for linear, _ in linears.values()]
    x = torch.linspace(-3, 3, 192)[None]
    linear, _ = linears["transformer_blocks.0.attn.to_q"]
    expected = linear(x)
    with lora_scales.changed(transformer, lora_scales.rounded, weights=True):
        assert 0 < (linear(x) - expected).norm() < 0.1 * expected.norm()
    with lora_scales.changed(transformer, lambda x, amax: 0 * x, weights=False):
        assert torch.equal(linear(x)[0], linear.bias)
    assert torch.equal(linear(x), expected)
    assert all(
        torch.equal(linear.weight, weight)
        for (linear, _), weight in zip(linears.values(), weights, strict=True)
    )
