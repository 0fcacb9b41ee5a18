"""Policies as data."""

from __future__ import annotations

from pathlib import Path

import pytest

from sd35_trt.errors import UsageError
from sd35_trt.policies import Policy, Rule, builtin_policies, load_policy


def precision(policy: Policy, component: str, layer: str, linear: bool = True) -> str:
    return policy.rule(component, layer, linear).precision


def test_the_last_matching_rule_wins() -> None:
    policy = load_policy("fp8")
    assert precision(policy, "denoiser", "transformer_blocks.0.attn.to_q") == "fp8"
    assert precision(policy, "denoiser", "transformer_blocks.0.attn.to_out.0") == "half"
    assert precision(policy, "conditioner", "transformer_blocks.0.norm1.linear") == "half"


def test_rules_that_quantize_apply_to_linear_layers_alone() -> None:
    policy = load_policy("int8-weight")
    assert precision(policy, "denoiser", "transformer_blocks.0.attn.to_q") == "int8-weight"
    assert precision(policy, "denoiser", "transformer_blocks.0.attn.norm_q", linear=False) == "half"
    assert precision(policy, "denoiser", "proj_out") == "half"


def test_rules_for_the_transformer_are_for_controlnets_too() -> None:
    policy = load_policy("fp8")
    net = "control_canny"
    assert precision(policy, net, "transformer_blocks.0.attn.to_q") == "fp8"
    assert precision(policy, net, "transformer_blocks.0.attn.to_out.0") == "half"
    assert precision(policy, net, "controlnet_blocks.0") == "half"
    assert precision(policy, f"{net}_conditioner", "transformer_blocks.0.norm1.linear") == "half"
    own = Policy("p", "", (*policy.rules, Rule("control_canny", "*", "fp32", "")))
    assert precision(own, net, "transformer_blocks.0.attn.to_q") == "fp32"
    assert precision(own, "control_depth", "transformer_blocks.0.attn.to_q") == "fp8"
    assert own.digest(["control_canny"]) != policy.digest(["control_canny"])
    assert own.digest(["denoiser"]) == policy.digest(["denoiser"])


@pytest.mark.parametrize("name", builtin_policies())
def test_every_rule_says_why(name: str) -> None:
    policy = load_policy(name)
    assert policy.name == name
    assert all(len(rule.reason) > 10 for rule in policy.rules)


def test_a_glob_that_matches_nothing() -> None:
    policy = Policy("p", "", (Rule("*", "*", "half", ""), Rule("t5", "*.nothing", "fp32", "")))
    policy.check("clip_l", {"a": True})
    with pytest.raises(UsageError, match=r"'\*\.nothing' matches nothing in t5"):
        policy.check("t5", {"encoder.wo": True})


def test_a_layer_without_a_rule() -> None:
    policy = Policy("p", "", (Rule("t5", "*", "half", ""),))
    with pytest.raises(UsageError, match="no rule for clip_l/x"):
        policy.rule("clip_l", "x", linear=True)


def test_attention_is_quantized_by_a_rule_that_names_it() -> None:
    fp8 = load_policy("fp8")
    assert fp8.attention_rule("denoiser", "transformer_blocks.0.attn") is None
    glob = "transformer_blocks.*.attn"
    policy = Policy("p", "", (*fp8.rules, Rule("denoiser", glob, "fp8", "")))
    assert policy.attention_rule("denoiser", "transformer_blocks.0.attn") == policy.rules[-1]
    assert policy.attention_rule("denoiser", "transformer_blocks.0.attn2") is None
    assert precision(policy, "denoiser", "transformer_blocks.0.attn.to_out.0") == "half"
    layers = {"transformer_blocks.0.attn.to_q": True, "transformer_blocks.0.attn.to_out.0": True,
              "transformer_blocks.0.attn.to_add_out": True}  # fmt: skip
    policy.check("denoiser", layers, ["transformer_blocks.0.attn"])
    with pytest.raises(UsageError, match="matches nothing in denoiser"):
        policy.check("denoiser", layers, ["transformer_blocks.0.attn2"])


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    text = Path(load_policy.__code__.co_filename).parent.joinpath("half.toml").read_text()
    path.write_text(text)
    assert load_policy(str(path)) == load_policy("half")
    cases = {
        "name = ": "mine.toml",
        'name = "x"\n': "a policy has a name and",
        text.replace('precision = "half"', 'precision = "fp7"'): "unknown precision 'fp7'",
        text.replace("reason =", "because ="): "mine.toml",
    }
    for content, words in cases.items():
        path.write_text(content)
        with pytest.raises(UsageError, match=words) as caught:
            load_policy(str(path))
        assert "\n" not in str(caught.value)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"mine\.toml"):
        load_policy(str(path))


def test_the_digest_is_of_the_rules_alone() -> None:
    fp8 = load_policy("fp8")
    renamed = Policy(
        "other", "x", tuple(Rule(r.component, r.match, r.precision, "") for r in fp8.rules)
    )
    assert renamed.digest() == fp8.digest()
    fewer = Policy("fp8", "", fp8.rules[:1])
    assert fewer.digest() != fp8.digest()
    assert fewer.digest(["denoiser"]) != fp8.digest(["denoiser"])
    assert fewer.digest(["clip_l"]) == fp8.digest(["clip_l"])
