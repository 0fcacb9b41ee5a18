"""Which changes of code give a stage another key."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sd35_trt
from sd35_trt.store import code
from sd35_trt.store.stages import Stage

ROOT = Path(__file__).parents[2]

FILES = {
    "__init__.py": "",
    "entry.py": (
        "from typing import TYPE_CHECKING\n"
        "import json\n"
        "from . import plain\n"
        "if TYPE_CHECKING:\n"
        "    from .hints import Hint\n"
        "def run():\n"
        "    from house.room.inside import value\n"
        "    return value\n"
    ),
    "plain.py": "import house.deep\n",
    "deep.py": "x = 1\n",
    "hints.py": "from .other import y\nclass Hint: ...\n",
    "other.py": "y = 2\n",
    "room/__init__.py": "",
    "room/inside.py": "from ..deep import x as value\nfrom .beside import z\n",
    "room/beside.py": "z = 3\n",
}


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small package in place of ours."""
    root = tmp_path / "house"
    for name, text in FILES.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(code, "_PACKAGE", "house")
    yield root
    code.code_digest.cache_clear()
    code._spec.cache_clear()


def digest(*names: str) -> str:
    """Worked out anew, as in another process."""
    code.code_digest.cache_clear()
    code._spec.cache_clear()
    importlib.invalidate_caches()
    return code.code_digest(*names)


def touch(path: Path) -> None:
    path.write_text(path.read_text() + "# another line\n")


@pytest.mark.parametrize(
    "name",
    ["entry.py", "plain.py", "deep.py", "room/inside.py", "room/beside.py", "room/__init__.py"],
)
def test_all_that_is_imported_counts(name: str, house: Path) -> None:
    """Directly or not, by any way to write it, inside functions too; and packages on the way."""
    before = digest("house.entry")
    assert digest("house.entry") == before
    touch(house / name)
    assert digest("house.entry") != before


@pytest.mark.parametrize("name", ["hints.py", "other.py"])
def test_what_type_checkers_alone_read_does_not_count(name: str, house: Path) -> None:
    before = digest("house.entry")
    touch(house / name)
    assert digest("house.entry") == before


def test_what_keeps_results_does_not_count(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "_STORE", "house.room")
    before = digest("house.entry")
    touch(house / "room" / "inside.py")
    assert digest("house.entry") == before
    touch(house / "deep.py")
    assert digest("house.entry") != before


def test_a_module_that_appears_counts(house: Path) -> None:
    (house / "plain.py").write_text("try:\n    import house.late\nexcept ImportError: ...\n")
    before = digest("house.entry")
    (house / "late.py").write_text("")
    assert digest("house.entry") != before


def test_more_modules_are_more_code(house: Path) -> None:
    assert digest("house.entry") != digest("house.entry", "house.other")
    assert digest("house.other", "house.entry") == digest("house.entry", "house.other")


def test_nothing_of_the_modules_is_executed(house: Path) -> None:
    for path in house.rglob("*.py"):
        path.write_text(f"{path.read_text()}raise RuntimeError\n")
    assert digest("house.entry")
    assert "house" not in sys.modules


@pytest.mark.parametrize("name", ["house.nowhere", "house.nowhere.at.all", "house.deep.part"])
def test_an_unknown_module_is_an_error(name: str, house: Path) -> None:
    with pytest.raises(ModuleNotFoundError, match=name):
        digest("house.entry", name)


def sources() -> Iterator[Path]:
    """All files of the package."""
    for folder in {Path(entry) for entry in sd35_trt.__path__} | {
        ROOT / name for name in ("checkpoints", "programs", "calibration", "export", "engines",
                                 "runtime", "quality", "mini")
    }:  # fmt: skip
        yield from folder.rglob("*.py")


def test_every_stage_names_its_code() -> None:
    """Each names some module, and every module that one names is there."""
    position = list(Stage.__dataclass_fields__).index("code")
    count = 0
    for path in sources():
        tree = ast.parse(path.read_text("utf-8"))
        if not any(
            isinstance(node, ast.ImportFrom) and str(node.module).endswith("store.stages")
            for node in ast.walk(tree)
        ):
            continue
        for call in ast.walk(tree):
            if not isinstance(call, ast.Call) or ast.unparse(call.func).split(".")[-1] != "Stage":
                continue
            count += 1
            argument = {k.arg: k.value for k in call.keywords}.get("code")
            names = _modules(tree, call.args[position] if argument is None else argument)
            assert names, f"{path}:{call.lineno} names no code"
            # A module's own name is right by itself.
            assert len(code.code_digest(*names - {"__name__"})) == 64
    assert count >= 5


def _modules(tree: ast.Module, argument: ast.expr) -> set[str]:
    """The modules that an expression names, or what is assigned to the name that it is."""
    expressions = [argument]
    if isinstance(argument, ast.Name):
        expressions = [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == argument.id
        ]
    words = {ast.unparse(n).strip("'") for e in expressions for n in ast.walk(e)}
    return {word for word in words if word == "__name__" or word.startswith("sd35_trt.")}
