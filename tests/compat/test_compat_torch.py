"""PyTorch's inside behaves as we rely on."""

from __future__ import annotations

import pytest
import torch

from sd35_trt.compat.torch import (
    FakeTensorMode,
    TorchDispatchMode,
    add_each,
    lerp_each,
    multiply_each,
    onnx_functions_kept,
    recompile_limit,
    scaled_mm,
    storage_key,
    unset_fake_temporarily,
)
from sd35_trt.programs.torch_program import MODES


def test_tensors_are_fake_but_where_that_is_unset() -> None:
    with FakeTensorMode():
        fake = torch.empty(1 << 50)
        assert not isinstance(torch.ones(1), torch.nn.Parameter)
        with pytest.raises(RuntimeError):
            float(torch.ones(1))
        with unset_fake_temporarily():
            assert float(torch.ones(1)) == 1.0
    assert fake.shape == (1 << 50,)


def test_a_dispatch_mode_sees_each_operator_and_its_result() -> None:
    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            names.append((func.namespace, func.__name__))
            return func(*args, **(kwargs or {}))

    names: list[tuple[str, str]] = []
    with Recorder():
        torch.ones(2) + 1
    assert ("aten", "add.Tensor") in names


def test_storage_keys_are_equal_for_shared_memory_alone() -> None:
    for mode in (FakeTensorMode(), torch.no_grad()):
        with mode:
            x, y = torch.ones(4), torch.ones(4)
            assert storage_key(x) == storage_key(x[1:]) == storage_key(x.view(2, 2))
            assert storage_key(x) != storage_key(y)


def test_the_exporter_reads_its_functions_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    monkeypatch.setattr("sd35_trt.compat.torch._onnx_functions", {})
    read = ONNXRegistry.from_torchlib
    versions: list[int] = []

    def watch(opset_version: int) -> ONNXRegistry:
        versions.append(opset_version)
        return read(opset_version)

    monkeypatch.setattr(ONNXRegistry, "from_torchlib", watch)
    program = torch.export.export(torch.nn.Tanh(), (torch.ones(2),))
    models = []
    for opset in (23, 23, 21):
        with onnx_functions_kept():
            exported = torch.onnx.export(program, opset_version=opset, verbose=False)
        assert exported is not None
        models.append(exported.model)
    assert versions == sorted({*versions}, reverse=True), "each version once"
    assert versions[0] == 23
    assert [[node.op_type for node in model.graph] for model in models] == [["Tanh"]] * 3
    assert ONNXRegistry.from_torchlib is watch


def test_the_limit_of_compilations_is_set_and_restored() -> None:
    config = torch._dynamo.config
    before = config.recompile_limit
    with recompile_limit(before + 17):
        assert config.recompile_limit == before + 17
    assert config.recompile_limit == before


def test_scaled_mm_multiplies_and_scales() -> None:
    a = torch.eye(16).to(torch.float8_e4m3fn)
    b = torch.arange(256.0).view(16, 16).clamp(max=15).to(torch.float8_e4m3fn)
    y = scaled_mm(
        a, b.t(), torch.tensor(2.0), torch.tensor(3.0), out_dtype=torch.float16,
        use_fast_accum=False,
    )  # fmt: skip
    torch.testing.assert_close(y.float(), 6 * b.float().t())


def test_the_modes_of_compilation_are_pytorchs() -> None:
    modes = torch._inductor.list_mode_options()
    assert all(mode is None or mode in modes for mode in MODES.values())


def test_arithmetic_on_lists() -> None:
    targets = [torch.ones(2), torch.zeros(3)]
    multiply_each(targets, 3.0)
    add_each(targets, [torch.ones(2), torch.ones(3)], alpha=-2.0)
    lerp_each(targets, [torch.zeros(2), torch.zeros(3)], 0.5)
    assert [x.tolist() for x in targets] == [[0.5, 0.5], [-1.0, -1.0, -1.0]]


def test_cublas_workspaces_can_be_cleared() -> None:
    if torch.version.cuda is None:
        pytest.skip("a PyTorch without CUDA")
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    assert callable(clear), f"torch {torch.__version__}: torch._C._cuda_clearCublasWorkspaces"
