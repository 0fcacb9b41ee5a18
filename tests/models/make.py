"""Makes a bundle of tiny networks: the components and ports of a real one, a few operators each.

What it draws is a function of prompt, seed, guidance and size as a model's pictures are, and means
nothing. The denoiser is the largest, then come conditioner and T5, as in real ones. It is for tests
of what runs networks. The same arguments give the same bytes, but for the time in the manifest; all
kinds of engines compute the same. One to look at:

    PYTHONPATH=tests python -m models.make DIR
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from models.programs import program
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from sd35_trt.backends import BACKENDS
from sd35_trt.components import LATENT_SCALE
from sd35_trt.dimensions import Defaults, Ranges, dimension_bounds
from sd35_trt.engines.assemble import assemble
from sd35_trt.engines.builder import (
    Builder,
    BuiltEngine,
    CompiledComponent,
    ExportedComponent,
    load_builder,
)
from sd35_trt.formats.bundle import Manifest, ModelRecord, PolicyRecord, Port, Scheduler
from sd35_trt.formats.calibration import Calibration
from sd35_trt.formats.component import MODEL_FILE, WEIGHTS_FILE, ComponentFacts
from sd35_trt.formats.program import PROGRAM_FILE, TENSORS_FILE
from sd35_trt.formats.tokenizers import TokenizerFacts, write_tokenizers
from sd35_trt.policies import load_policy
from sd35_trt.store.cache import StageCache
from sd35_trt.store.stages import Stage, run_stage
from sd35_trt.targets import find_target

WIDTH = 8
LATENTS = 16
ROWS = 4
TOKENS = 32
_PAD, _BEGIN, _END = "<pad>", "<begin>", "<end>"

RANGES = Ranges((1, 4), (64, 192), 64, (TOKENS, 128))
DEFAULTS = Defaults(28, 3.0, (128, 128), "euler", TOKENS)

_TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "uint8": TensorProto.UINT8}

PortRow = tuple[str, str, tuple["int | str", ...]]


@dataclass
class Network:
    """A graph that grows; values are names."""

    inputs: tuple[PortRow, ...]
    outputs: tuple[PortRow, ...]
    seed: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)

    def pooled(self, value: str, width: int, out: str = "") -> str:
        """[N, tokens, width] to [N, width]: a mean over tokens, of weights that they have."""
        weights = self("Softmax", self("MatMul", value, self.weight(width, 1)), axis=1)
        weights = self("Transpose", weights, perm=[0, 2, 1])
        return self("Reshape", self("MatMul", weights, value), self.constant([-1, width]), out=out)

    def weight(self, *shape: int, name: str = "") -> str:
        """Random, of deviation 1 / √(fan in)."""
        scale = np.prod(shape[1:] if len(shape) > 2 else shape[:1]) ** -0.5
        return self.constant(self._random.standard_normal(shape) * scale, np.float32, name)

    def constant(self, value: Any, dtype: type = np.int64, name: str = "") -> str:
        name = name or f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def __call__(self, operator: str, *values: str, out: str = "", **attributes: Any) -> str:
        """Append an operator; returns its (first) result, named ``out`` or of itself."""
        out = out or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, values, [out], out, **attributes))
        return out

    def save_program(self, folder: Path) -> None:
        """Write it as a program of PyTorch's operators."""
        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in self.weights}
        ports = (tuple(name for name, *_ in rows) for rows in (self.inputs, self.outputs))
        document, weights = program(self.nodes, constants, *ports)
        (folder / PROGRAM_FILE).write_text(document.to_json(), "utf-8")
        save_file(weights, folder / TENSORS_FILE)

    def save(self, folder: Path) -> None:
        """Write it as an ONNX model, its weights beside it."""

        def info(port: PortRow) -> onnx.ValueInfoProto:
            name, dtype, shape = port
            return helper.make_tensor_value_info(name, _TYPES[dtype], shape)

        graph = helper.make_graph(
            self.nodes, "tiny", [*map(info, self.inputs)], [*map(info, self.outputs)], self.weights
        )
        opset = [helper.make_opsetid("", 23)]
        onnx.save(
            helper.make_model(graph, opset_imports=opset, ir_version=11), folder / MODEL_FILE,
            save_as_external_data=True, location=WEIGHTS_FILE, size_threshold=128,
        )  # fmt: skip

    @property
    def weight_bytes(self) -> int:
        return sum(len(tensor.raw_data) for tensor in self.weights)


def _text_encoder(seed: int, width: int, tokens: int | str, pooled: bool) -> Network:
    outputs: tuple[PortRow, ...] = (("hidden", "float32", ("batch", tokens, width)),)
    if pooled:
        outputs += (("pooled", "float32", ("batch", width)),)
    net = Network((("input_ids", "int64", ("batch", tokens)),), outputs, seed)
    x = net("Gather", net.weight(300, width), "input_ids")
    net("Tanh", net("MatMul", x, net.weight(width, width)), out="hidden")
    if pooled:
        net.pooled("hidden", width, out="pooled")
    return net


