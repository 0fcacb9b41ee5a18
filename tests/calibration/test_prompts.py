"""Prompt files, and what the packaged set claims to cover."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sd35_trt.calibration.prompts import digest, packaged_prompts, read_prompts
from sd35_trt.errors import UsageError
from sd35_trt.mini import calibration_prompts_path
from sd35_trt.mini.scoring import heldout

PROMPTS = read_prompts(packaged_prompts())

_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"


def words(text: str) -> int:
    """Words, punctuation marks and ideographs: no tokenizer makes fewer tokens of them."""
    return len(re.findall(rf"[{_IDEOGRAPHS}]|[^\W{_IDEOGRAPHS}]+|[^\w\s]", text))


def covering(pattern: str) -> list[str]:
    return [p for p in PROMPTS if re.search(pattern, p, re.IGNORECASE)]


def test_128_different_prompts() -> None:
    assert len(PROMPTS) == len(set(PROMPTS)) == 128


def test_lengths() -> None:
    lengths = sorted(map(words, PROMPTS))
    assert lengths[0] == 3
    assert 180 <= lengths[-1] <= 200
    # SD3.5's CLIPs read 77 tokens: some prompts end within, some beyond.
    for low, high, least in ((3, 5, 8), (6, 15, 40), (16, 29, 8), (30, 77, 5), (78, 200, 3)):
        assert sum(low <= n <= high for n in lengths) >= least, (low, high)


@pytest.mark.parametrize(
    ("what", "pattern", "least"),
    [
        ("rendered text", r'"[^"]+"', 16),
        ("counting", r"\b(one|two|three|four|five|six|seven|eight|nine|ten|twelve|dozen)\b", 24),
        ("spatial relations", r"\b(left|right|above|below|under|behind|between|inside)\b", 24),
        ("negation", r"\b(no|not|without|nobody|none|neither|nor|nothing|but|except|never)\b", 16),
        ("painting", r"\b(oil painting|watercolour|gouache|fresco|woodblock|mosaic)\b", 6),
        ("photography", r"\b(photograph|film|lens|shot|daguerreotype|mm)\b", 6),
        ("graphics", r"\b(pixel art|render|blueprint|poster|collage|drawing|sketch)\b", 6),
    ],
)  # fmt: skip
def test_subjects(what: str, pattern: str, least: int) -> None:
    assert len(covering(pattern)) >= least, what


@pytest.mark.parametrize(
    "pattern",
    [
        r"\b(eine?|auf dem)\b", r"\b(une|du|d'une)\b", r"\b(una|ningún|gatos)\b", r"\bvicino\b",
        r"\b(um|uma)\b", r"\been\b", r"\boparty\b", "[а-я]", "[\u3040-\u30ff]",
        "^[\u4e00-\u9fff,]+$", "[\uac00-\ud7af]", "[\u0600-\u06ff]", "[\u0900-\u097f]",
        "[α-ω]",
    ],
)  # fmt: skip
def test_languages(pattern: str) -> None:
    assert covering(pattern)


def test_mini_has_its_own_which_its_evaluation_does_not_see() -> None:
    own = read_prompts(calibration_prompts_path())
    assert len(own) == len(set(own)) == 128
    assert not set(own) & {example.caption for example in heldout(500)}
    assert not set(own) & set(PROMPTS)


def test_reading(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffeine Mühle \r\n\r\n  zwei\n".encode())
    assert read_prompts(path) == ["eine Mühle", "zwei"]


@pytest.mark.parametrize(
    "inside", ["\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"], ids=ascii
)
def test_a_prompt_ends_with_its_line(inside: str, tmp_path: Path) -> None:
    """What else str.splitlines takes for an end is part of the prompt."""
    path = tmp_path / "p.txt"
    prompts = [f"a red{inside}star", "a cat", f"{inside}a dog{inside}", "a cow"]
    path.write_bytes(f"{prompts[0]}\n{prompts[1]}\r{prompts[2]}\r\n{prompts[3]}".encode())
    assert read_prompts(path) == [prompts[0], prompts[1], "a dog", prompts[3]]


@pytest.mark.parametrize(
    ("content", "word"),
    [(b"", "is empty"), (b" \n\n", "is empty"), (b"ab\xff", r"is not UTF-8 \(byte 2\)")],
)
def test_files_without_prompts(tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=f"p.txt {word}.* — give a UTF-8 text file"):
        read_prompts(path)
    with pytest.raises(UsageError, match=r"cannot read prompt file .*gone: No such file"):
        read_prompts(tmp_path / "gone")
    with pytest.raises(UsageError, match=r"cannot read prompt file .*: Is a directory"):
        read_prompts(tmp_path)


def test_digest_depends_on_prompts_and_order() -> None:
    assert digest(["a", "b"]) == digest(("a", "b"))
    assert len({digest(["a", "b"]), digest(["b", "a"]), digest(["ab"]), digest(["a"])}) == 4
