"""The tree of errors, as its module draws it."""

from __future__ import annotations

import inspect
import re

from sd35_trt import errors


def test_the_tree_that_is_drawn_is_the_one_there_is() -> None:
    classes = {
        name: kind for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, Exception)
    }  # fmt: skip
    assert errors.__doc__ is not None
    (root,) = re.findall(r"^\* (\w+)$", errors.__doc__, re.MULTILINE)
    leaves = re.findall(r"^  · (\w+)(?: \(also (\w+)\))?$", errors.__doc__, re.MULTILINE)
    assert {root, *(name for name, _ in leaves)} == classes.keys()
    for name, other in leaves:
        bases = [base.__name__ for base in classes[name].__bases__]
        assert bases == [root, *([other] if other else [])]
