"""Weights that others have quantized: their values, and what is said of those that are not read."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes_values import FILE
from safetensors.torch import load_file, save_file

from sd35_trt.checkpoints.look import look
from sd35_trt.checkpoints.model_options import ModelOptions
from sd35_trt.checkpoints.origin import Origin
from sd35_trt.checkpoints.quantized_weight import check_method
from sd35_trt.checkpoints.tensor_files import TensorFiles
from sd35_trt.checkpoints.tensor_values import TensorValues
from sd35_trt.checkpoints.weights import PartWeights, folder_weights
from sd35_trt.errors import CheckpointError
from sd35_trt.mini import checkpoint_path

Tensors = dict[str, torch.Tensor]

LAYER = "blocks.0.proj"
WEIGHT = f"{LAYER}.weight"
ROWS, COLUMNS = 200, 130

# NF4's values: quantiles of a normal distribution (QLoRA, appendix E).
NF4 = torch.tensor(
    [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
     0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
)  # fmt: skip


def _weight() -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) / 8


def _fp8(scale: torch.Tensor, wide: torch.Tensor | None = None) -> tuple[torch.Tensor, Tensors]:
    """Divided by scales and rounded to E4M3; the values, and the weight without its scale."""
    wide = scale if wide is None else wide
    stored = (_weight() / wide).to(torch.float8_e4m3fn)
    return stored.float() * wide, {WEIGHT: stored}


def _per_tensor(name: str) -> Callable[[], tuple[torch.Tensor, Tensors]]:
    def make() -> tuple[torch.Tensor, Tensors]:
        values, tensors = _fp8(torch.tensor(0.01))
        return values, {**tensors, f"{LAYER}.{name}": torch.tensor(0.01)}

    return make


def _per_row(form: tuple[int, ...]) -> Callable[[], tuple[torch.Tensor, Tensors]]:
    def make() -> tuple[torch.Tensor, Tensors]:
        scale = torch.linspace(0.001, 0.01, ROWS)
        values, tensors = _fp8(scale[:, None])
        return values, {**tensors, f"{LAYER}.weight_scale": scale.reshape(form)}

    return make


def _with(
    make: Callable[[], tuple[torch.Tensor, Tensors]], *words: str
) -> Callable[[], tuple[torch.Tensor, Tensors]]:
    """Other scales beside, which change no weight."""

    def more() -> tuple[torch.Tensor, Tensors]:
        values, tensors = make()
        return values, {**tensors, **{f"{LAYER}.{word}": torch.tensor(0.5) for word in words}}

    return more


def _blocks() -> tuple[torch.Tensor, Tensors]:
    scale = torch.tensor([[0.001, 0.01], [0.002, 0.03]])
    wide = torch.empty(ROWS, COLUMNS)
    for i in range(2):
        for j in range(2):
            wide[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] = scale[i, j]
    values, tensors = _fp8(scale, wide)
    return values, {**tensors, f"{LAYER}.weight_scale_inv": scale}


def _int8_rows() -> tuple[torch.Tensor, Tensors]:
    scale = _weight().abs().amax(1, keepdim=True) / 127
    stored = (_weight() / scale).round().to(torch.int8)
    return stored * scale, {WEIGHT: stored, f"{LAYER}.weight_scale": scale}


def _llm_int8() -> tuple[torch.Tensor, Tensors]:
    largest = _weight().abs().amax(1)
    stored = (_weight() * 127 / largest[:, None]).round().to(torch.int8)
    form = torch.tensor(0, dtype=torch.uint8)
    return stored * largest[:, None] * 7.874015718698502e-3, {
        WEIGHT: stored, f"{LAYER}.SCB": largest, f"{LAYER}.weight_format": form,
    }  # fmt: skip


def _quanto() -> tuple[torch.Tensor, Tensors]:
    values, tensors = _int8_rows()
    one = torch.ones(())
    return values, {
        f"{WEIGHT}._data": tensors[WEIGHT], f"{WEIGHT}._scale": tensors[f"{LAYER}.weight_scale"],
        f"{LAYER}.input_scale": one, f"{LAYER}.output_scale": one,
    }  # fmt: skip


def _nf4(dtype: torch.dtype = torch.bfloat16, nested: bool = False) -> tuple[torch.Tensor, Tensors]:
    """In blocks of 64; 200 × 130 is no multiple of it."""
    flat, facts = _weight().reshape(-1), {"quant_type": "nf4", "blocksize": 64}
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % 64)).view(-1, 64)
    absmax = padded.abs().amax(1)
    state: Tensors = {"quant_map": NF4, "absmax": absmax}
    if nested:
        offset, codes = absmax.mean(), torch.linspace(-1, 1, 256)
        largest = (absmax - offset).abs().amax()
        index = ((absmax - offset) / largest)[:, None].sub(codes).abs().argmin(1)
        absmax = codes[index] * largest + offset
        state |= {"absmax": index.to(torch.uint8), "nested_quant_map": codes,
                  "nested_absmax": largest.expand(-(-len(absmax) // 256)).clone()}  # fmt: skip
        facts |= {"nested_blocksize": 256, "nested_offset": offset.item()}
    index = (padded / absmax[:, None])[..., None].sub(NF4).abs().argmin(-1)
    values = (NF4[index] * absmax[:, None]).reshape(-1)[: len(flat)].reshape(ROWS, COLUMNS)
    index = index.reshape(-1)[: len(flat)].to(torch.uint8)
    facts |= {"dtype": str(dtype).removeprefix("torch."), "shape": [ROWS, COLUMNS]}
    state["quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(facts).encode())).to(
        torch.uint8
    )
    packed = (index[0::2] << 4 | index[1::2])[:, None]
    return values.to(dtype), {WEIGHT: packed, **{f"{WEIGHT}.{k}": v for k, v in state.items()}}


def _groups() -> tuple[torch.Tensor, Tensors]:
    """13 columns have a scale for each row."""
    scale = torch.linspace(0.001, 0.01, ROWS * 10).reshape(ROWS, 10)
    values, tensors = _fp8(scale, scale.repeat_interleave(13, 1))
    return values, {**tensors, f"{LAYER}.weight_scale": scale}


def _exponents() -> tuple[torch.Tensor, Tensors]:
    exponents = torch.tensor([[-7, -5], [-6, -4]])
    wide = torch.exp2(exponents.float()).repeat_interleave(128, 0).repeat_interleave(128, 1)
    values, tensors = _fp8(exponents, wide[:ROWS, :COLUMNS])
    scale = (exponents + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
    return values, {**tensors, f"{LAYER}.weight_scale_inv": scale}


def _contained(kind: torch.dtype) -> tuple[torch.Tensor, Tensors]:
    """Packed numbers in the bits of a floating-point type, as bitsandbytes does for FSDP."""
    values, tensors = _nf4()
    return values, {**tensors, WEIGHT: tensors[WEIGHT].reshape(-1).view(kind)[:, None]}


READ = {
    "scale_weight": _per_tensor("scale_weight"),
    "weight_scale": _per_tensor("weight_scale"),
    "weight_scale_inv": _per_tensor("weight_scale_inv"),
    "weight_scale of transformers": _with(_per_tensor("weight_scale_inv"), "activation_scale"),
    "weight_scale of compressed-tensors": _with(
        _per_tensor("weight_scale"), "input_scale", "output_scale"
    ),
    "rows": _per_row((ROWS,)),
    "rows of FBGEMM": _with(_per_row((ROWS, 1)), "input_scale_ub"),
    "rows, a column": _per_row((ROWS, 1)),
    "blocks of 128": _blocks,
    "int8, rows": _int8_rows,
    "LLM.int8": _llm_int8,
    "quanto": _quanto,
    "groups of columns": _groups,
    "powers of two": _exponents,
    "nf4": _nf4,
    "nf4 in bf16": lambda: _contained(torch.bfloat16),
    "nf4 in fp32": lambda: _contained(torch.float32),
    "nf4 of fp32": lambda: _nf4(torch.float32),
    "nf4, double": lambda: _nf4(torch.float16, nested=True),
}


def _in_a_file(file: Path) -> PartWeights:
    return PartWeights(TensorValues(TensorFiles(file, [file])), [file], "", lambda names: Origin)


OPENERS: dict[str, Callable[[Path], PartWeights]] = {
    "folder": lambda file: folder_weights("transformer", file.parent),
    "single file": _in_a_file,
}

Opener = Callable[..., PartWeights]


@pytest.fixture(params=list(OPENERS))
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Opener:
    def write(tensors: Tensors, metadata: dict[str, str] | None = None) -> PartWeights:
        file = tmp_path / "diffusion_pytorch_model.safetensors"
        # In a part there are other tensors too, which stay as they are.
        other = torch.arange(4, dtype=torch.bfloat16)
        own = {name: tensor.clone() for name, tensor in tensors.items()}
        save_file({"blocks.1.bias": other, **own}, file, metadata)
        return OPENERS[request.param](file)

    return write


@pytest.mark.parametrize("spelling", READ)
def test_values(spelling: str, opened: Opener) -> None:
    values, tensors = READ[spelling]()
    weights = opened(tensors)
    assert WEIGHT in weights
    assert weights.shape(WEIGHT) == (ROWS, COLUMNS)
    assert weights.unused([WEIGHT, "blocks.1.bias"]) == []
    actual = weights.read(WEIGHT)
    assert actual.dtype == values.dtype
    assert torch.equal(actual, values)
    assert torch.equal(weights.read("blocks.1.bias"), torch.arange(4, dtype=torch.bfloat16))


@pytest.mark.parametrize("spelling", READ)
def test_what_can_be_taken_over(spelling: str, opened: Opener) -> None:
    """E4M3 with one scale; rows and blocks have many."""
    values, tensors = READ[spelling]()
    pair = opened(tensors).fp8(WEIGHT)
    assert (pair is not None) == ("scale" in spelling)
    if pair is not None:
        assert torch.equal(pair[0].float() * pair[1], values)


def test_as_bitsandbytes_dequantizes() -> None:
    """Bit for bit; the file was written with the library."""
    weights = _in_a_file(FILE)
    front = "expected."
    expected = {name: t for name, t in load_file(FILE).items() if name.startswith(front)}
    assert len(expected) == 13
    for name, values in expected.items():
        actual = weights.read(f"{name.removeprefix(front)}.weight")
        assert name == "expected.int8" or actual.dtype == values.dtype, name
        assert torch.equal(actual.to(values.dtype), values), name


def _cast(kind: torch.dtype, **beside: torch.Tensor) -> Tensors:
    return {WEIGHT: torch.zeros(8, 4).to(kind)} | {f"{LAYER}.{k}": v for k, v in beside.items()}


ONE = torch.ones(1)
STATE = "quant_state.bitsandbytes__nf4"


def _bytes(entry: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps(entry).encode()), dtype=torch.uint8)


def _state(**changes: object) -> torch.Tensor:
    shape = [ROWS, COLUMNS]
    entry = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": shape}
    return _bytes(entry | changes)


def _nf4_but(nested: bool = False, **changes: torch.Tensor) -> Tensors:
    return {**_nf4(nested=nested)[1], **{f"{WEIGHT}.{k}": v for k, v in changes.items()}}


REFUSED = {
    "int8 alone": (_cast(torch.int8), "I8"),
    "packed alone": (_cast(torch.uint8), "U8"),
    "another scale": (_cast(torch.float8_e4m3fn, scale=ONE), "scale"),
    "another scale below": (
        {**_cast(torch.float8_e4m3fn), f"{WEIGHT}.scale": ONE}, "scale"),
    "a scale that smooths": (
        _cast(torch.float8_e4m3fn, weight_scale=ONE, pre_quant_scale=torch.ones(4)),
        "F8_E4M3 with pre_quant_scale"),
    "a scale of 0": (_cast(torch.float8_e4m3fn, weight_scale=ONE * 0), "weight_scale of 0"),
    "a scale below 0": (_cast(torch.int8, weight_scale=-ONE), "weight_scale with -1"),
    "a scale that is infinite": (
        _cast(torch.float8_e4m3fn, scale_weight=ONE / 0), "scale_weight with inf"),
    "a scale that is no number": (
        _cast(torch.float8_e4m3fn, weight_scale=torch.tensor([1.0] * 7 + [math.nan])),
        "weight_scale with nan"),
    "a power that is no number": (
        _cast(torch.float8_e4m3fn,
              weight_scale=torch.tensor([255], dtype=torch.uint8).view(torch.float8_e8m0fnu)),
        "weight_scale with nan"),
    "a scale in integers": (
        _cast(torch.float8_e4m3fn, weight_scale=torch.ones(8).int()), "weight_scale in I32"),
    "scales of a scalar": (
        {WEIGHT: torch.ones(()).to(torch.float8_e4m3fn), f"{LAYER}.weight_scale": torch.ones(2)},
        "weight_scale of shape [2] for a weight of []"),
    "an input scale of 0": (
        _cast(torch.float8_e4m3fn, weight_scale=ONE, input_scale=ONE * 0), "input_scale of 0"),
    "an input scale that is no number": (
        _cast(torch.float8_e4m3fn, weight_scale=ONE, input_scale=ONE * math.nan),
        "input_scale with nan"),
    "an input scale in FP8": (
        _cast(torch.float8_e4m3fn, weight_scale=ONE, input_scale=ONE.to(torch.float8_e4m3fn)),
        "input_scale in F8_E4M3"),
    "two input scales": (
        _cast(torch.float8_e4m3fn, weight_scale=ONE, input_scale=ONE, scale_input=ONE),
        "input_scale and scale_input"),
    "packed with a scale": (_cast(torch.uint8, weight_scale=ONE), "U8 with weight_scale"),
    "powers of two alone": (_cast(torch.float8_e8m0fnu), "F8_E8M0 in weight"),
    "E4M3FNUZ": (_cast(torch.float8_e4m3fnuz, weight_scale=ONE), "F8_E4M3FNUZ with weight_scale"),
    "NVFP4": (
        {WEIGHT: torch.zeros(8, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
         f"{LAYER}.weight_scale": torch.ones(8, 1).to(torch.float8_e4m3fn)},
        "F4 with weight_scale"),
    "EETQ": (_cast(torch.int8, weight_scales=torch.ones(8)), "I8 in weight, with weight_scales"),
    "torchao": (
        {f"{LAYER}._weight_qdata": torch.zeros(8, 4).to(torch.float8_e4m3fn),
         f"{LAYER}._weight_scale": ONE}, "F8_E4M3 with _weight_scale"),
    "a description in BF16": (
        _cast(torch.float8_e4m3fn, weight_scale=ONE, comfy_quant=ONE.bfloat16()), "unreadable"),
    "a description of LLM.int8": (
        _cast(torch.int8, SCB=torch.ones(8),
              comfy_quant=torch.tensor(list(b'{"format": "int8_tensorwise"}'), dtype=torch.uint8)),
        "int8_tensorwise without weight_scale"),
    "an unknown tensor": (_cast(torch.float8_e4m3fn, weight_scale=ONE, hadamard=ONE), "hadamard"),
    "an unknown tensor of a cast": (_cast(torch.float8_e4m3fn, rotation=ONE), "rotation"),
    "an unknown scale of a float": (_cast(torch.bfloat16, absmax=ONE), "BF16 with absmax"),
    "a bias in int8": (
        _cast(torch.float8_e4m3fn, bias=torch.zeros(8, dtype=torch.int8)), "I8 in bias"),
    "a fused projection's scale": (
        {f"{LAYER}.in_proj_weight": torch.zeros(8, 4).to(torch.float8_e4m3fn),
         f"{LAYER}.in_proj_weight_scale": ONE}, "F8_E4M3 with in_proj_weight_scale"),
    "HQQ": (
        {f"{LAYER}.W_q": torch.zeros(8, 4, dtype=torch.uint8), f"{LAYER}.scale": ONE}, "U8 in W_q"),
    "AQLM": (
        {f"{LAYER}.codes": torch.zeros(8, 4, dtype=torch.int16),
         f"{LAYER}.codebooks": ONE}, "I16 in codes, with codebooks"),
    "quanto int4 of blocks": (
        {f"{WEIGHT}._data": torch.zeros(8, 2, dtype=torch.uint8), f"{WEIGHT}._shift": ONE},
        "quanto's U8"),
    "two scales": (
        _cast(torch.float8_e4m3fn, weight_scale=ONE, scale_weight=ONE), "scale_weight and weight"),
    "a scale of a float": (_cast(torch.bfloat16, weight_scale=ONE), "BF16 with weight_scale"),
    "scales of another shape": (
        _cast(torch.float8_e4m3fn, weight_scale=torch.ones(3)), "weight_scale of shape [3]"),
    "scales by column": (
        _cast(torch.float8_e4m3fn, weight_scale=torch.ones(1, 4)), "of shape [1, 4]"),
    "mxfp8": (
        _cast(torch.float8_e4m3fn, weight_scale=torch.ones(8, 1, dtype=torch.uint8)),
        "weight_scale in U8"),
    "zero points": (_cast(torch.int8, weight_scale=ONE, weight_zero_point=ONE), "weight_zero"),
    "SCB in integers": (
        _cast(torch.int8, SCB=torch.ones(8, dtype=torch.int8)), "SCB in I8 with a weight in I8"),
    "SCB below 0": (_cast(torch.int8, SCB=-torch.ones(8)), "SCB with -1"),
    "SCB of a convolution": (
        {WEIGHT: torch.zeros(8, 4, 2, 2, dtype=torch.int8), f"{LAYER}.SCB": torch.ones(8)},
        "for a weight of [8, 4, 2, 2]"),
    "LLM.int8 in two layouts": (
        _cast(torch.int8, SCB=torch.ones(8), weight_format=torch.zeros(2, dtype=torch.uint8)),
        "layout of a GPU"),
    "SCB of another length": (_cast(torch.int8, SCB=torch.ones(3)), "SCB"),
    "LLM.int8 for Turing": (
        _cast(torch.int8, SCB=torch.ones(8), weight_format=torch.tensor(1, dtype=torch.uint8)),
        "layout of a GPU"),
    "GPTQ": (
        {f"{LAYER}.qweight": torch.zeros(4, 4, dtype=torch.int32)}, "qweight"),
    "compressed-tensors, packed": (
        {f"{LAYER}.weight_packed": torch.zeros(4, 4, dtype=torch.int32)}, "weight_packed"),
    "modelopt": (
        {**_cast(torch.float8_e4m3fn), f"{LAYER}.weight_quantizer._scale": ONE}, "_scale"),
    "quanto int4": (
        {f"{WEIGHT}._data": torch.zeros(8, 2, dtype=torch.uint8), f"{WEIGHT}._scale": ONE},
        "quanto's U8"),
    "quanto beside a weight": (
        {**_cast(torch.bfloat16), f"{WEIGHT}._data": torch.zeros(8, 4, dtype=torch.int8),
         f"{WEIGHT}._scale": torch.ones(8, 1)}, "quanto's I8"),
    "quanto of integers": (
        {f"{WEIGHT}._data": torch.zeros(8, 4, dtype=torch.int8),
         f"{WEIGHT}._scale": torch.ones(8, 1, dtype=torch.int8)}, "quanto's scales in I8"),
    "quanto, no number": (
        {f"{WEIGHT}._data": torch.zeros(8, 4, dtype=torch.int8),
         f"{WEIGHT}._scale": torch.ones(8, 1) * math.nan}, "quanto's scale with nan"),
    **{f"nf4, {case}": (_nf4_but(**changes), words) for case, changes, words in [
        ("a short table", {"quant_map": torch.ones(15)}, "quant_map in F32, [15]"),
        ("a table in bytes", {"quant_map": torch.ones(16).byte()}, "quant_map in U8"),
        ("another tensor", {"input_scale": ONE}, "U8 with weight.input_scale"),
        ("nested scales alone", {"nested_absmax": torch.ones(2)}, "U8 with weight.nested_absmax"),
        ("a state in BF16", {STATE: torch.ones(4).bfloat16()}, "unreadable"),
        ("a list for a state", {STATE: _bytes([1])}, "unreadable"),
        ("another type", {STATE: _state(quant_type="fp4")}, "nf4 of fp4"),
        ("no type", {STATE: _state(quant_type="int4")}, "quant_type"),
        ("another number type", {STATE: _state(dtype="float8")}, "dtype"),
        ("blocks of 63", {STATE: _state(blocksize=63)}, "blocksize"),
        ("a rotation", {STATE: _state(hadamard=True)}, "hadamard"),
        ("a negative shape", {STATE: _state(shape=[-ROWS, -COLUMNS])}, "[-200, -130]"),
        ("no shape", {STATE: _state(shape=[])}, "nf4 of nf4, []"),
        ("nested blocks of 0", {STATE: _state(nested_blocksize=0, nested_offset=0.0)},
         "nested_blocksize 0"),
    ]},
    **{f"nf4, double, {case}": (_nf4_but(nested=True, **changes), words)
       for case, changes, words in [
        ("no offset", {STATE: _state(nested_blocksize=256)}, "nested_blocksize 256 and None"),
        ("an offset that is no number",
         {STATE: _state(nested_blocksize=256, nested_offset=math.nan)}, "unreadable"),
        ("a short table", {"nested_quant_map": torch.ones(200)}, "nested_quant_map in F32, [200]"),
        ("few blocks", {"nested_absmax": torch.ones(1)}, "nested_absmax in F32, [1]"),
        ("blocks in bytes", {"nested_absmax": torch.ones(2).byte()}, "nested_absmax in U8"),
    ]},
    "nf4 without absmax": (
        {k: v for k, v in _nf4()[1].items() if not k.endswith("absmax")}, "nf4 without"),
    "nf4 with codes for absmax": (
        {**_nf4()[1], f"{WEIGHT}.absmax": torch.zeros(407, dtype=torch.uint8)}, "absmax in U8"),
    "nf4 with few blocks": (
        {**_nf4()[1], f"{WEIGHT}.absmax": torch.zeros(3)}, "nf4 with absmax"),
    "nf4, cut": (
        {**_nf4()[1], WEIGHT: torch.zeros(10, 1, dtype=torch.uint8)}, "nf4 in U8, 10 bytes"),
    "nf4, no state": (
        {**_nf4()[1], f"{WEIGHT}.quant_state.bitsandbytes__nf4": torch.zeros(3, dtype=torch.uint8)},
        "unreadable"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused(case: str, opened: Opener) -> None:
    tensors, words = REFUSED[case]
    with pytest.raises(CheckpointError) as caught:
        opened(tensors)
    message = str(caught.value)
    assert LAYER in message
    assert words in message
    assert "BF16" in message, "the way out"
    assert "\n" not in message


def test_scales_that_are_lost(opened: Opener) -> None:
    """Of a layer that is scaled in another block; one that is nowhere scaled is a cast."""
    cast = torch.zeros(8, 4).to(torch.float8_e4m3fn)
    scaled = {**_cast(torch.float8_e4m3fn, weight_scale=ONE), "blocks.1.other.weight": cast}
    assert "blocks.1.other.weight" in opened(scaled)
    with pytest.raises(CheckpointError) as caught:
        opened({**scaled, "blocks.1.proj.weight": cast})
    assert "'blocks.1.proj'" in str(caught.value)
    assert "F8_E4M3 without weight_scale, which other blocks have" in str(caught.value)


@pytest.mark.parametrize("name", ["absmax", "quant_map"])
def test_values_that_are_no_numbers(name: str, opened: Opener) -> None:
    """Tables of many scales are read with the weight."""
    tensors = _nf4()[1]
    tensors[f"{WEIGHT}.{name}"] = tensors[f"{WEIGHT}.{name}"] * math.nan
    with pytest.raises(CheckpointError, match=f"{LAYER}.*nf4 with values that are not finite"):
        opened(tensors).read(WEIGHT)


def test_scales_of_groups_that_are_no_numbers(opened: Opener) -> None:
    _, tensors = _groups()
    tensors[f"{LAYER}.weight_scale"][3, 4] = math.nan
    with pytest.raises(CheckpointError, match=f"{LAYER}.*weight_scale with nan"):
        opened(tensors).read(WEIGHT)


def test_rows_of_zeros(opened: Opener) -> None:
    """They may have the scale 0."""
    scale = torch.tensor([0.0] + [1.0] * 7)
    weights = opened({**_cast(torch.int8, weight_scale=scale), WEIGHT: torch.ones(8, 4).char()})
    assert torch.equal(weights.read(WEIGHT), scale[:, None].expand(8, 4))


def _described(**more: object) -> torch.Tensor:
    text = json.dumps({"format": "float8_e4m3fn", **more})
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize("where", ["beside", "metadata"])
@pytest.mark.parametrize(
    ("kind", "entry", "words"),
    [
        (torch.float8_e4m3fn, {"convrot": True}, "float8_e4m3fn with convrot"),
        (torch.float8_e4m3fn, {"format": "mxfp8"}, "mxfp8"),
        (torch.float8_e4m3fn, {"format": None}, "None"),
        (torch.int8, {}, "float8_e4m3fn in I8"),
        (torch.bfloat16, {}, "float8_e4m3fn in BF16"),
        (torch.float8_e4m3fn, {"params": {"convrot": True}}, "float8_e4m3fn with params"),
        (torch.float8_e4m3fn, {"format": "mx\nfp8"}, "mx fp8"),
        (torch.int8, {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256},
         "int8_tensorwise with convrot, convrot_groupsize"),
        (torch.float8_e4m3fn, None, "unreadable"),
    ],
)  # fmt: skip
def test_descriptions_of_comfyui(
    kind: torch.dtype, entry: dict[str, object] | None, words: str, where: str, opened: Opener
) -> None:
    one = {} if kind == torch.bfloat16 else {"weight_scale": ONE}
    tensors, metadata = _cast(kind, **one), None
    description = None if entry is None else {"format": "float8_e4m3fn", **entry}
    if where == "metadata":
        metadata = {"_quantization_metadata": json.dumps({"layers": {LAYER: description}})}
    else:
        text = list(json.dumps(description).encode())
        tensors[f"{LAYER}.comfy_quant"] = torch.tensor(text, dtype=torch.uint8)
    with pytest.raises(CheckpointError) as caught:
        opened(tensors, metadata)
    assert LAYER in str(caught.value)
    assert f"({words})" in str(caught.value) or words in str(caught.value)


@pytest.mark.parametrize("where", ["beside", "metadata"])
def test_descriptions_of_a_cast(where: str, opened: Opener) -> None:
    """What is described has a scale, by the name that ComfyUI reads."""
    beside = {} if where == "metadata" else {"comfy_quant": _described()}
    layers = {"layers": {LAYER: {"format": "float8_e4m3fn"}}}
    metadata = {"_quantization_metadata": json.dumps(layers)} if where == "metadata" else None
    for scale in ({}, {"weight_scale_inv": ONE}):
        with pytest.raises(CheckpointError, match=f"{LAYER}.*float8_e4m3fn without weight_scale"):
            opened(_cast(torch.float8_e4m3fn, **scale, **beside), metadata)


@pytest.mark.parametrize("front", ["", "model.diffusion_model."])
def test_descriptions_without_the_prefix(front: str, tmp_path: Path) -> None:
    file, prefix = tmp_path / "sd3.5.safetensors", "model.diffusion_model."
    tensors = _cast(torch.int8, weight_scale=ONE)
    layers = {"layers": {front + LAYER: {"format": "int8_tensorwise", "convrot": True}}}
    save_file(
        {prefix + name: tensor for name, tensor in tensors.items()},
        file,
        {"_quantization_metadata": json.dumps(layers)},
    )
    with pytest.raises(CheckpointError, match=f"{prefix}{LAYER}.*int8_tensorwise with convrot"):
        TensorValues(TensorFiles(file, [file])).check(prefix)


@pytest.mark.parametrize("more", [{}, {"full_precision_matrix_mult": True}, {"convrot": False}])
def test_descriptions_that_change_no_value(more: dict[str, object], opened: Opener) -> None:
    tensors = _cast(torch.float8_e4m3fn, weight_scale=ONE, comfy_quant=_described(**more))
    assert WEIGHT in opened(tensors)


def test_input_scales(opened: Opener) -> None:
    """Of files and of folders alike: what an input is divided by, times E4M3's largest number."""
    scale = torch.tensor(0.5)
    for name, unmeasured in (("input_scale", 448.0), ("scale_input", None),
                             ("activation_scale", None)):  # fmt: skip
        weights = opened(_cast(torch.float8_e4m3fn, weight_scale=ONE, **{name: scale}))
        assert weights.input_amax(LAYER) == 224.0
        weights = opened(_cast(torch.float8_e4m3fn, weight_scale=ONE, **{name: ONE}))
        assert weights.input_amax(LAYER) == unmeasured
    assert opened(_cast(torch.float8_e4m3fn, weight_scale=ONE)).input_amax(LAYER) is None


