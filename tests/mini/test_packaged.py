"""What comes with mini is in the wheel, and is found where the wheel is installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from setuptools import Distribution

from sd35_trt.mini import calibration_path, checkpoint_path, controlnet_paths, lora_paths

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json
from sd35_trt import mini
paths = [mini.checkpoint_path(), mini.calibration_path(), mini.calibration_prompts_path()]
paths += [*mini.lora_paths().values(), *mini.controlnet_paths().values()]
print(json.dumps([str(path) for path in paths]))
"""


def files(path: Path) -> set[str]:
    """Relative to mini's folder, with their sizes."""
    every = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return {f"{p.as_posix().rpartition('/mini/')[2]} {p.stat().st_size}" for p in every}


@pytest.fixture
def installed(tmp_path, monkeypatch) -> Path:
    """What a wheel of the package unpacks to."""
    monkeypatch.chdir(ROOT)
    distribution = Distribution({"script_name": "setup.py"})
    distribution.parse_config_files(["pyproject.toml"])
    command = distribution.get_command_obj("build_py")
    command.build_lib = str(tmp_path / "site")
    command.ensure_finalized()
    command.run()
    return tmp_path / "site"


def test_a_wheel_has_all_of_mini(installed):
    alone = {**os.environ, "PYTHONPATH": str(installed)}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=alone, cwd=installed.parent, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    paths = [Path(path) for path in json.loads(run.stdout)]
    assert all(installed in path.parents for path in paths)
    own = [checkpoint_path(), calibration_path(), *lora_paths().values()]
    own += [*controlnet_paths().values()]
    assert set().union(*map(files, own)) <= set().union(*map(files, paths))
    assert len(paths) == len(own) + 1
    assert not (installed / "sd35_trt" / "mini" / "training").exists()


def test_what_shows_features_is_small():
    """Everyone installs it."""
    assert all(path.stat().st_size <= 0.5e6 for path in lora_paths().values())
    for folder in controlnet_paths().values():
        assert sum(path.stat().st_size for path in folder.rglob("*")) <= 5e6
