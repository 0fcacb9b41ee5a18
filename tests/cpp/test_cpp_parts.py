"""Parts of libsd35 are those of the Python runtime: tokens, noise, plans, float16."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from cpp_build import ROOT, built, probe, run_program

from sd35_trt.backends import BACKENDS
from sd35_trt.errors import UsageError
from sd35_trt.formats.bundle import Bundle
from sd35_trt.residency import Footprint, plan_residency
from sd35_trt.runtime.noise import randn
from sd35_trt.runtime.text import PromptTokenizer
from sd35_trt.runtime.token_weights import weighted_parts


def test_units() -> None:
    output = run_program(built() / "tests" / "units", "--gtest_brief=1")
    assert re.search(r"PASSED  \] [1-9]\d* tests", output), output


def texts(count: int, seed: int) -> Iterator[str]:
    """Of words, of every plane of Unicode, of control characters, of special tokens."""
    generator = random.Random(seed)
    words = ("a", "lighthouse", "at", "dusk", "IT'S", "1234", "naïve", "…", "don't", "x" * 70)
    special = ("<|endoftext|>", "<|startoftext|>", "</s>", "<pad>", "<unk>", "<extra_id_0>", "▁")
    planes = (
        (0x20, 0x7F), (0x80, 0x2000), (0x2000, 0xD800), (0xE000, 0x10000), (0x10000, 0x20000),
        (0x20000, 0x110000), (0x1F300, 0x1FAFF), (0x300, 0x370),
    )  # fmt: skip
    controls = "\0\t\n\r\x0b\x1b\x7f\x85\u200b\u200d\u2028\ufeff\ufffd "

    def piece() -> str:
        kind = generator.random()
        if kind < 0.4:
            return generator.choice(words) + generator.choice((" ", "  ", ""))
        if kind < 0.5:
            return generator.choice(special)
        if kind < 0.6:
            return generator.choice(controls)
        return chr(generator.randrange(*generator.choice(planes)))

    for i in range(count):
        length = 2000 if i % 500 == 0 else generator.randrange(0, 40)
        yield "".join(piece() for _ in range(length))


def check_tokens(bundle: Path, count: int, seed: int) -> None:
    records = Bundle.open(bundle).manifest.tokenizers
    some = list(texts(count, seed))
    for name, length in (("clip_l", 32), ("clip_g", 32), ("t5", 77), ("t5", 512)):
        record = records[name]
        expected, _, counts = PromptTokenizer(bundle / record.path, record.pad_id)(some, length)
        asked = {"bundle": str(bundle), "tokenizer": name, "length": length, "texts": some}
        for text, (ids, number), row, whole in zip(
            some, probe("tokens", asked), expected.tolist(), counts, strict=True
        ):
            assert ids == row, (name, text)
            assert number == whole, (name, text)


def test_tokens_are_those_of_hugging_face(mini_bundle: Path) -> None:
    check_tokens(mini_bundle, 1000, 0)


@pytest.mark.nightly
def test_many_tokens_are_those_of_hugging_face(mini_bundle: Path) -> None:
    for part in range(10):
        check_tokens(mini_bundle, 10_000, 1 + part)


def marked_texts(count: int, seed: int) -> Iterator[str]:
    """Texts with marks of weights, whole and broken."""
    generator = random.Random(seed)
    pieces = (
        "(", "(", "(a", "((ring", "(a b", ")", ":", ":1.3", ":1.3)", ":-.5)", ": 2. )", ":+1e-1)",
        ":nan)", ":1e3)", ":0x1)", ":1_0)", ":1e)", ":.)", ":\u0661)", ":9" + "9" * 400 + ")",
        ":1e-400)", "\\(", "\\)", "\\", "\0", "<", ">", "a", "red ring", "ü", "\U0001f308", " ",
    )  # fmt: skip
    for _ in range(count):
        yield "".join(generator.choices(pieces, k=generator.randrange(12)))


def parts_of(text: str) -> Any:
    try:
        return [list(part) for part in weighted_parts(text)]
    except UsageError as error:
        return str(error)


def check_weights(count: int, seed: int) -> None:
    deep = ["(" * depth + "a" + ")" * depth for depth in (99, 100, 101, 5000)]
    some = [*marked_texts(count, seed), *deep, "(" * 10_000, "(a:" + "1" * 9000 + "x)"]
    for text, parts in zip(some, probe("weights", some), strict=True):
        assert parts == parts_of(text), text


def test_weights_are_read_as_in_python() -> None:
    check_weights(3000, 0)
    refusals = [text for text in map(parts_of, marked_texts(3000, 0)) if isinstance(text, str)]
    assert 50 < len(refusals) < 1500


@pytest.mark.nightly
def test_many_weights_are_read_as_in_python() -> None:
    check_weights(300_000, 1)


def test_the_crate_is_of_a_version_that_both_sides_have() -> None:
    manifest = (ROOT / "cpp/tokenizers/Cargo.toml").read_text("utf-8")
    pinned = re.findall(r'^tokenizers = .*version = "=([\d.]+)"', manifest, re.MULTILINE)
    assert len(pinned) == 1
    # They differ in a patch at most; the tests above compare the tokens.
    assert pinned[0].split(".")[:2] == tokenizers.__version__.split(".")[:2]


def test_noise_is_pytorchs() -> None:
    for seed in (*range(18), 2**32 - 1, 2**63):
        count = 4096 + seed % 7
        values = np.array(probe("noise", {"seed": seed, "count": count}), np.float32)
        np.testing.assert_array_equal(values, randn((count,), seed))
        generator = torch.Generator("cpu").manual_seed(seed)
        theirs = torch.randn(count, generator=generator).numpy()
        np.testing.assert_allclose(values, theirs, rtol=0, atol=1e-6)


def test_plans_are_pythons() -> None:
    generator = random.Random(5)

    def engine(number: int) -> Footprint:
        weights = generator.choice((0, 1, 10, generator.randrange(1 << 34)))
        streams = generator.random() < 0.4
        return Footprint(
            f"engine {number}", "", weights, generator.choice((0, generator.randrange(1 << 33))),
            generator.choice((1, 1, 28)),
            min(weights, generator.randrange(1 << 30)) if streams else None,
            generator.random() < 0.2,
            generator.random() < 0.3,
        )  # fmt: skip

    tables = []
    for _ in range(400):
        engines = [engine(n) for n in range(generator.randrange(1, 8))]
        total = sum(e.weight_bytes + e.activation_bytes for e in engines)
        budget = generator.choice((None, 0, generator.randrange(total + 1), total, 1 << 40))
        tables.append((engines, budget, generator.choice((0, 400_000_000))))
    asked = [
        {"engines": [vars(e) for e in engines], "budget": budget, "reserve": reserve}
        for engines, budget, reserve in tables
    ]
    for (engines, budget, reserve), own in zip(tables, probe("plan", asked), strict=True):
        plan = plan_residency(engines, budget, reserve)
        expected: dict[str, Any] = {
            "placements": [
                [p.kind, p.device_bytes, p.bus_bytes, p.peak_bytes]
                for p in plan.placements.values()
            ],
            "resident_bytes": plan.resident_bytes,
            "bus_bytes": plan.bus_bytes,
            "peak_bytes": plan.peak_bytes,
            "fits": plan.fits,
        }
        assert own == expected, (engines, budget, reserve)


def test_what_the_planner_knows_of_engines_is_pythons() -> None:
    rows = probe("backends", {})
    assert {"onnxruntime", "tensorrt"} <= rows.keys()
    for name, row in rows.items():
        backend = BACKENDS[name]
        assert row == {
            "title": backend.title,
            "context_bytes": backend.context_bytes,
            "streams": backend.streams == "asked",
            "keeps_denoiser_room": backend.keeps("denoiser"),
        }


def test_float16_is_numpys() -> None:
    generator = np.random.default_rng(1)
    bits = generator.integers(0, 1 << 32, 20_000, np.uint32)
    values = bits.view(np.float32)
    bits = bits[~np.isnan(values)]
    with np.errstate(over="ignore"):
        expected = bits.view(np.float32).astype(np.float16).view(np.uint16)
    assert probe("half", bits.tolist()) == expected.tolist()
