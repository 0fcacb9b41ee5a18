"""The table of engine kinds: every row leads somewhere, and a row is all that a new kind takes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomllib

from sd35_trt.backends import BACKENDS, Backend, resolve
from sd35_trt.compat.library import load_library
from sd35_trt.dialects import DIALECTS
from sd35_trt.dimensions import Bounds
from sd35_trt.engines.builder import (
    BuiltEngine,
    CompiledComponent,
    EngineOptions,
    ExportedComponent,
)
from sd35_trt.errors import Sd35Error
from sd35_trt.runtime import Pipeline
from sd35_trt.targets import choose_builder, find_target

EXTRAS = tomllib.loads(Path("pyproject.toml").read_text("utf-8"))["project"][
    "optional-dependencies"
]


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_every_row_leads_somewhere(backend: Backend) -> None:
    assert callable(resolve(backend.builder))
    assert callable(resolve(backend.session))
    assert {backend.extra, *(c.extra for c in backend.companions)} <= set(EXTRAS)
    assert set(backend.dialects.values()) <= set(DIALECTS)
    assert backend.otherwise is None or backend.otherwise in BACKENDS
    stated = [r for r in EXTRAS[backend.extra] if r.startswith((backend.module, *backend.packages))]
    assert any(f">={backend.minimum_version}" in requirement for requirement in stated) or (
        backend.name == "tensorrt-rtx"
        and f">={backend.minimum_version}" in " ".join(EXTRAS[backend.extra])
    )


def test_a_library_that_is_absent_too_old_or_broken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    backend = replace(
        BACKENDS["tensorrt"],
        module="some_library",
        title="Some Library",
        dialects={"2.0": "opset23"},
    )
    with pytest.raises(Sd35Error, match=r"Some Library is not installed .* — pip install"):
        load_library(backend)
    monkeypatch.syspath_prepend(tmp_path)
    library = tmp_path / "some_library.py"
    library.write_text("raise OSError('libsome.so.1: cannot open')")
    with pytest.raises(Sd35Error, match=r"does not load \(libsome.so.1: cannot open\)"):
        load_library(backend)
    library.write_text("__version__ = '1.9.3'")
    with pytest.raises(Sd35Error, match=r"Some Library 1.9.3 is too old, 2.0 is needed"):
        load_library(backend)
    monkeypatch.delitem(__import__("sys").modules, "some_library")
    library.write_text("__version__ = '2.0.0rc1'")
    assert load_library(backend).__version__ == "2.0.0rc1"


def test_a_library_of_which_pip_left_a_part(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of two packages with one module, one was uninstalled: the module imports, and is empty."""
    (tmp_path / "half_a_library" / "capi").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    backend = replace(BACKENDS["onnxruntime"], module="half_a_library")
    with pytest.raises(Sd35Error) as caught:
        load_library(backend)
    assert "ONNX Runtime is installed in parts" in str(caught.value)
    assert str(caught.value).endswith(
        "pip uninstall -y onnxruntime onnxruntime-gpu, then: pip install 'sd35-trt[onnxruntime]'"
    )


def test_no_other_extra_takes_onnx_runtime() -> None:
    """Two packages install its module, and which of them is the user's choice."""
    named = {
        extra
        for extra, requirements in EXTRAS.items()
        if any(requirement.startswith("onnxruntime") for requirement in requirements)
    }
    assert named == {"onnxruntime", "onnxruntime-gpu"}


class _Builder:
    """Copies the exported graph, as ONNX Runtime's does, under other names."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def versions(self) -> dict[str, str]:
        return {"some-library": "2.1"}

    def describe(self) -> dict[str, Any]:
        return {}

    def stage(self, component: ExportedComponent, bounds: Mapping[str, Bounds]) -> None:
        return None

    def place(self, engine: CompiledComponent, out: Path) -> BuiltEngine:
        for source, file in zip(BACKENDS["onnxruntime"].files, self.backend.files, strict=True):
            shutil.copyfile(engine.folder / source, out / file)
        return BuiltEngine(self.backend.files, engine.component.weight_bytes)


def create_builder(name: str, capabilities: tuple[str, ...], options: EngineOptions) -> _Builder:
    return _Builder(BACKENDS[name])


def open_session(*arguments: Any) -> Any:
    return resolve(BACKENDS["onnxruntime"].session)(*arguments)


def test_a_row_and_two_modules_are_a_new_kind(
    make_bundle: Callable[..., Path], mini_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is offered, builds, is recorded, planned for and draws; here both modules are this one."""
    row = replace(
        BACKENDS["onnxruntime"],
        name="paper",
        title="Paper",
        # External data keeps its name: the graph refers to it.
        files=("paper.onnx", "weights.data"),
        builder=f"{__name__}:create_builder",
        session=f"{__name__}:open_session",
    )
    monkeypatch.setitem(BACKENDS, "paper", row)
    find_target.__globals__["targets"].cache_clear()
    try:
        assert choose_builder(find_target("cpu")) == "onnxruntime"
        bundle = make_bundle(builder="paper")
    finally:
        monkeypatch.delitem(BACKENDS, "paper")
        find_target.__globals__["targets"].cache_clear()
    monkeypatch.setitem(BACKENDS, "paper", row)
    with Pipeline.load(bundle) as pipe, Pipeline.load(mini_bundle) as reference:
        assert pipe.manifest.builder == "paper"
        assert pipe.manifest.versions["some-library"] == "2.1"
        assert {c.files[0].path.split("/")[-1] for c in pipe.manifest.components} == {"paper.onnx"}
        request = {"prompt": "a red star", "seed": 3, "steps": 2}
        assert (pipe.generate(**request).images == reference.generate(**request).images).all()
        assert pipe.memory().planned_peak == reference.memory().planned_peak
