"""What is built where the user leaves it open, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from sd35_trt.checkpoints.look import Model, look
from sd35_trt.checkpoints.model_options import ModelOptions
from sd35_trt.dialects import DIALECTS
from sd35_trt.dimensions import Defaults, Ranges
from sd35_trt.errors import UsageError
from sd35_trt.features import PLAIN
from sd35_trt.planning.decide import (
    check_dialect,
    decide,
    decide_features,
    decide_guidance,
    decide_policy,
)
from sd35_trt.targets import find_target
from sd35_trt.variants import VARIANTS


@pytest.fixture(scope="module")
def mini() -> Model[Any]:
    return look(ModelOptions())


def choose(model: Model[Any], **wishes: Any) -> Any:
    target = find_target("cpu")
    return decide(model, target, decide_policy(target, None), **wishes)


def test_what_is_left_open(mini: Model[Any]) -> None:
    decision = choose(mini)
    assert decision.policy.name == "fp32"
    assert decision.guided
    assert decision.ranges(32) == Ranges((1, 4), (64, 192), 64, t5_tokens=(32, 512))
    assert decision.ranges(256).t5_tokens == (77, 512)
    assert decision.defaults(32) == Defaults(28, 3.0, (128, 128), "euler", 32)


def test_what_a_library_computes_wrongly() -> None:
    from sd35_trt.policies import load_policy

    old, new = DIALECTS["opset21"], DIALECTS["opset23"]
    with pytest.raises(UsageError, match=r"int8-weight: TensorRT 10.6 computes it wrongly"):
        check_dialect(load_policy("int8-weight"), old, "TensorRT 10.6")
    check_dialect(load_policy("int8-weight"), new, "TensorRT 11.2")
    check_dialect(load_policy("fp8"), old, "TensorRT 10.6")


def test_wishes(mini: Model[Any]) -> None:
    decision = choose(mini, guidance=False, batch=(2, 2), size=(160, 192), size_step=32)
    assert decision.defaults(32).guidance == 1.0
    # The native size is not among those asked for: the nearest is.
    assert decision.defaults(32).size == (160, 160)
    assert decision.ranges(32) == Ranges((2, 2), (160, 192), 32, t5_tokens=(32, 512))


def test_ranks_of_adapters(mini: Model[Any]) -> None:
    ranks = {most: decide_features(adapters=most).adapter_ranks for most in (1, 16, 40, 64)}
    assert ranks == {1: (1,), 16: (16,), 40: (16, 32, 40), 64: (16, 32, 64)}
    assert choose(mini).features == decide_features() == PLAIN
    for rank in (0, 513):
        with pytest.raises(UsageError, match=f"--adapters {rank} is not within 1:512"):
            decide_features(adapters=rank)


def test_skip_layer_guidance_needs_guidance(mini: Model[Any]) -> None:
    with pytest.raises(UsageError, match="steers guidance"):
        choose(mini, guidance=False, features=decide_features(skip_layer_guidance=True))


def test_guidance_is_the_variants() -> None:
    guided = {variant.name: decide_guidance(variant, None) for variant in VARIANTS}
    assert guided == {"large": True, "large-turbo": False, "medium": True, "mini": True}
    assert decide_guidance(VARIANTS[1], True)


@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        ({"batch": (4, 1)}, "--batch 4:1 is not within 1:63"),
        ({"batch": (1, 64)}, "--batch 1:64 is not within 1:63"),
        ({"size": (64, 100)}, "--size 64:100 is not within 64:384 in steps of 64"),
        ({"size": (128, 64)}, "--size 128:64 is not within"),
        ({"size_step": 24}, "--size-step must be a multiple of 16, not 24"),
        ({"size_step": 0}, "--size-step must be a multiple of 16, not 0"),
    ],
)
def test_refused(mini: Model[Any], wishes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        choose(mini, **wishes)
