"""What bundles have besides text: libsd35 refuses in Python's words what does not fit them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cpp_build import library
from sd35_ctypes import Failure, Library, Pipe

from sd35_trt.errors import UsageError
from sd35_trt.runtime import Pipeline


@pytest.fixture(scope="module")
def lib() -> Library:
    return library()


@pytest.fixture(scope="module")
def pipe(lib: Library, mini_bundle: Path) -> Iterator[Pipe]:
    with Pipe(lib, mini_bundle, threads=1) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def python(mini_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(mini_bundle, threads=1) as pipeline:
        yield pipeline


def check_refusal(pipe: Pipe, python: Pipeline, **arguments: Any) -> str:
    """What both say of arguments."""
    arguments = {"prompt": "a star", **arguments}
    with pytest.raises(UsageError) as expected:
        python.request(**arguments)
    with pytest.raises(Failure) as refused:
        pipe.check(**arguments)
    assert refused.value.status == "usage"
    assert str(refused.value) == str(expected.value)
    return str(refused.value)


TEXTS: list[dict[str, Any]] = [
    {"prompt": ["a", "b"], "prompt_3": ["c", "d", "e"]}, {"prompt_2": "x" * 10_001},
    {"prompt_3": ["a", "b"], "negative_2": ["c", "d", "e"]}, {"negative_3": ["a"] * 5},
    {"prompt": "(a:101)", "weighting": True}, {"negative": "(a:nan)", "weighting": True},
    {"prompt_2": "a (b (c:-1e3))", "weighting": True}, {"negative_3": "(a:1e999)", "weighting": True},
    {"prompt_3": "(" * 101 + "a" + ")" * 101, "weighting": True},
]  # fmt: skip


@pytest.mark.parametrize("wrong", TEXTS, ids=lambda w: " ".join(map(str, w))[:40])
def test_texts_and_weights_that_are_refused(
    wrong: dict[str, Any], pipe: Pipe, python: Pipeline
) -> None:
    check_refusal(pipe, python, **wrong)


def test_texts_that_are_no_utf8_are_named(pipe: Pipe) -> None:
    for name in ("prompt_2", "prompt_3", "negative_2", "negative_3"):
        with pytest.raises(Failure, match=f"^{name} is no UTF-8"):
            pipe.check("a", **{name: b"\xff"})
