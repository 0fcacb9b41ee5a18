"""Ways to compute the step that :mod:`step` measures, ours and others'."""

from __future__ import annotations

from dataclasses import dataclass

from sd35_trt.features import PLAIN, Features
from sd35_trt.programs.attention import ATTENTION

_CUDNN = ("cudnn", "math")


@dataclass(frozen=True)
class Attempt:
    """A way to compute the step.

    Attributes:
        kind: ``diffusers``, ``torchao``, ``program``, ``usual`` (see :mod:`usual_way`), or that of
            an engine: ``onnxruntime``, ``tensorrt``.
        policy: of ours.
        mode: of compilation: a key of ``MODES``, or ``eager``.
        record: whether it is recorded and replayed.
        join, fuse: of :class:`sd35_trt.export.component.ExportOptions`.
        attention: the kernels that may be used.
        fast: whether FP8 products are summed with less than FP32's precision.
        fp8_attention: whether the operands of attentions are E4M3 too.
        level: optimization level of TensorRT's builder; None is what a build takes.
        features: what the step can take besides.
        rank: of the adapters that it is given; 0 where it is given none.
        skips: whether it has a third branch, without three of the blocks.
        controlled: whether a ControlNet's residuals are added.
        short: whether it computes the first blocks alone.
    """

    name: str
    kind: str
    policy: str = "fp8"
    mode: str = "default"
    record: bool = True
    join: bool = True
    fuse: bool = True
    attention: tuple[str, ...] = tuple(ATTENTION)
    fast: bool = True
    fp8_attention: bool = False
    level: int | None = None
    features: Features = PLAIN
    rank: int = 0
    skips: bool = False
    controlled: bool = False
    short: bool = False


# Of Large's ControlNets, that Stability AI published.
CONTROL_BLOCKS = 19

_ADAPTERS = Features((16, 64))
_SKIPS = Features(skip_layer_guidance=True)
_CONTROLS = Features(control_blocks=CONTROL_BLOCKS)


def _short_steps(*counts: int) -> tuple[Attempt, ...]:
    """A full step that puts out its change, and short ones of so many blocks."""
    first = Attempt(
        f"programs fp8, before short steps of {counts[0]}", "program",
        features=Features(short_steps=counts[0]),
    )  # fmt: skip
    return first, *(
        Attempt(f"programs fp8, short step of {count}", "program", short=True,
                features=Features(short_steps=count))
        for count in counts
    )  # fmt: skip


def _featured(policy: str) -> tuple[Attempt, ...]:
    """A step of engines that can take more, given it and not."""
    name = f"programs {policy}"
    return (
        *(
            Attempt(f"{name}, adapters {rank}", "program", policy, features=_ADAPTERS, rank=rank)
            for rank in (0, 16, 64)
        ),
        Attempt(f"{name}, control 0", "program", policy, features=_CONTROLS),
        Attempt(f"{name}, control", "program", policy, features=_CONTROLS, controlled=True),
        Attempt(f"{name}, skip-layers 0", "program", policy, features=_SKIPS),
        Attempt(f"{name}, skip-layers", "program", policy, features=_SKIPS, skips=True),
    )


ATTEMPTS = (
    Attempt("diffusers BF16", "diffusers", mode="eager", record=False),
    Attempt("programs fp8", "program"),
    Attempt("diffusers BF16, blocks compiled", "diffusers", record=False),
    Attempt("programs half", "program", "half"),
    Attempt("programs fp8, exact sums", "program", fast=False),
    Attempt("programs fp8, not fused", "program", fuse=False),
    Attempt("programs fp8, not joined", "program", fuse=False, join=False),
    Attempt("programs fp8, cuDNN's attention", "program", attention=_CUDNN),
    Attempt("programs half, cuDNN's attention", "program", "half", attention=_CUDNN),
    Attempt("programs fp8, eager", "program", mode="eager"),
    Attempt("onnxruntime half", "onnxruntime", "half", record=False),
    Attempt("onnxruntime fp8", "onnxruntime", record=False),
    Attempt("tensorrt fp8", "tensorrt"),
    Attempt("tensorrt half", "tensorrt", "half"),
    Attempt("tensorrt fp8, the usual way", "usual", record=False),
    Attempt("tensorrt half, the usual way", "usual", "half", record=False),
    Attempt("tensorrt fp8, FP8 attention", "tensorrt", fp8_attention=True),
    Attempt("tensorrt fp8, level 5", "tensorrt", level=5),
    Attempt("torchao FP8 rowwise, compiled", "torchao", record=False),
    Attempt("programs fp8, FP8 attention", "program", fp8_attention=True),
    Attempt("diffusers BF16, max-autotune, graph", "diffusers", mode="max-autotune"),
    Attempt("programs fp8, max-autotune", "program", mode="max-autotune"),
    *_short_steps(8, 4, 6, 10, 12),
    *_featured("fp8"),
    *_featured("half"),
    Attempt("diffusers PEFT rank 16", "diffusers", mode="eager", record=False, rank=16),
    Attempt("diffusers PEFT rank 16, blocks compiled", "diffusers", record=False, rank=16),
)
