"""Traced graphs are kept for models that differ in their weights alone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from calibrations import checkpoint_files, save
from safetensors.torch import load_file, save_file

from sd35_trt.build import BuildOptions, build
from sd35_trt.checkpoints.single_file import open_checkpoint
from sd35_trt.export import trace
from sd35_trt.export.component import ExportOptions, export_component, fake_tensors
from sd35_trt.export.graphs import GraphCache
from sd35_trt.export.layers import PositionTable, SeparablePositionTable
from sd35_trt.export.scales import HALF_LIMIT, Scales
from sd35_trt.formats.calibration import Calibration
from sd35_trt.mini import calibration_path, checkpoint_path
from sd35_trt.policies import load_policy
from sd35_trt.store.cache import StageCache


def tuned(tmp_path: Path) -> tuple[Path, Path]:
    """mini with other weights, saved by others, and a calibration of it with other scales."""
    root = tmp_path / "model"
    shutil.copytree(checkpoint_path(), root)
    for file in root.rglob("*.safetensors"):
        tensors = {name: 1.01 * tensor for name, tensor in load_file(file).items()}
        table = tensors.get("pos_embed.pos_embed")
        if table is not None:
            tensors["pos_embed.pos_embed"] = table / 1.01
        save_file(tensors, file, metadata={"format": "pt"})
    for config in root.glob("*/config.json"):
        values = json.loads(config.read_text("utf-8"))
        spellings = (
            {"dtype": "bfloat16"} if "text" in config.parent.name else {"_diffusers_version": "0"}
        )
        config.write_text(json.dumps({**values, **spellings}), "utf-8")
    packaged = Calibration.load(calibration_path())
    scales = {name: 1.5 * amax for name, amax in packaged.inputs.items()}
    provenance = msgspec.structs.replace(packaged.provenance, files=checkpoint_files(root))
    save(replace(packaged, inputs=scales, provenance=provenance), tmp_path / "calibration")
    return root, tmp_path / "calibration"


@pytest.mark.nightly
def test_a_tuned_model_takes_the_graphs_of_its_base(
    make_bundle: Callable[..., Path],
    stage_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_bundle(policy="fp8")
    cache = tmp_path / "cache"
    for folder in stage_cache.glob("*-graph"):
        shutil.copytree(folder, cache / folder.name, copy_function=os.link)
    model, calibration = tuned(tmp_path)

    def refuse(module: Any) -> Any:
        raise AssertionError(f"{type(module).__name__} is traced again")

    with monkeypatch.context() as patch:
        patch.setattr(trace, "trace_program", refuse)
        bundle = build(
            BuildOptions(
                model=str(model), policy="fp8", calibration=calibration,
                out=tmp_path / "bundle", cache_dir=cache,
            )
        )  # fmt: skip
    scales = Scales.of(Calibration.load(calibration), "transformer")
    (tmp_path / "out").mkdir()
    export_component(
        "denoiser", open_checkpoint(model), load_policy("fp8"), ExportOptions(32),
        tmp_path / "out", scales=scales,
    )  # fmt: skip
    for name in ("model.onnx", "weights.data"):
        actual = (bundle / "denoiser" / name).read_bytes()
        assert actual == (tmp_path / "out" / name).read_bytes(), name
    base = make_bundle(policy="fp8") / "denoiser" / "weights.data"
    assert base.read_bytes() != (bundle / "denoiser" / "weights.data").read_bytes()


class _Traced(torch.nn.Module):
    """Counts how often it is traced."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.count = 0

    def program(self) -> Any:
        self.count += 1
        return self

    def to_json(self) -> str:
        return "{}"


def test_what_a_graph_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sd35_trt.export.graphs.read_program", lambda path: path.read_text("utf-8"))
    graphs = GraphCache(StageCache(tmp_path), {"eps": 1e-6, "_name": "a"}, {"policy": "half"})
    others = {
        "another policy": (replace(graphs, inputs={"policy": "fp8"}), torch.nn.Linear(4, 4)),
        "another configuration": (replace(graphs, config={"eps": 1e-5}), torch.nn.Linear(4, 4)),
        "another shape": (graphs, torch.nn.Linear(4, 5)),
        "another type": (graphs, torch.nn.Linear(4, 4).half()),
        "another position table": (graphs, SeparablePositionTable(4, 8)),
        "and the other": (graphs, PositionTable(4, 8)),
    }
    with fake_tensors():
        first, again = _Traced(torch.nn.Linear(4, 4)), _Traced(torch.nn.Linear(4, 4))
        for module in (first, again):
            assert graphs.program("clip_l", module) == "{}"  # type: ignore[arg-type]
        assert (first.count, again.count) == (1, 0)
        for name, (half_layers, layer) in others.items():
            module = _Traced(layer)
            half_layers.program("clip_l", module)  # type: ignore[arg-type]
            assert module.count == 1, name
        renamed = replace(graphs, config={"eps": 1e-6, "dtype": "bfloat16", "_name": "b"})
        renamed.program("clip_l", again)  # type: ignore[arg-type]
        assert again.count == 0
        graphs.program("clip_g", again)  # type: ignore[arg-type]
        assert again.count == 1


def test_of_scales_it_matters_which_there_are_and_which_exceed_fp16() -> None:
    def structure(**values: Any) -> dict[str, Any]:
        return Scales(**values).structure("denoiser")

    plain = structure(inputs={"denoiser/a": 1.0, "denoiser/b": 2.0})
    assert plain == structure(inputs={"denoiser/b": 9.0, "denoiser/a": 3.0})
    different = [
        structure(inputs={"denoiser/a": 1.0}),
        structure(inputs={"denoiser/a": 1.0, "denoiser/b": 2 * HALF_LIMIT}),
        structure(inputs={"denoiser/a": 1.0, "denoiser/b": 2.0}, wide={"denoiser/c": 7e4}),
        structure(inputs={"denoiser/a": 1.0, "denoiser/b": 2.0}, wide_text=True),
        structure(inputs={"denoiser/a": 1.0, "denoiser/b": 2.0}, bmm={"denoiser/c.q": 1.0}),
        # Of the part's other component, an input that exceeds it.
        structure(inputs={"denoiser/a": 1.0, "denoiser/b": 2.0, "conditioner/a": 2 * HALF_LIMIT}),
    ]
    assert plain not in different
    assert all(different.count(other) == 1 for other in different)
