"""A library that is missing, or does not load, is named."""

from __future__ import annotations

import importlib

import pytest

from sd35_trt.compat.requirement import requirement
from sd35_trt.errors import Sd35Error


def test_a_missing_library() -> None:
    with (
        pytest.raises(Sd35Error) as caught,
        requirement("drawing", "build"),
    ):
        importlib.import_module("no_such_library.part")
    assert str(caught.value) == "drawing needs no_such_library — pip install 'sd35-trt[build]'"


def test_a_library_that_does_not_load() -> None:
    with (
        pytest.raises(Sd35Error, match=r"drawing: torch does not load \(libcuda\.so\.1: no such"),
        requirement("drawing", "build"),
    ):
        raise ImportError("libcuda.so.1: no such file", name="torch")


def test_a_mistake_of_ours_is_no_missing_library() -> None:
    with pytest.raises(ModuleNotFoundError), requirement("drawing", "build"):
        importlib.import_module("sd35_trt.no_such_module")
