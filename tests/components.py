"""Exporting single components and running them, for the tests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from sd35_trt.checkpoints.controlnets import open_nets
from sd35_trt.checkpoints.model_options import ControlNet
from sd35_trt.checkpoints.single_file import open_checkpoint
from sd35_trt.components import component_row
from sd35_trt.export.component import ExportOptions, export_component
from sd35_trt.export.scales import Scales
from sd35_trt.features import PLAIN, Features
from sd35_trt.formats.bundle import Bundle
from sd35_trt.formats.calibration import Calibration
from sd35_trt.formats.program import PROGRAM_FILE, TENSORS_FILE, read_program
from sd35_trt.policies import Policy, load_policy
from sd35_trt.programs.tensors import read_tensors
from sd35_trt.programs.torch_program import TorchProgram
from sd35_trt.runtime.sessions.onnxruntime import session_options

Arrays = dict[str, np.ndarray]
Run = Callable[[Path, Arrays], Arrays]


def export(
    root: Path,
    checkpoint: Path,
    names: Iterable[str],
    policy: Policy | str,
    calibration: Calibration | None = None,
    dialect: str = "opset23",
    guided: bool = False,
    nets: Sequence[ControlNet] = (),
    features: Features = PLAIN,
) -> Path:
    """Export components; each goes to ``root / name``.

    Args:
        nets: beside the checkpoint.
        features: of the bundle that they would be of.
    """
    policy = load_policy(policy) if isinstance(policy, str) else policy
    for name in names:
        part = component_row(name).part
        scales = Scales.of(calibration, part) if calibration else None
        (root / name).mkdir(parents=True)
        opened = open_checkpoint(checkpoint, given=open_nets(nets))
        tokens = opened.config(part).get("max_position_embeddings", 77)
        own = features.of_component(name)
        options = ExportOptions(clip_tokens=tokens, guided=guided, dialect=dialect, features=own)
        export_component(name, opened, policy, options, root / name, scales=scales)
    return root


def taken_from(bundle: Path, name: str, root: Path) -> Path:
    """A copy of a bundle's component, in ``root / name`` as :func:`export` would write it."""
    component = Bundle.open(bundle).manifest.component(name)
    assert component is not None
    folder = Path(shutil.copytree(bundle / name, root / name))
    ports = {
        key: [msgspec.to_builtins(port) for port in getattr(component, key)]
        for key in ("inputs", "outputs")
    }
    (folder / "component.json").write_text(json.dumps(ports))
    return folder


def run_ort(folder: Path, feeds: Arrays, extra: Iterable[str] = ()) -> Arrays:
    """Run a component in ONNX Runtime as a bundle's session would.

    Args:
        feeds: cast to the inputs' dtypes.
        extra: intermediate values to return too.
    """
    path = folder / "model.onnx"
    if extra:
        model = onnx.load(path, load_external_data=False)
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in extra)
        path = folder / "watched.onnx"
        onnx.save(model, path)
    session = ort.InferenceSession(str(path), session_options(fp8=True))
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, _cast(folder, feeds)), strict=True))


def run_reference(folder: Path, feeds: Arrays) -> Arrays:
    """Run a component in onnx's evaluator, where every FP16 operator rounds to FP16.

    (ONNX Runtime's CPU provider computes FP16 graphs in FP32.)
    """
    model = onnx.load(folder / "model.onnx")
    evaluator = ReferenceEvaluator(model, new_ops=[LayerNormalization, RMSNormalization])
    with np.errstate(all="ignore"):
        values = evaluator.run(None, _cast(folder, feeds))
    return dict(zip(evaluator.output_names, values, strict=True))


def run_program(folder: Path, feeds: Arrays) -> Arrays:
    """Run a component's program, operator by operator."""
    program = read_program(folder / PROGRAM_FILE)
    weights = read_tensors(folder / TENSORS_FILE, program.weights(), torch.device("cpu"))
    run = TorchProgram(program, weights, torch.device("cpu"), mode="eager")
    values = run({k: torch.from_numpy(v) for k, v in _cast(folder, feeds).items()})
    description = json.loads((folder / "component.json").read_text())
    return {port["name"]: values[port["name"]].numpy() for port in description["outputs"]}


def _cast(folder: Path, feeds: Arrays) -> Arrays:
    description = json.loads((folder / "component.json").read_text())
    dtypes = {port["name"]: np.dtype(port["dtype"]) for port in description["inputs"]}
    return {name: np.asarray(array, dtypes[name]) for name, array in feeds.items()}


def velocity(root: Path, arguments: Mapping[str, torch.Tensor], run: Run = run_ort) -> np.ndarray:
    """What the transformer predicts for diffusers' arguments, by conditioner and denoiser."""
    feed = {name: value.numpy() for name, value in arguments.items()}
    latents = feed["hidden_states"]
    samples = len(latents)
    conditioned = run(
        root / "conditioner",
        {
            "prompt_embeds": feed["encoder_hidden_states"],
            "pooled": feed["pooled_projections"],
            "timesteps": feed["timestep"],
        },
    )
    # Each sample is at a step of its own.
    modulation = conditioned["modulation"][np.arange(samples), np.arange(samples)]
    stepped = run(
        root / "denoiser",
        {
            "latents": latents,
            "sigma": np.ones(samples),
            "coefficients": np.zeros((samples, 3)),
            "previous_denoised": np.zeros_like(latents),
            "context": conditioned["context"],
            "modulation": modulation,
        },
    )
    return latents - stepped["denoised"]


class _Norm(OpRun):
    # The evaluator's own norms square in FP16; the operators' stash_type asks for FP32.
    op_domain = ""

    @staticmethod
    def _scaled(x: np.ndarray, epsilon: float, *parameters: Any) -> tuple[np.ndarray]:
        y = (x / np.sqrt(np.square(x).mean(-1, keepdims=True) + epsilon)).astype(
            parameters[0].dtype
        )
        y = y * parameters[0]
        return (y if len(parameters) == 1 or parameters[1] is None else y + parameters[1],)


class LayerNormalization(_Norm):
    def _run(  # type: ignore[no-untyped-def]
        self, x, scale, bias=None, axis=None, epsilon=None, stash_type=None
    ):
        wide = x.astype(np.float32)
        return self._scaled(wide - wide.mean(-1, keepdims=True), epsilon, scale, bias)


class RMSNormalization(_Norm):
    def _run(  # type: ignore[no-untyped-def]
        self, x, scale, axis=None, epsilon=None, stash_type=None
    ):
        return self._scaled(x.astype(np.float32), epsilon, scale)
