"""What each text encoder reads, and weights of a prompt's parts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from against_diffusers import SEED, draw_with_diffusers, load_diffusers
from conftest import psnr, relative_error
from diffusers import StableDiffusion3Pipeline

from sd35_trt.errors import UsageError
from sd35_trt.mini import checkpoint_path
from sd35_trt.runtime import Pipeline
from sd35_trt.runtime.prompts import Prompt
from sd35_trt.runtime.token_weights import weighted_parts

QUICK: dict[str, Any] = {"steps": 3, "size": (64, 64), "guidance": 3.0, "t5_tokens": 32}
TEXT = "a red star"


@pytest.fixture(scope="module")
def pipe(mini_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(mini_bundle) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def peer() -> StableDiffusion3Pipeline:
    return load_diffusers(checkpoint_path())


# One text each.


@pytest.mark.parametrize("texts", [{"prompt_2": "a blue square"}, {"prompt_3": "two circles"}, {
    "prompt_2": "green", "prompt_3": "a ring", "negative_2": "small", "negative_3": "blurred",
}])  # fmt: skip
def test_as_diffusers_draws(
    texts: dict[str, str], pipe: Pipeline, peer: StableDiffusion3Pipeline
) -> None:
    result = pipe.generate("large hearts", negative="dark", seed=SEED, **QUICK, **texts)
    named = {name.replace("negative", "negative_prompt"): text for name, text in texts.items()}
    latents, images = draw_with_diffusers(
        peer, 1, (64, 64), 32, prompt="large hearts", negative_prompt="dark",
        guidance_scale=3.0, num_inference_steps=3, **named,
    )  # fmt: skip
    assert relative_error(result.latents, latents) <= 1e-3
    assert psnr(result.images, images) >= 50
    plain = pipe.generate("large hearts", negative="dark", seed=SEED, **QUICK)
    assert relative_error(plain.latents, latents) > 0.01
    assert {name: result.parameters[name] for name in texts} == {n: [t] for n, t in texts.items()}


def test_lists_of_texts(pipe: Pipeline) -> None:
    made = pipe.request(["a", "b"], prompt_2="c", prompt_3=["d", "e"], negative_2=["f", "g"])
    assert made.prompts == (Prompt("a", "c", "d"), Prompt("b", "c", "e"))
    assert made.negatives == (Prompt("", "f", ""), Prompt("", "g", ""))
    assert pipe.request("a", prompt_2="").prompts == (Prompt("a", "", "a"),)
    with pytest.raises(UsageError, match=r"prompt_3 has 3 texts, another of .* has 2"):
        pipe.request(["a", "b"], prompt_3=["d", "e", "f"])
    with pytest.raises(UsageError, match="prompt_2 must be text, or a list of texts"):
        pipe.request("a", prompt_2=7)
    with pytest.raises(UsageError, match="prompt_3 has 10,001 characters"):
        pipe.request("a", prompt_3="a" * 10_001)


def test_notes_name_what_was_cut(pipe: Pipeline) -> None:
    long = "red " * 200
    notes = pipe.generate("a", prompt_3=long, **QUICK).notes
    assert len(notes) == 1
    assert "t5 tokens" in notes[0]
    assert "clip_l tokens" in pipe.generate(long, prompt_3="a", **QUICK).notes[0]


# Weights.


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("plain, with: a colon", [("plain, with: a colon", 1.0)]),
        ("a (b) c", [("a ", 1.0), ("b", 1.1), (" c", 1.0)]),
        ("(b:1.3)", [("b", 1.3)]),
        ("((b))", [("b", 1.1 * 1.1)]),
        ("((b:2))", [("b", 2.0)]),
        ("(a (b:2) c:0.5)d", [("a ", 0.5), ("b", 2.0), (" c", 0.5), ("d", 1.0)]),
        ("(a (b):0.5)", [("a ", 0.5), ("b", 0.55)]),
        ("(a:b:-1.5)", [("a:b", -1.5)]),
        ("(at 12:30)", [("at 12", 30.0)]),
        ("(a:)(b:x)(:2)", [("a:", 1.1), ("b:x", 1.1), (":2", 1.1)]),
        (r"a \(b:2\) (c\):2)", [("a (b:2) ", 1.0), ("c)", 2.0)]),
        ("(open:2", [("(open:2", 1.0)]),
        ("a) (b:2) c", [("a) (b:2) c", 1.0)]),
        ("(a:1_0)(b:\u0661)(c: +.5e1 )", [("a:1_0", 1.1), ("b:\u0661", 1.1), ("c", 5.0)]),
        ("\0<b\0>", [("\0<b\0>", 1.0)]),
        ("()", []),
        ("", []),
    ],
)
def test_parts(text: str, parts: list[tuple[str, float]]) -> None:
    found = weighted_parts(text)
    assert [part for part, _ in found] == [part for part, _ in parts]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in parts])


def encode(peer: Any, text: str, weighted: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [1, tokens, width] and pooled of a text, put together by hand."""
    clip = peer.tokenizer_max_length
    hidden = torch.zeros(1, clip + 32, peer.text_encoder_3.config.d_model)
    pooled, channel = [], 0
    for number, length in ((1, clip), (2, clip), (3, 32)):
        suffix = "" if number == 1 else f"_{number}"
        tokenizer = getattr(peer, f"tokenizer{suffix}")
        encoder = getattr(peer, f"text_encoder{suffix}")
        *start, end = tokenizer("").input_ids
        features = []
        for parts in (weighted_parts(text) if weighted else [(text, 1.0)], [("", 1.0)]):
            ids = [(i, w) for part, w in parts
                   for i in tokenizer(part, add_special_tokens=False).input_ids]  # fmt: skip
            row = [*((i, 1.0) for i in start), *ids[: length - len(start) - 1], (end, 1.0)]
            row += [(tokenizer.pad_token_id, 1.0)] * (length - len(row))
            with torch.no_grad():
                out = encoder(torch.tensor([[i for i, _ in row]]), output_hidden_states=True)
            features.append((out, torch.tensor([w for _, w in row])))
        (out, weights), (empty, _) = features
        z, z_empty = ((o[0] if number == 3 else o.hidden_states[-2]) for o in (out, empty))
        z = (z - z_empty) * weights[None, :, None] + z_empty
        if number == 3:
            hidden[:, clip:] = z
        else:
            hidden[:, :clip, channel : channel + z.shape[-1]] = z
            channel += z.shape[-1]
            pooled.append(out[0])
    return hidden, torch.cat(pooled, dim=-1)