def _conditioner() -> Network:
    text = 2 * WIDTH
    net = Network(
        (
            ("prompt_embeds", "float32", ("samples", "tokens", text)),
            ("pooled", "float32", ("samples", text)),
            ("timesteps", "float32", ("steps",)),
        ),
        (
            ("context", "float32", ("samples", "tokens", WIDTH)),
            ("modulation", "float32", ("steps", "samples", ROWS, WIDTH)),
        ),
        3,
    )
    # Weights of several layers, so that some can stream while others are held.
    value, width = "prompt_embeds", text
    for following in (16 * WIDTH, text, 16 * WIDTH):
        value = net("Tanh", net("MatMul", value, net.weight(width, following)))
        width = following
    net("MatMul", value, net.weight(width, WIDTH), out="context")
    time = net("Mul", "timesteps", net.constant(1e-3, np.float32))
    time = net("Unsqueeze", time, net.constant([1, 2]))
    rows = net("MatMul", "pooled", net.weight(text, ROWS * WIDTH))
    rows = net("Tanh", net("Add", rows, time))
    net("Reshape", rows, net.constant([0, 0, ROWS, WIDTH]), out="modulation")
    return net


def _denoiser() -> Network:
    latents = ("float32", ("batch", LATENTS, "height", "width"))
    context = ("float32", ("batch", "tokens", WIDTH))
    modulation = ("float32", ("batch", ROWS, WIDTH))
    per_sample = ("float32", ("batch",))
    net = Network(
        (
            ("latents", *latents),
            ("sigma", *per_sample),
            ("coefficients", "float32", ("batch", 3)),
            ("previous_denoised", *latents),
            ("context", *context),
            ("modulation", *modulation),
            ("uncond_context", *context),
            ("uncond_modulation", *modulation),
            ("guidance", *per_sample),
        ),
        (("next_latents", *latents), ("denoised", *latents)),
        4,
    )
    means = []
    for name in ("context", "modulation"):
        both = net("Concat", f"uncond_{name}", name, axis=0)
        means.append(net.pooled(both, WIDTH))
    # What is to be drawn, [2 × batch, channels, 1, 1].
    aim = net("Tanh", net("Add", *means))
    aim = net("MatMul", aim, net.weight(WIDTH, LATENTS, name="proj_out.weight"))
    aim = net("Unsqueeze", aim, net.constant([2, 3]))
    both = net("Concat", "latents", "latents", axis=0)
    picture = net("Tanh", net("Conv", both, net.weight(LATENTS, LATENTS, 7, 7), pads=[3, 3, 3, 3]))
    velocity = net("Sub", net("Sub", both, picture), aim)
    half = net("Shape", "latents", start=0, end=1)
    zero, far, axis = net.constant([0]), net.constant([1 << 40]), net.constant([0])
    uncond = net("Slice", velocity, zero, half, axis)
    cond = net("Slice", velocity, half, far, axis)

    def column(value: str) -> str:
        return net("Reshape", value, net.constant([-1, 1, 1, 1]))

    change = net("Mul", column("guidance"), net("Sub", cond, uncond))
    velocity = net("Add", uncond, change)
    net("Sub", "latents", net("Mul", column("sigma"), velocity), out="denoised")
    terms = []
    for index, value in enumerate(("latents", "denoised", "previous_denoised")):
        factor = net("Gather", "coefficients", net.constant(index), axis=1)
        terms.append(net("Mul", column(factor), value))
    net("Add", net("Add", *terms[:2]), terms[2], out="next_latents")
    return net


def _vae_decoder() -> Network:
    net = Network(
        (("latents", "float32", ("batch", LATENTS, "height", "width")),),
        (("image", "uint8", ("batch", "image_height", "image_width", 3)),),
        5,
    )
    x = net("Tanh", net("Conv", "latents", net.weight(3, LATENTS, 1, 1)))
    scales = net.constant([1, 1, LATENT_SCALE, LATENT_SCALE], np.float32)
    x = net("Resize", x, "", scales, mode="nearest")
    x = net("Add", net("Mul", x, net.constant(127.0, np.float32)), net.constant(127.5, np.float32))
    x = net("Transpose", net("Round", x), perm=[0, 2, 3, 1])
    net("Cast", x, to=TensorProto.UINT8, out="image")
    return net


def _vae_encoder() -> Network:
    net = Network(
        (("image", "uint8", ("batch", "image_height", "image_width", 3)),),
        (("latents", "float32", ("batch", LATENTS, "height", "width")),),
        6,
    )
    x = net("Transpose", net("Cast", "image", to=TensorProto.FLOAT), perm=[0, 3, 1, 2])
    x = net("Sub", net("Div", x, net.constant(127.5, np.float32)), net.constant(1.0, np.float32))
    square = [LATENT_SCALE, LATENT_SCALE]
    net("Conv", x, net.weight(LATENTS, 3, *square), strides=square, out="latents")
    return net


