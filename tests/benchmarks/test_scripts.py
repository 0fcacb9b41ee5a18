"""The scripts of benchmarks/: run by path, each finds those beside it and says how it is used."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from sd35_trt.formats.calibration import Calibration
from sd35_trt.mini import checkpoint_path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CHILDREN = sorted((BENCHMARKS / "children").glob("*.py"))
MODULES = [path.stem for path in sorted(BENCHMARKS.glob("*.py"))]


@pytest.fixture
def by_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Imports are those of a script that is run by its path."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    others = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    yield
    for name in MODULES:
        sys.modules.pop(name, None)
    sys.modules.update(others)


@pytest.mark.usefixtures("by_path")
@pytest.mark.parametrize("name", MODULES)
def test_a_script_can_be_imported_and_has_help(name: str) -> None:
    module = importlib.import_module(name)
    command = getattr(module, "main", None)
    if not isinstance(command, click.Command):
        return  # a part of another script, or one without options: it could be imported
    result = CliRunner().invoke(command, ["--help"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("Usage:")


@pytest.mark.parametrize("path", CHILDREN, ids=lambda path: path.stem)
def test_what_a_child_imports_of_the_package_is_there(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("sd35_trt"):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pytest.mark.nightly
def test_a_made_up_calibration_is_read(tmp_path: Path) -> None:
    script = BENCHMARKS / "children" / "made_up_calibration.py"
    out = tmp_path / "calibration"
    command = [sys.executable, "-W", "ignore", str(script), str(checkpoint_path()), str(out)]
    subprocess.run(command, check=True, capture_output=True)
    assert set(Calibration.load(out).inputs.values()) == {8.0}


@pytest.mark.usefixtures("by_path")
def test_a_child_is_measured_by_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = importlib.import_module("child")
    monkeypatch.setattr(child, "_SCRIPTS", tmp_path)
    (tmp_path / "work.py").write_text(
        "import json, pathlib, sys, time\n"
        'print(json.dumps([time.time(), "load", ""]), flush=True)\n'
        'print(json.dumps([time.time(), "load", "cached"]), flush=True)\n'
        "while not pathlib.Path(sys.argv[1]).exists():\n"
        "    time.sleep(0.01)\n"
        'print(json.dumps([time.time(), "export", ""]), flush=True)\n'
    )
    looked, look = tmp_path / "looked", child.anonymous_bytes

    def watch(pid: int) -> int:
        """The child goes on once its memory was seen."""
        if (bytes_read := look(pid)) > 1 << 20:
            looked.touch()
        return bytes_read

    monkeypatch.setattr(child, "anonymous_bytes", watch)
    result = child.run_child("work.py", looked)
    assert list(result["stages"]) == ["load", "export"]
    assert result["stages"]["load"]["note"] == "cached"
    assert result["peak_bytes"] > 1 << 20
    (tmp_path / "broken.py").write_text("raise SystemExit('no disk')")
    with pytest.raises(click.ClickException, match=r"broken\.py failed with status 1: no disk"):
        child.run_child("broken.py")
