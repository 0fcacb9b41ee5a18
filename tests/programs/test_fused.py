"""The fused operators' kernels: in Triton's interpreter, and on a Hopper GPU where there is one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sd35_trt.compat.requirement import installed_version
from sd35_trt.programs import flash_attention_3, fused, kernels
from sd35_trt.programs.fused import E4M3, FUNCTIONS


def operands(operator: str, tokens: tuple[int, ...], width: int, device: str) -> tuple[Any, ...]:
    """What an operator takes: two samples, streams of so many tokens."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def each(make: Any) -> list[torch.Tensor]:
        return [make(count).to(device) for count in tokens]

    def e4m3(*shape: int) -> torch.Tensor:
        return (100 * normal(*shape)).clamp(-448, 448).to(E4M3)

    inside = 4 * width if operator == "gated" else width
    outside = {"qkv": 3, "gelu": 4}.get(operator, 1) * width
    x = each(lambda n: e4m3(2, n, inside))
    weight = each(lambda n: e4m3(outside, inside))
    scales = [
        each(lambda n, s=s: torch.tensor((1 + n % 7 / 99) * s)) for s in (0.01, inside**-0.5 / 9)
    ]
    bias = each(lambda n: normal(outside).half())
    # As in a block: rows of the modulation, which are not next to each other.
    gate = each(lambda n: normal(2, 6, width).half())
    gate = [modulation[:, 2] for modulation in gate]
    residual = each(lambda n: normal(2, n, width).half())
    if operator == "modulated":
        shift = [rows.roll(1, 0) for rows in gate]
        return residual, shift, gate, each(lambda n: torch.tensor(0.01 + n % 7 / 99)), 1e-6
    if operator == "qkv":
        factor = each(lambda n: 1 + normal(outside).abs())
        norm = each(lambda n: (1 + normal(2, 64) / 9).half())
        return x, weight, *scales, factor, bias, norm, 1e-6
    if operator == "gelu":
        return x, weight, *scales, bias, each(lambda n: torch.tensor(0.01))
    if operator == "gated":
        return x, weight, *scales, bias, gate, residual
    if operator == "fp8_attention":
        scale = torch.tensor([0.01, 0.012, 0.011])[:, None].expand(3, width // 64).to(device)
        count = sum(tokens)
        packed = e4m3(2, count, 3, width // 64, 64).to(device)
        return *packed.unbind(2), scale
    if operator == "low_rank":
        scales = normal(2, 24).half().to(device)
        scales[1, 7:] = 0.0
        down = each(lambda n: (normal(width, 3, 24) * width**-0.5).half())
        return x, down, scales, each(lambda n: torch.tensor(0.01 + n % 7 / 99))
    joint = normal(2, sum(tokens) + 3, width).half().to(device)
    half = [(normal(width, width) * width**-0.5).half().to(device) for _ in tokens]
    return joint, half, bias, gate, residual


#: Operators that take what adapters make of their input.
ADAPTED = ("qkv", "gelu", "gated", "gated_half")


def adapters(
    operator: str, tokens: tuple[int, ...], width: int, device: str, rank: int
) -> dict[str, Any]:
    """What an operator takes of adapters, and what else is added to its result."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).half().to(device)

    linears, out = {"qkv": (3, width), "gelu": (1, 4 * width)}.get(operator, (1, width))
    hidden = [normal(2, count, linears * rank) for count in tokens]
    up = [normal(linears, rank, out) * rank**-0.5 for _ in tokens]
    added = {"added": normal(2, tokens[0], width)} if operator == "gated" else {}
    return {"hidden": hidden, "up": up, **added}


def errors(
    kernel: Any,
    operator: str,
    tokens: tuple[int, ...],
    width: int,
    device: str,
    rank: int = 0,
    quantized: bool = False,
    **options: bool,
) -> list[float]:
    """‖kernel − reference‖ / ‖reference‖ by stream; NaN where something was not written."""
    arguments = operands(operator, tokens, width, device)
    more = adapters(operator, tokens, width, device, rank) if rank else {}
    if quantized:
        more["operand_scale"] = torch.rand(3, width // 64).to(device) / 99 + 0.01
    actual = kernel(*arguments, **options, **more)
    expected = FUNCTIONS[operator](*arguments, **more)
    if operator in ("qkv", "fp8_attention"):
        actual, expected = [actual], [expected]
    assert [t.dtype for t in actual] == [t.dtype for t in expected]
    pairs = [(a.float(), b.float()) for a, b in zip(actual, expected, strict=True)]
    return [float((a - b).norm() / b.norm()) for a, b in pairs]


# E4M3 results may be rounded to the other neighbour where FP16 rounded the sums before.
E4M3_LIMIT = 0.03
LIMITS = {"modulated": E4M3_LIMIT, "qkv": 2e-3, "gelu": E4M3_LIMIT, "gated": 3e-3,
          "gated_half": 2e-3, "low_rank": 1e-3, "fp8_attention": 0.01}  # fmt: skip

#: Operators that are our own kernels'.
KERNELS = [name for name in FUNCTIONS if name != "fp8_attention"]


@pytest.mark.parametrize("tilings", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_kernels_compute_what_the_operators_mean(tilings: int) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(Path(__file__).with_name("interpret_kernels.py")), str(tilings)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    actual = json.loads(process.stdout)
    assert len(actual) == 2 * tilings * (len(KERNELS) + len(ADAPTED) + 1)
    for key, values in actual.items():
        limit = E4M3_LIMIT if key.endswith("quantized") else LIMITS[key.split()[0]]
        assert all(error <= limit for error in values), (key, values)


@pytest.mark.parametrize("operator", FUNCTIONS)
@pytest.mark.parametrize("tokens", [(256, 45), (4096, 333), (1000,)])
@pytest.mark.parametrize(("fast", "rank"), [(True, 0), (False, 0), (True, 16), (True, 64)])
def test_on_a_hopper_gpu(operator: str, tokens: tuple[int, ...], fast: bool, rank: int) -> None:
    if not torch.cuda.is_available() or not kernels._has_kernels(torch.device("cuda", 0)):
        pytest.skip("no Hopper GPU")
    kernel = kernels.find(f"sd35.{operator}.default", torch.device("cuda", 0))
    if rank and operator not in ADAPTED:
        pytest.skip("it takes no adapters")
    if operator == "fp8_attention" and installed_version(flash_attention_3.PACKAGE) is None:
        pytest.skip("fa3-fwd is not installed")
    options = {"use_fast_accum": fast} if operator in ("qkv", "gelu", "gated") else {}
    actual = errors(kernel, operator, tokens, 1536, "cuda:0", rank, **options)
    assert all(error <= 2 * LIMITS[operator] for error in actual), actual


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_binaries_are_found_in_another_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from sd35_trt.programs import triton_binaries
    from sd35_trt.programs.triton_kernels import modulate as kernel

    types = dict.fromkeys(kernel.arg_names, "i32") | {"eps": "fp32", "BLOCK": "constexpr"}
    for stream in "01":
        types |= dict.fromkeys([f"{name}{stream}" for name in ("x", "shift", "scale")], "*fp16")
        types |= {f"input_scale{stream}": "*fp32", f"out{stream}": "*fp8e4nv"}

    def compile_in(cache: str) -> Any:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / cache))
        source = triton.compiler.ASTSource(kernel, types, {"BLOCK": 2048})
        return triton.compile(source, target=GPUTarget("cuda", 90, 32))

    first = compile_in("one")
    binaries = triton_binaries.stored({"modulate": [first.hash]})
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "other"))
    triton_binaries.offer({**binaries, "../outside/file.json": b"", "0" * 64 + "/../x.json": b""})
    actual = [path.name for path in (tmp_path / "other").rglob("*") if path.is_file()]
    assert sorted(actual) == ["__grp__modulate.json", "modulate.cubin", "modulate.json"]
    again = compile_in("other")
    # Only what was put there: nothing was compiled.
    assert list(again.asm) == ["cubin"]
    assert again.asm["cubin"] == first.asm["cubin"]


@pytest.mark.parametrize("operator", FUNCTIONS)
def test_traced_shapes_are_the_results(operator: str) -> None:
    """Layouts too: the compiler relies on them."""
    arguments = operands(operator, (48, 20), 128, "cpu")
    # Not "test_schema": it compares inputs in a way that E4M3 does not have.
    torch.library.opcheck(fused.OPERATORS[operator], arguments, test_utils="test_faketensor")


@pytest.mark.parametrize("biased", [False, True])
def test_the_product_on_the_cpu_is_that_of_pytorch(biased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 32, generator=generator).to(E4M3) for n in (3, 16))
    scale = torch.tensor(0.01)
    bias = torch.randn(16, generator=generator).half() if biased else None
    arguments = (x, weight.t(), scale, 2 * scale, bias)
    expected = torch._scaled_mm(*arguments, out_dtype=torch.float16)
    actual = fused.reference_scaled_mm(*arguments, out_dtype=torch.float16)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=2e-3, atol=1e-4)


def test_other_devices_get_the_functions() -> None:
    for name, function in FUNCTIONS.items():
        assert kernels.is_fused(f"sd35.{name}.default")
        assert kernels.find(f"sd35.{name}.default", torch.device("cpu")) is function
    assert not kernels.is_fused("sd35.exec.default")
    assert not kernels.is_fused("aten.add.Tensor")