def test_input_scales_of_other_types(opened: Opener) -> None:
    """E4M3's largest number says nothing of inputs in INT8 or E5M2, nor does quanto's 1."""
    for kind in (torch.int8, torch.float8_e5m2):
        assert opened(_cast(kind, weight_scale=ONE, input_scale=ONE)).input_amax(LAYER) is None
    assert opened(_quanto()[1]).input_amax(LAYER) is None


def test_a_cast_alone_is_read(opened: Opener) -> None:
    """E4M3 without any scale, with an input scale too."""
    for tensors in (_cast(torch.float8_e4m3fn), _cast(torch.float8_e4m3fn, input_scale=ONE)):
        assert WEIGHT in opened(tensors)


@pytest.fixture
def mini(tmp_path: Path) -> Path:
    root = tmp_path / "mini"
    shutil.copytree(checkpoint_path(), root)
    return root


def _change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_quantized_text_encoder_of_a_folder(mini: Path) -> None:
    """As transformers saves it: linears in LLM.int8, the configuration says so."""
    (file,) = (mini / "text_encoder_3").glob("*.safetensors")
    tensors = load_file(file)
    values = {}
    for name in [n for n in tensors if n.endswith((".q.weight", ".wi_0.weight"))]:
        layer, weight = name.removesuffix(".weight"), tensors[name].float()
        largest = weight.abs().amax(1)
        tensors[name] = (weight * 127 / largest[:, None]).round().to(torch.int8)
        tensors[f"{layer}.SCB"] = largest
        values[name] = tensors[name] * largest[:, None] * 7.874015718698502e-3
    save_file(tensors, file, {"format": "pt"})
    _change_config(
        mini / "text_encoder_3",
        quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True},
    )
    checkpoint = look(ModelOptions(str(mini))).checkpoint
    assert "quantization_config" not in checkpoint.config("text_encoder_3")
    weights = checkpoint.weights("text_encoder_3")
    assert values
    for name, value in values.items():
        assert torch.equal(weights.read(name), value)


