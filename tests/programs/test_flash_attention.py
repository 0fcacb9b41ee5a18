"""FlashAttention-4 in programs, with a library of the same form in its place: it has no CPU's."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from sd35_trt.formats.program import Call, Graph, Node, Program
from sd35_trt.programs import flash_attention, torch_program
from sd35_trt.programs.attention import ATTENTION
from sd35_trt.programs.kernel_archive import collect_kernels, offer_kernels
from sd35_trt.programs.torch_program import TorchProgram

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)

# As the library: heads after tokens, and a kernel where the environment says.
_LIBRARY = """
import os
from pathlib import Path
from torch.nn.functional import scaled_dot_product_attention

FOLDER = Path(os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"]) / ("a" * 64) / "fwd"
calls = []

def flash_attn_func(query, key, value):
    calls.append(query.shape)
    kernel = FOLDER / ("b" * 64 + ".o")
    if not kernel.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        kernel.write_bytes(b"compiled")
        kernel.with_suffix(".lock").write_bytes(b"")
    mixed = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)))
    return mixed.transpose(1, 2).contiguous(), None
"""

_CACHED = (flash_attention.is_usable, flash_attention._library, flash_attention._folder)

_SDPA = "aten.scaled_dot_product_attention.default"


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The stand-in, installed beside a GPU of compute capability 9.0."""
    package = tmp_path / "site" / "flash_attn" / "cute"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").write_text(_LIBRARY if folder == package else "")
    about = tmp_path / "site" / "flash_attn_4-4.0.0b36.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: flash-attn-4\nVersion: 4.0.0b36\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "site")
    for name in ("ENABLED", "DIR"):
        monkeypatch.delenv(f"FLASH_ATTENTION_CUTE_DSL_CACHE_{name}", raising=False)
    monkeypatch.setattr(flash_attention, "_TEMPORARY", [])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    _forget()
    yield package
    for name in ("ENABLED", "DIR"):
        os.environ.pop(f"FLASH_ATTENTION_CUTE_DSL_CACHE_{name}", None)
    _forget()


def _forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        del sys.modules[name]
    for function in _CACHED:
        function.cache_clear()


def _program(**kwargs: float) -> Program:
    values = [{"value": name} for name in ("q", "k", "v")]
    graph = Graph((), ("q", "k", "v"), (Node("y", _SDPA, values, kwargs),), ("y",))
    step = Call("g", (), ("q", "k", "v"), ("y",))
    return Program(torch.__version__, {"g": graph}, (step,))


def _inputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    packed = torch.randn(2, 7, 3, 4, 16, generator=torch.Generator().manual_seed(3)).to(dtype)
    return {name: packed[:, :, i].transpose(1, 2) for i, name in enumerate("qkv")}


def _run(program: Program, dtype: torch.dtype, attention: tuple[str, ...]) -> torch.Tensor:
    return TorchProgram(program, {}, CPU, "default", attention)(_inputs(dtype))["y"]


def test_compiled_programs_take_it(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attention, "is_usable", lambda device: True)
    actual = _run(_program(), torch.float16, tuple(ATTENTION))
    torch.testing.assert_close(
        actual, functional.scaled_dot_product_attention(*_inputs(torch.float16).values())
    )
    assert flash_attention._library().calls == [(2, 7, 4, 16)]
    # Tokens before heads: the next product copies nothing.
    assert actual.transpose(1, 2).is_contiguous()


def test_what_it_does_not_do_stays_pytorchs(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attention, "is_usable", lambda device: True)
    # Traced as always; what Inductor makes of PyTorch's own operators takes a C++ compiler.
    aot = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", aot)
    monkeypatch.setattr(torch_program, "_COMPILED", {})
    plain = _run(_program(), torch.float32, tuple(ATTENTION))
    torch.testing.assert_close(
        plain, functional.scaled_dot_product_attention(*_inputs(torch.float32).values())
    )
    scaled = _run(_program(scale=0.5), torch.float16, tuple(ATTENTION))
    without = _run(_program(), torch.float16, ("cudnn", "math"))
    eager = TorchProgram(_program(), {}, CPU, "eager")(_inputs(torch.float16))["y"]
    torch.testing.assert_close(without, eager, rtol=0, atol=1e-3)
    assert (scaled - eager).abs().max() > 0.1
    assert flash_attention._library().calls == []


def test_where_it_is_usable(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not flash_attention.is_usable(CPU)
    assert flash_attention.is_usable(GPU)
    _forget()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    assert not flash_attention.is_usable(GPU)


def test_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _forget()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(flash_attention, "PACKAGE", "flash-attn-that-nobody-has")
    assert not flash_attention.is_usable(GPU)
    _forget()


def test_a_broken_one_is_told_once(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr(
        flash_attention.logger, "warning", lambda text, *of: messages.append(text % of)
    )
    (library / "__init__.py").write_text("raise OSError('libcute.so: undefined symbol')")
    assert not flash_attention.is_usable(GPU)
    assert not flash_attention.is_usable(GPU)
    assert messages == [
        "flash-attn-4 4.0.0b36 cannot be loaded (OSError: libcute.so: undefined symbol): "
        "attention takes PyTorch's own kernels"
    ]


def test_what_it_compiled_goes_with_the_other_kernels(library: Path) -> None:
    assert flash_attention.is_usable(GPU)
    attend = _inputs(torch.float16)
    flash_attention.attention(attend["q"], attend["k"], attend["v"])
    name = f"{'a' * 64}/fwd/{'b' * 64}.o"
    assert flash_attention.compiled() == {name: b"compiled"}
    data = collect_kernels()
    assert data is not None
    (folder,) = flash_attention._TEMPORARY
    (Path(folder.name) / name).write_bytes(b"another")
    offer_kernels(data)
    assert flash_attention.compiled() == {name: b"compiled"}


@pytest.mark.parametrize("name", ["../" + "a" * 64 + ".o", f"{'a' * 64}/{'b' * 64}.so", "x"])
def test_names_that_are_not_a_kernels_are_left_out(library: Path, name: str) -> None:
    flash_attention.offer({name: b"code"})
    (folder,) = flash_attention._TEMPORARY
    assert list(Path(folder.name).rglob("*")) == []
    assert not (Path(folder.name) / name).resolve().exists()


def test_a_users_own_folder_is_theirs(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    monkeypatch.setenv("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(tmp_path / "own"))
    flash_attention.offer({f"{'a' * 64}/{'b' * 64}.o": b"code"})
    assert flash_attention.is_usable(GPU)
    assert flash_attention.compiled() == {}
    assert not (tmp_path / "own").exists()


def test_its_folder_goes_with_the_process(tmp_path: Path) -> None:
    code = "from sd35_trt.programs import flash_attention as f; print(f._folder())"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FLASH_ATTENTION")}
    process = subprocess.run(
        [sys.executable, "-c", code], env={**environment, "TMPDIR": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(process.stdout.strip()).parent == tmp_path
    assert list(tmp_path.iterdir()) == []