def networks() -> dict[str, Network]:
    """All components."""
    return {
        "clip_l": _text_encoder(0, WIDTH, TOKENS, pooled=True),
        "clip_g": _text_encoder(1, WIDTH, TOKENS, pooled=True),
        "t5": _text_encoder(2, 2 * WIDTH, "tokens", pooled=False),
        "conditioner": _conditioner(),
        "denoiser": _denoiser(),
        "vae_decoder": _vae_decoder(),
        "vae_encoder": _vae_encoder(),
    }


def _component(name: str, net: Network, dialect: str, out: Path) -> None:
    if dialect == "program":
        net.save_program(out)
    else:
        net.save(out)

    def ports(rows: tuple[PortRow, ...]) -> tuple[Port, ...]:
        return tuple(Port(name, dtype, tuple(shape)) for name, dtype, shape in rows)

    ComponentFacts(
        name=name,
        weight_bytes=net.weight_bytes,
        largest_layer_bytes=max(len(tensor.raw_data) for tensor in net.weights),
        allocated_bytes=1 << 20,
        inputs=ports(net.inputs),
        outputs=ports(net.outputs),
        precisions={"fp32": len(net.weights)},
        fp32_places={},
    ).write(out)


def _tokenizer(begin: bool) -> Tokenizer:
    """A token for each byte, and for the ends of a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([_PAD, _BEGIN, _END, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.add_special_tokens([_PAD, _BEGIN, _END])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_BEGIN} $A {_END}" if begin else f"$A {_END}",
        special_tokens=[(token, vocabulary[token]) for token in (_BEGIN, _END)],
    )
    return tokenizer


def _tokenizers(out: Path) -> None:
    for name in ("clip_l", "clip_g", "t5"):
        _tokenizer(begin=name != "t5").save(str(out / f"{name}.json"))
    write_tokenizers(out, dict.fromkeys(("clip_l", "clip_g", "t5"), TokenizerFacts(TOKENS, 0)))


class PlanBuilder:
    """Stands for TensorRT for RTX: its plans are names, for the tests' fake library."""

    backend = BACKENDS["tensorrt-rtx"]

    def versions(self) -> dict[str, str]:
        return {"tensorrt-rtx": "1.7.1"}

    def describe(self) -> dict[str, Any]:
        return {"compute_capabilities": ["8.9"], "weight_streaming": False, "refit": False}

    def stage(self, component: ExportedComponent, bounds: Mapping[str, Any]) -> None:
        return None

    def place(self, engine: CompiledComponent, out: Path) -> BuiltEngine:
        (out / "engine.plan").write_bytes(f"plan of {engine.component.name}".encode())
        return BuiltEngine(("engine.plan",), engine.component.weight_bytes, 4096)


def make(
    out: Path, cache: Path, target: str = "cpu", calibration: Calibration | None = None
) -> Path:
    """Write the bundle.

    Args:
        out: its directory.
        cache: where its stages are made.
        target: ``cpu`` for ONNX Runtime, ``ada`` for plans of :class:`PlanBuilder`, ``hopper`` for
            programs.
        calibration: to hold.
    """
    stages = StageCache(cache)
    code = ("sd35_trt.engines.assemble",)
    sources = [path.read_text("utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))]

    def stage(name: str, run: Any) -> Path:
        entry = Stage(name, {"tiny": sources}, code, run)
        return run_stage(stages, entry, lambda *_: None)

    builder: Builder = PlanBuilder()
    if target != "ada":
        backend = {"cpu": "onnxruntime", "hopper": "inductor"}[target]
        builder = load_builder(backend, find_target(target).compute_capabilities)
    dialect = "program" if builder.backend.name == "inductor" else "onnx"
    engines = []
    for name, net in networks().items():
        folder = stage(
            f"{name}-{dialect}",
            lambda work, _, name=name, net=net: _component(name, net, dialect, work),
        )
        component = ExportedComponent.read(folder)
        all_bounds = dimension_bounds(name, RANGES, DEFAULTS, TOKENS, True)
        own_bounds = {d: all_bounds[d] for port in component.inputs for d in port.dynamic}
        # Made up: as large as a network of these weights might take.
        engines.append(CompiledComponent(component, folder, own_bounds, 1 << 16))
    policy = load_policy("fp32")
    facts = Manifest(
        model=ModelRecord("tiny", "mini", {}),
        target=find_target(target).name,
        builder=builder.backend.name,
        engine_options=builder.describe(),
        policy=PolicyRecord(policy.name, policy.digest()),
        latent_channels=LATENTS,
        latent_scale=LATENT_SCALE,
        guided=True,
        scheduler=Scheduler(3.0, 1000.0),
        versions=builder.versions(),
        command="",
        ranges=RANGES,
        defaults=DEFAULTS,
        tokenizers={},
        components=(),
        files=(),
        calibration=None,
        created="",
    )
    tokenizers = stage("tokenizers", lambda work, _: _tokenizers(work))
    assemble(out, builder, engines, tokenizers, facts, calibration)
    return out


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    print(make(folder / "bundle", folder / "stages"))