def test_weights_as_comfyui_computes_them(pipe: Pipeline, peer: StableDiffusion3Pipeline) -> None:
    text = "a (large:1.4) red star to the left of (two ((blue)) circles:0.6)"
    hidden, pooled = encode(peer, text, True)
    negative, negative_pooled = encode(peer, "(dark:1.5)", True)
    latents = peer(
        prompt_embeds=hidden, pooled_prompt_embeds=pooled, negative_prompt_embeds=negative,
        negative_pooled_prompt_embeds=negative_pooled, generator=torch.manual_seed(SEED),
        width=64, height=64, guidance_scale=3.0, num_inference_steps=3, output_type="latent",
    ).images.numpy()  # fmt: skip
    drawn = [
        pipe.generate(text, negative="(dark:1.5)", seed=SEED, weighting=own, **QUICK).latents
        for own in (True, False)
    ]
    assert relative_error(drawn[0], latents) <= 1e-3
    assert relative_error(drawn[1], latents) > 0.05


def test_weights_of_one_change_nothing(pipe: Pipeline) -> None:
    plain = pipe.generate(TEXT, **QUICK).latents
    assert np.array_equal(pipe.generate(TEXT, weighting=True, **QUICK).latents, plain)
    marked = pipe.generate("(a red star:1.0)", weighting=True, **QUICK)
    assert np.array_equal(marked.latents, plain)
    assert marked.parameters["weighting"] is True


def test_joined_with_plain_ones(pipe: Pipeline) -> None:
    texts = ["(a red:1.4) star", "a (blue) square", "(a red:1.4) star"]
    single = [pipe.generate(text, seed=i, weighting=True, **QUICK) for i, text in enumerate(texts)]
    together = pipe.generate(texts, seed=[0, 1, 2], weighting=True, **QUICK)
    for own, latents in zip(single, together.latents, strict=True):
        assert relative_error(own.latents[0], latents) <= 1e-5


def test_a_long_weighted_text_is_cut(pipe: Pipeline) -> None:
    result = pipe.generate("(red:1.2) " * 100, weighting=True, **QUICK)
    assert "the rest is ignored" in result.notes[0]
    assert np.isfinite(result.latents).all()


def test_refused_weights(pipe: Pipeline) -> None:
    for text, words in (
        ("(a:1e9)", "weight 1e"), ("(a:nan)", "weight nan"), ("(a:-inf)", "weight -inf"),
        ("(" * 200 + "a" + ")" * 200, "nests parentheses"),
    ):  # fmt: skip
        for argument in ("negative", "prompt_2", "negative_3"):
            with pytest.raises(UsageError, match=words):
                pipe.request("a", **{argument: text}, weighting=True)
        pipe.request(text)
    with pytest.raises(UsageError, match="weighting must be true or false"):
        pipe.request("a", weighting="yes")


def test_command_line(run, mini_bundle: Path) -> None:  # type: ignore[no-untyped-def]
    base = ["generate", mini_bundle, "a (red:1.2) star", "--steps", 1, "--json"]
    status, out, _ = run(*base, "--weighting", "--prompt-2", "b", "--prompt-3", "c")
    assert status == 0
    for words in ('"weighting": true', '"prompt_2"', '"prompt_3"'):
        assert words in out
    status, _, error = run("generate", mini_bundle, "(a:1e9)", "--weighting")
    assert status == 2
    assert "use -100 to 100" in error