@pytest.mark.parametrize("method", ["torchao", "gptq", "svdquant", ["gptq"], None])
def test_other_methods_are_named(method: object, mini: Path) -> None:
    _change_config(mini / "transformer", quantization_config={"quant_method": method})
    with pytest.raises(CheckpointError, match=re.escape(str(method or "a method"))) as caught:
        look(ModelOptions(str(mini)))
    assert "transformer" in str(caught.value)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("nf4", "_config is no JSON object"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, r"blocks of \[64, 64\]"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "blocks of 128"),
        ({"quant_method": "modelopt"}, "modelopt to what it does not name"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "modelopt to W4A8_AWQ"),
        ({"quant_method": "compressed-tensors", "transform_config": {"config_groups": {}}},
         "compressed-tensors with transform_config"),
        ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-bitmask"}},
         "compressed-tensors with sparsity_config"),
        ({"quant_method": "gptq", "load_in_4bit": True}, "by gptq"),
        ({}, "a method that it does not name"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_configurations_that_are_not_read(value: object, words: str, key: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        check_method(Path("vae/config.json"), {key: value})
    assert "vae/config.json: " in str(caught.value)
    assert "BF16" in str(caught.value), "the way out"


def test_a_configuration_that_is_not_read(mini: Path) -> None:
    _change_config(mini / "transformer", quantization_config="nf4")
    with pytest.raises(CheckpointError, match="quantization_config is no JSON object") as caught:
        look(ModelOptions(str(mini)))
    assert str(mini / "transformer" / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        {"load_in_4bit": True},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {"quant_method": "fbgemm_fp8"},
        {"quant_method": "compressed-tensors", "sparsity_config": {"format": "dense"}},
        {"quant_method": "modelopt", "quant_algo": "FP8"},
    ],
    ids=str,
)
def test_configurations_that_are_read(value: dict[str, object], mini: Path) -> None:
    _change_config(mini / "text_encoder", quantization_config=value)
    checkpoint = look(ModelOptions(str(mini))).checkpoint
    assert "quantization_config" not in checkpoint.config("text_encoder")
